#include "exit_pass.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "exit_sampler.h"

namespace llmcache {

ExitPass::ExitPass(ExitRules& rules, std::size_t sequences, bool background)
    : rules_(rules), background_(background), level_(rules.supervision.level()), sequences_(sequences) {}

bool ExitPass::watches(std::int32_t l) const {
  const auto layer = static_cast<std::size_t>(l);
  return layer < rules_.exit.layers.size() && rules_.exit.layers[layer].used();
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
  const auto proposal = rules_.exit.propose(static_cast<std::size_t>(l), means_of(own), rules_.scores);
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
    for (std::size_t k = sequence.tried; k < watched(); ++k) rules_.supervision.next(k, false);
  }
}

std::size_t ExitPass::watched() const { return std::min(level_ + 1, rules_.supervision.levels()); }

bool ExitPass::leaves(Sequence& sequence, std::size_t l, double expected, const at::Tensor& answer) {
  const auto& thresholds = rules_.exit.thresholds;
  if (rules_.supervision.levels() == 0) return expected <= thresholds[0][l];
  // A safer level proposes nothing before a more liberal one has.
  while (sequence.tried < watched() && expected <= thresholds[sequence.tried][l]) {
    const std::size_t level = sequence.tried++;
    const auto decision = rules_.supervision.next(level, true);
    if (decision.audit) sequence.trials.push_back({{level, decision}, answer});
    if (level < level_) {
      sequence.stays = sequence.stays || (decision.audit && !background_);
      continue;
    }
    if (decision.reuse && !sequence.stays && (!decision.audit || background_)) return true;
    sequence.stays = true;
  }
  return false;
}

}  // namespace llmcache
