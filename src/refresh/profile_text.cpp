#include "refresh/profile_text.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "llmcache/error.h"
#include "refresh/exit_sizes.h"
#include "refresh/verified_json.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

constexpr double kMostShare = 1 + 1e-6;  // the most that a sum of shares is, rounded
constexpr double kAnyNumber = JsonObject::kAnyNumber;

/// JSON without the white space between its parts.
std::string compact(std::string_view json) {
  std::string text;
  text.reserve(json.size());
  bool quoted = false;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (!quoted && (c == ' ' || c == '\n' || c == '\r' || c == '\t')) continue;
    text += c;
    if (c == '"') quoted = !quoted;
    if (quoted && c == '\\' && i + 1 < json.size()) text += json[++i];
  }
  return text;
}

/// The hash is the last member, and is that of all before it. `json` has been parsed.
void check_content(std::string_view json) {
  const std::string text = compact(json);
  constexpr std::size_t kDigits = 16;
  const std::string_view name = ",\"content_xxh3\":\"";
  const std::size_t tail = name.size() + kDigits + 2;
  const std::size_t end = text.size() - std::min(tail, text.size());
  const std::string expected = fmt::format("{}{}\"}}", name, content_hash(text.substr(0, end) + "}"));
  if (text.substr(end) != expected) throw DamagedData("its content was changed");
}

/// What `read` refuses as an Error is damage here.
template <class Read>
auto damage_of(const Read& read) {
  try {
    return read();
  } catch (const Error& error) {
    throw DamagedData(error.what());
  }
}

void check_format(const JsonObject& json) {
  if (!json.has("format") || json.text("format") != kProfileFormat) {
    throw ForeignProfile("is no calibration profile");
  }
  const std::int64_t version = json.has("version") ? json.whole("version") : 0;
  if (version != kProfileVersion) {
    throw ForeignProfile(
        fmt::format("has version {}; this library reads version {}: calibrate again", version, kProfileVersion));
  }
}

Budget budget_of(const JsonObject& json) {
  return damage_of([&] {
    const Budget budget = {budget_metric_from_string(json.text("metric")), json.number("epsilon"),
                           json.number("delta")};
    budget.validate();
    return budget;
  });
}

ReuseChoice choice_of(const JsonObject& json) {
  ReuseChoice choice;
  choice.mechanism = json.text("mechanism");
  choice.format = damage_of([&] { return bank_format_from_string(json.text("format")); });
  choice.setting = json.text("setting");
  choice.match_threshold = json.number("limit", 0);
  if (json.has("epsilon")) choice.epsilon = json.number("epsilon", 0, 0.5);
  if (json.has("least_tokens")) choice.least_tokens = json.whole("least_tokens");
  choice.fitted = json.whole("fitted");
  choice.certified = json.whole("certified");
  choice.error = json.number("error", 0, kMostShare);
  choice.bound = json.number("bound", 0, kMostShare);
  choice.computed = json.number("computed", 0);
  choice.typical_distance = json.number("typical_distance", 0);
  return choice;
}

LogisticModel gate_of(const JsonObject& json) {
  LogisticModel gate;
  gate.means = json.numbers("means");
  gate.scales = json.numbers("scales", std::numeric_limits<double>::min());
  gate.weights = json.numbers("weights");
  gate.intercept = json.number("intercept");
  return gate;
}

ExitText exit_of(const JsonObject& json) {
  ExitText exit;
  exit.tensors_xxh3 = json.text("tensors_xxh3");
  exit.thresholds = json.tables("thresholds", -1, kMostShare);
  for (const JsonObject& gate : json.objects("gates")) exit.gates.push_back(gate_of(gate));
  if (exit.gates.empty() || exit.thresholds.empty()) throw DamagedData("its early exits have no gates or thresholds");
  for (const auto& level : exit.thresholds) {
    if (level.size() != exit.gates.size()) {
      throw DamagedData(fmt::format("it has a level of {} thresholds for {} layers", level.size(), exit.gates.size()));
    }
    for (const double threshold : level) {
      if (threshold < 0 && threshold != -1) {
        throw DamagedData(fmt::format("it has the threshold {}; -1 or 0 to 1 is expected", threshold));
      }
    }
  }
  return exit;
}

