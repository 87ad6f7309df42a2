// Prompts of passages in changing order: what segment reuse is for.
#pragma once

#include <random>

#include "support.h"

namespace llmcache::test {

/// A budget that prompts of passages calibrate: of the last token, wide enough for tiny models.
inline Options passage_budget(double audit_rate = 0) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kTokenAgreement, 0.4, 0.2};
  options.budget.audit_rate = audit_rate;
  return options;
}

/// Each call makes a prompt: the beginning of a passage, three of four passages of 40 tokens in any order, and a few
/// tokens behind them that no other has.
class PassagePrompts {
 public:
  explicit PassagePrompts(const ModelInfo& info)
      : info_(info), passages_(right_padded(info, {40, 40, 40, 40}, 77).ids()) {}

  Inputs operator()() {
    std::vector<at::Tensor> parts = {passages_[0].narrow(0, 0, 8)};
    for (int i = 0; i < 3; ++i) parts.push_back(passages_[static_cast<std::int64_t>(random_() % 4)]);
    parts.push_back(right_padded(info_, {6}, random_() % 100000).ids()[0]);
    const auto ids = at::cat(parts).unsqueeze(0);
    return {ids, at::ones_like(ids)};
  }

  std::vector<Inputs> sample(int prompts = 300) {
    std::vector<Inputs> all;
    for (int i = 0; i < prompts; ++i) all.push_back((*this)());
    return all;
  }

 private:
  ModelInfo info_;
  at::Tensor passages_;
  std::mt19937_64 random_{5};
};

}  // namespace llmcache::test
