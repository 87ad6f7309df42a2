#include "check.h"
#include "refresh/profile_text.h"
#include "store/damaged_data.h"

namespace llmcache::fuzz {
namespace {

void check_text(const ProfileText& text) {
  const CalibrationProfile& profile = text.profile;
  profile.budget.validate();
  require(profile.fitted >= 0 && profile.certified >= 0, "negative count");
  require(profile.certified_error >= 0 && profile.error_bound >= 0, "negative error");
  require(profile.typical_distance >= 0, "negative distance");
  if (profile.reuse)
    require(profile.reuse->match_threshold >= 0 && profile.reuse->fitted >= 0, "negative threshold or count");
  if (!text.exit) return;
  for (const auto& level : text.exit->thresholds) {
    require(level.size() == text.exit->gates.size(), "thresholds of another number of layers");
    for (const double threshold : level) {
      require(threshold == -1 || (threshold >= 0 && threshold < 1.1), "threshold out of range");
    }
  }
  for (const LogisticModel& gate : text.exit->gates) {
    for (const double scale : gate.scales) require(scale > 0 && scale - scale == 0, "scale out of range");
  }
}

void check_tensors(std::string_view bytes, const Safetensors& tensors) {
  for (const auto& [name, tensor] : tensors.tensors()) {
    std::size_t size = tensor.dtype == "I64" ? 8 : 4;
    for (const auto dimension : tensor.shape) size *= static_cast<std::size_t>(dimension);
    require(size == tensor.bytes.size(), "shape and bytes of a tensor do not fit");
    require(
        tensor.bytes.data() >= bytes.data() && tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size(),
        "tensor outside the file");
    require(tensor.dtype == "I64" || all_finite(tensor), "value that is not finite");
  }
  require(tensors.has("outputs") && tensors.has("decisions") && tensors.has("mean_output"), "tensor missing");
}

}  // namespace

void check_profile(std::string_view bytes) {
  const std::size_t end = std::min(bytes.find('\0'), bytes.size());
  const std::string_view beside = bytes.substr(std::min(end + 1, bytes.size()));
  try {
    static_cast<void>(parse_profile(bytes.substr(0, end)));
  } catch (const DamagedData&) {
  } catch (const ForeignProfile&) {
  }
  try {
    const ProfileText text = parse_profile(bytes.substr(0, end), ContentHash::kIgnored);
    check_text(text);
    if (!text.exit) return;
    const Safetensors tensors(beside);
    check_exit_tensors(tensors, text);
    check_tensors(beside, tensors);
  } catch (const DamagedData&) {
  } catch (const ForeignProfile&) {
  }
}

}  // namespace llmcache::fuzz
