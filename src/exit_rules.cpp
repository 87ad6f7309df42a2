#include "exit_rules.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace llmcache {

std::size_t ExitRules::level() const {
  const auto open = std::find_if(gates.begin(), gates.end(), [](const auto& gate) { return gate->open(); });
  return static_cast<std::size_t>(open - gates.begin());
}

double record(ExitRules& rules, const std::vector<Trial>& trials, const at::Tensor& full) {
  double worst = 0;
  const auto expected = full.to(at::kFloat).reshape({1, -1});
  for (const Trial& trial : trials) {
    const double error = rules.exit.errors(trial.answer.reshape({1, -1}), expected, rules.scores).front();
    rules.gates[trial.level]->record(trial.decision, error);
    worst = std::max(worst, error);
  }
  return worst;
}

}  // namespace llmcache
