#include "reuse/early_exit/exit_pass.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "reuse/early_exit/exit_sampler.h"

namespace llmcache {

ExitPolicy::ExitPolicy(ExitModel exit_, ScoreFunction scores_, std::int64_t below_, AuditFailures& failures,
                       const std::vector<RiskGate::Settings>& gates)
    : SupervisedPolicy(
          [this](const at::Tensor& answer, const at::Tensor& full) {
            const auto row = [](const at::Tensor& values) { return values.to(at::kFloat).reshape({1, -1}); };
            return exit.errors(row(answer), row(full), scores).front();
          },
          failures, gates),
      exit(std::move(exit_)),
      scores(std::move(scores_)),
      below(below_) {}

ExitPass::ExitPass(ExitPolicy& policy, std::size_t sequences, bool background)
    : policy_(policy),
      background_(background),
      threshold_index_(policy.supervision.threshold_index()),
      sequences_(sequences) {}

bool ExitPass::watches(std::int32_t l) const {
  const auto layer = static_cast<std::size_t>(l);
  return layer < policy_.exit.layers.size() && policy_.exit.layers[layer].used();
}

std::vector<std::size_t> ExitPass::at_layer(std::int32_t l, const std::vector<at::Tensor>& states) {
  std::vector<std::size_t> running;
  std::vector<at::Tensor> own;
  for (std::size_t i = 0; i < states.size(); ++i) {
    if (!states[i].defined() || sequences_[i].stays) continue;
    running.push_back(i);
    own.push_back(states[i]);
  }
  std::vector<std::size_t> leaving;
  if (running.empty()) return leaving;
  const auto proposal = policy_.exit.propose(static_cast<std::size_t>(l), means_of(own), policy_.scores);
  for (std::size_t j = 0; j < running.size(); ++j) {
    Sequence& sequence = sequences_[running[j]];
    const auto answer = proposal.answers[static_cast<std::int64_t>(j)];
    if (!leaves(sequence, static_cast<std::size_t>(l), proposal.expected[j], answer)) continue;
    sequence.left = l;
    sequence.answer = answer;
    sequence.expected = proposal.expected[j];
    leaving.push_back(running[j]);
  }
  return leaving;
}

void ExitPass::close() {
  for (const Sequence& sequence : sequences_) {
    for (std::size_t k = sequence.tried; k < watched(); ++k) policy_.supervision.next(k, false);
  }
}

std::size_t ExitPass::watched() const { return std::min(threshold_index_ + 1, policy_.supervision.thresholds()); }

bool ExitPass::leaves(Sequence& sequence, std::size_t l, double expected, const at::Tensor& answer) {
  const auto& thresholds = policy_.exit.thresholds;
  if (policy_.supervision.thresholds() == 0) return expected <= thresholds[0][l];
  // A safer threshold proposes nothing before a more liberal one has.
  while (sequence.tried < watched() && expected <= thresholds[sequence.tried][l]) {
    const std::size_t index = sequence.tried++;
    const auto decision = policy_.supervision.next(index, true);
    if (decision.audit) sequence.audits.push_back({{index, decision}, answer});
    if (index < threshold_index_) {
      sequence.stays = sequence.stays || (decision.audit && !background_);
      continue;
    }
    if (decision.reuse && !sequence.stays && (!decision.audit || background_)) return true;
    sequence.stays = true;
  }
  return false;
}

}  // namespace llmcache
