#include "exit_rules.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace llmcache {
namespace {

std::vector<AskedAudit> audits_of(const std::vector<Trial>& trials) {
  std::vector<AskedAudit> audits;
  for (const Trial& trial : trials) audits.push_back(trial.audit);
  return audits;
}

}  // namespace

double record(ExitRules& rules, const std::vector<Trial>& trials, const at::Tensor& full, AuditPlace place) {
  const auto expected = full.to(at::kFloat).reshape({1, -1});
  std::vector<double> errors;  // of all, before any is told: a trial counts as made or as failed, never as both
  for (const Trial& trial : trials) {
    errors.push_back(rules.exit.errors(trial.answer.reshape({1, -1}), expected, rules.scores).front());
  }
  for (std::size_t i = 0; i < trials.size(); ++i) rules.supervision.record(trials[i].audit, errors[i], place);
  return errors.empty() ? 0 : *std::max_element(errors.begin(), errors.end());
}

void fail(ExitRules& rules, const std::vector<Trial>& trials, AuditPlace place, const std::exception_ptr& thrown) {
  rules.supervision.fail(audits_of(trials), place, thrown);
}

void drop(ExitRules& rules, const std::vector<Trial>& trials) { rules.supervision.drop(audits_of(trials)); }

}  // namespace llmcache
