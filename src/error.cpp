#include "llmcache/error.h"

namespace llmcache {

const char* to_string(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidOptions:
      return "invalid options";
    case ErrorCode::kInvalidInput:
      return "invalid input";
    case ErrorCode::kUnsupportedModel:
      return "unsupported model";
    case ErrorCode::kModelChanged:
      return "model changed";
    case ErrorCode::kModelFailed:
      return "model failed";
    case ErrorCode::kInvalidFile:
      return "invalid file";
    case ErrorCode::kNotAvailable:
      return "not available";
  }
  return "unknown error";
}

}  // namespace llmcache