std::string shown_shape(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

/// Looks at each tensor that there should be, in turn.
class TensorCheck {
 public:
  TensorCheck(const Safetensors& file, const ProfileText& text) : file_(file), text_(text) {}

  void run() {
    const auto& outputs = file_.tensor("outputs", "F32", 2);
    entries_ = outputs.shape[0];
    values_ = outputs.shape[1];
    if (values_ < 1) bad("outputs", "has no values");
    if (!text_.cache_free() && entries_ < kLeastExitEntries) {
      bad("outputs", fmt::format("has {} entries; {} or more are expected", entries_, kLeastExitEntries));
    }
    floats("outputs", {entries_, values_});
    floats("mean_output", {values_});
    decisions();
    for (std::size_t l = 0; l < text_.exit->gates.size(); ++l) layer(l);
    if (seen_ != file_.tensors().size()) {
      Safetensors::damaged(fmt::format("it has {} tensors, {} are expected", file_.tensors().size(), seen_));
    }
  }

 private:
  [[noreturn]] static void bad(const std::string& name, const std::string& what) {
    Safetensors::damaged(fmt::format("tensor '{}' {}", name, what));
  }

  const Safetensors::Tensor& shaped(const std::string& name, const char* dtype,
                                    const std::vector<std::int64_t>& shape) {
    const auto& tensor = file_.tensor(name, dtype, shape.size());
    if (tensor.shape != shape) {
      bad(name, fmt::format("is {}; {} is expected", shown_shape(tensor.shape), shown_shape(shape)));
    }
    ++seen_;
    return tensor;
  }

  void floats(const std::string& name, const std::vector<std::int64_t>& shape) {
    if (!all_finite(shaped(name, "F32", shape))) bad(name, "has a value that is not finite");
  }

  void decisions() {
    shaped("decisions", "I64", {entries_});
    for (const std::int64_t decision : file_.values<std::int64_t>("decisions")) {
      if (decision < 0) bad("decisions", fmt::format("has the value {}", decision));
    }
  }

  void layer(std::size_t l) {
    const auto name = [l](const char* what) { return exit_tensor_name(l, what); };
    const LogisticModel& gate = text_.exit->gates[l];
    if (gate.means.size() != gate.weights.size() || gate.scales.size() != gate.weights.size()) {
      Safetensors::damaged(fmt::format("the gate of layer {} has means, scales and weights of unlike numbers", l));
    }
    if (!file_.has(name("centre"))) {
      for (const auto& level : text_.exit->thresholds) {
        if (level[l] >= 0) Safetensors::damaged(fmt::format("layer {} has a threshold and no tensors", l));
      }
      return;
    }
    const auto hidden = file_.tensor(name("centre"), "F32", 1).shape[0];
    if (hidden < 1) bad(name("centre"), "has no values");
    if (gate.weights.size() != gate_features(text_.cache_free())) {
      Safetensors::damaged(fmt::format("the gate of layer {} has {} features; {} are expected", l, gate.weights.size(),
                                       gate_features(text_.cache_free())));
    }
    floats(name("centre"), {hidden});
    floats(name("translator"), {hidden, values_});
    if (!text_.cache_free()) bank(l, hidden);
  }

  /// What the cached neighbours are found by.
  void bank(std::size_t l, std::int64_t hidden) {
    const auto name = [l](const char* what) { return exit_tensor_name(l, what); };
    floats(name("states"), {entries_, hidden});
    floats(name("lengths"), {entries_});
    for (const float length : file_.values<float>(name("lengths"))) {
      if (!(length > 0)) bad(name("lengths"), fmt::format("has the value {}", length));
    }
    if (!file_.has(name("projection"))) return;
    const auto axes = file_.tensor(name("projection"), "F32", 2).shape[1];
    floats(name("projection"), {hidden, axes});
    floats(name("projected"), {entries_, axes});
  }

  const Safetensors& file_;
  const ProfileText& text_;
  std::int64_t entries_ = 0;
  std::int64_t values_ = 0;
  std::size_t seen_ = 0;
};

}  // namespace

std::string content_hash(std::string_view bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

std::string exit_tensor_name(std::size_t layer, const char* what) { return fmt::format("layers.{}.{}", layer, what); }

std::uintmax_t ProfileText::most_tensor_bytes() const {
  return std::uintmax_t{profile.bytes} + sizeof(std::uint64_t) + Safetensors::kMostHeaderBytes;
}

ProfileText parse_profile(std::string_view text, ContentHash content_hash) {
  const nlohmann::json parsed = parse_bounded_json(text, {.bytes = kMostProfileBytes, .depth = 6});
  const JsonObject json(parsed);
  check_format(json);
  if (content_hash == ContentHash::kChecked) check_content(text);
  ProfileText read;
  CalibrationProfile& profile = read.profile;
  profile.budget = budget_of(json.object("budget"));
  profile.early_exit = damage_of([&] { return early_exit_from_string(json.text("early_exit")); });
  profile.model_digest = json.text("model");
  profile.fitted = json.whole("fitted");
  profile.certified = json.whole("certified");
  profile.certified_error = json.number("certified_error", 0, kMostShare);
  if (json.has("reason")) profile.reason = json.text("reason");
  profile.error_bound = json.number("error_bound", 0, kMostShare);
  profile.expected_share = json.number("expected_share", 0, kMostShare);
  profile.expected_exits = json.numbers("expected_exits", 0, kMostShare);
  profile.typical_distance = json.number("typical_distance", 0, kAnyNumber);
  profile.bytes = static_cast<std::size_t>(json.whole("bytes"));
  if (json.has("exit_below")) profile.exit_below = json.whole("exit_below");
  if (json.has("reuse")) profile.reuse = choice_of(json.object("reuse"));
  if (json.has("verified")) profile.verified = read_verified(json.object("verified"));
  if (json.has("exit")) read.exit = exit_of(json.object("exit"));
  return read;
}

void check_exit_tensors(const Safetensors& tensors, const ProfileText& text) { TensorCheck(tensors, text).run(); }

}  // namespace llmcache
