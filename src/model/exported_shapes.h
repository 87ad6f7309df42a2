// For which sizes of its inputs an exported program holds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/exported_json.h"

namespace llmcache::exported {

/// The largest number of tokens that the program holds for; 0: any. `graph` is the program's, `inputs` names what it
/// takes. Throws Refused where it does not hold for all batches, or for short texts; DamagedData.
std::int64_t token_range(const Json& program, const Json& graph, const std::vector<std::string>& inputs);

}  // namespace llmcache::exported
