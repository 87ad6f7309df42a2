#include "refresh/verified_json.h"

#include <fmt/core.h>

#include <limits>

#include "store/damaged_data.h"

namespace llmcache {

VerifiedEnvelope read_verified(const JsonObject& json) {
  constexpr std::size_t kMostCodes = 4096;
  VerifiedEnvelope verified;
  verified.tokens = json.whole("tokens");
  verified.rows = json.whole("rows");
  verified.padding = json.whole("padding");
  for (const std::int64_t code : json.wholes("codes", 0, std::numeric_limits<std::uint32_t>::max())) {
    if (!verified.codes.empty() && code <= verified.codes.back()) {
      throw DamagedData("the codes of what was verified do not rise");
    }
    if (verified.codes.size() == kMostCodes) {
      throw DamagedData(fmt::format("it has more than {} codes of what was verified", kMostCodes));
    }
    verified.codes.push_back(static_cast<std::uint32_t>(code));
  }
  return verified;
}

}  // namespace llmcache
