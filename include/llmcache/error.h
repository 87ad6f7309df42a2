// Errors of the library.
#pragma once

#include <stdexcept>
#include <string>

namespace llmcache {

/// What kind of thing went wrong; `to_string` gives its name.
enum class ErrorCode {
  kInvalidOptions,    ///< a field of Options, RequestOptions or Plan is out of range
  kInvalidInput,      ///< wrong number, type, rank, shape or device of a model input
  kUnsupportedModel,  ///< the model cannot be wrapped; the message says why
  kModelChanged,      ///< weights, dtype, device or mode changed after wrapping
  kModelFailed,       ///< the model itself raised an error; it is nested in this one
  kNotAvailable,      ///< asked for something that this model or version does not offer
  kInvalidFile,       ///< a file is missing, cannot be read, or is not what is expected
};

const char* to_string(ErrorCode code) noexcept;

/// Every error that the library itself raises. The message says what was found, what was
/// expected and what to do. A call that throws leaves the cache as it was.
/// Thread safety: as std::runtime_error.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message)
      : std::runtime_error(std::string(to_string(code)) + ": " + message), code_(code) {}

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace llmcache
