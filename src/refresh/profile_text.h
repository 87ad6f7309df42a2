// What the two files of a calibration profile say, checked value by value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "llmcache/refresh/calibration.h"
#include "refresh/logistic.h"
#include "store/safetensors.h"

namespace llmcache {

constexpr int kProfileVersion = 2;
constexpr const char* kProfileFormat = "llmcache calibration";
constexpr std::size_t kMostProfileBytes = std::size_t{16} << 20;  ///< of the JSON

/// JSON that is no calibration profile, or one of another version; the text is to follow the file's name.
class ForeignProfile : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An ExitModel without its tensors.
struct ExitText {
  std::string tensors_xxh3;  ///< content_hash() of the file that has them
  std::vector<std::vector<double>> thresholds;
  std::vector<LogisticModel> gates;  ///< one a layer
};

struct ProfileText {
  CalibrationProfile profile;  ///< but for `exit`
  std::optional<ExitText> exit;

  [[nodiscard]] bool cache_free() const { return profile.early_exit == EarlyExit::kCacheFree; }
  /// The file with its tensors has at most that many bytes.
  [[nodiscard]] std::uintmax_t most_tensor_bytes() const;
};

/// As both files name it: XXH3, 16 hexadecimal digits.
std::string content_hash(std::string_view bytes);

/// Whether the content must have the hash that the text names.
enum class ContentHash { kChecked, kIgnored };

/// Throws ForeignProfile, or DamagedData if anything in the text is not as CalibrationProfile::save() writes it: a
/// field that is missing, of another type, or out of its range.
ProfileText parse_profile(std::string_view text, ContentHash content_hash = ContentHash::kChecked);

/// Throws DamagedData if tensors are missing, left over, of shapes that do not fit each other or the text, or have
/// values that are not finite or make no sense.
void check_exit_tensors(const Safetensors& tensors, const ProfileText& text);

/// "layers.L.WHAT"
std::string exit_tensor_name(std::size_t layer, const char* what);

}  // namespace llmcache
