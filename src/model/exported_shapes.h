// For which sizes of its inputs an exported program holds.
#pragma once

#include <string>
#include <vector>

#include "model/exported_json.h"
#include "model/exported_program.h"

namespace llmcache::exported {

/// For each of `inputs`, which are what the program takes, the numbers of tokens that it holds for. `graph` is the
/// program's. Inputs that a guard is about together are of one group. Throws Refused where it does not hold for all
/// batches, or for short texts; DamagedData.
std::vector<TokenRange> token_ranges(const Json& program, const Json& graph, const std::vector<std::string>& inputs);

}  // namespace llmcache::exported
