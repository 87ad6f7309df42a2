// Runs the chosen models on the chosen workloads and measures.
#pragma once

#include <string>
#include <vector>

#include "config.h"
#include "records.h"
#include "selection.h"

namespace llmcache::bench {

struct Results {
  std::vector<Record> records;
  std::vector<WrapCost> wraps;
  std::vector<std::string> failures;  ///< one line each; what was measured before is in `records`
};

/// Sets the number of threads of the process and runs everything, a model at a time. A model that fails is reported and
/// the others go on. Shows progress on stderr.
Results run(const Configuration& configuration, const std::vector<Selected>& selected);

}  // namespace llmcache::bench
