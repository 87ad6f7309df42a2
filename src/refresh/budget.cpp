#include "llmcache/refresh/budget.h"

#include <fmt/core.h>

#include "llmcache/error.h"
#include "llmcache/refresh/calibration.h"
#include "refusal.h"

namespace llmcache {

const char* to_string(BudgetMetric metric) noexcept {
  switch (metric) {
    case BudgetMetric::kDecision:
      return "decision";
    case BudgetMetric::kRelativeError:
      return "relative";
    case BudgetMetric::kTokenAgreement:
      return "token";
  }
  return "unknown";
}

BudgetMetric budget_metric_from_string(const std::string& text) {
  for (const auto metric : {BudgetMetric::kDecision, BudgetMetric::kRelativeError, BudgetMetric::kTokenAgreement}) {
    if (text == to_string(metric)) return metric;
  }
  refuse_options(fmt::format("'{}' is no metric of an error budget; known are decision, relative, token", text));
}

const char* to_string(EarlyExit early_exit) noexcept {
  switch (early_exit) {
    case EarlyExit::kOff:
      return "off";
    case EarlyExit::kCachedNeighbour:
      return "neighbour";
    case EarlyExit::kCacheFree:
      return "cache-free";
  }
  return "unknown";
}

EarlyExit early_exit_from_string(const std::string& text) {
  for (const auto early_exit : {EarlyExit::kOff, EarlyExit::kCachedNeighbour, EarlyExit::kCacheFree}) {
    if (text == to_string(early_exit)) return early_exit;
  }
  refuse_options(fmt::format("'{}' is no kind of early exit; known are off, neighbour, cache-free", text));
}

void Budget::validate() const {
  if (static_cast<int>(metric) < 0 || static_cast<int>(metric) > static_cast<int>(BudgetMetric::kTokenAgreement)) {
    refuse_options(fmt::format("Budget.metric is {}, which is no BudgetMetric", static_cast<int>(metric)));
  }
  if (!(epsilon > 0 && epsilon <= 0.5))
    refuse_options(fmt::format("Budget.epsilon is {}; above 0, at most 0.5 is expected", epsilon));
  if (!(delta > 0 && delta < 1)) refuse_options(fmt::format("Budget.delta is {}; above 0, below 1 is expected", delta));
}

void BudgetOptions::validate(std::int64_t layers) const {
  budget.validate();
  if (static_cast<int>(early_exit) < 0 || static_cast<int>(early_exit) > static_cast<int>(EarlyExit::kCacheFree)) {
    refuse_options(fmt::format("BudgetOptions.early_exit is {}, which is no EarlyExit", static_cast<int>(early_exit)));
  }
  if (static_cast<int>(format) < 0 || static_cast<int>(format) > static_cast<int>(BankFormat::kInt8)) {
    refuse_options(fmt::format("BudgetOptions.format is {}, which is no BankFormat", static_cast<int>(format)));
  }
  for (std::size_t i = 0; i < exit_layers.size(); ++i) {
    if (exit_layers[i] < 0 || (layers > 0 && exit_layers[i] >= layers) ||
        (i > 0 && exit_layers[i] <= exit_layers[i - 1])) {
      refuse_options(
          fmt::format("BudgetOptions.exit_layers names layer {}; ascending layers of the model, from 0, are expected",
                      exit_layers[i]));
    }
  }
  if (!(capacity_share >= 0 && capacity_share <= 1)) {
    refuse_options(fmt::format("BudgetOptions.capacity_share is {}; 0 to 1 is expected", capacity_share));
  }
  if (!(audit_rate >= 0 && audit_rate <= 1)) {
    refuse_options(fmt::format("BudgetOptions.audit_rate is {}; 0 to 1 is expected", audit_rate));
  }
}

std::string CalibrationProfile::to_string() const {
  std::string text = fmt::format("budget: {} error at most {} with confidence {}\n", llmcache::to_string(budget.metric),
                                 budget.epsilon, 1 - budget.delta);
  text += fmt::format("model: {}\n", model_digest);
  text += fmt::format("sample: {} sequences fitted, {} others to certify\n", fitted, certified);
  if (!reuses()) return text + fmt::format("nothing is reused beyond lossless: {}\n", reason);
  text += fmt::format("certified: error {:.4f}, at most {:.4f} with that confidence\n", certified_error, error_bound);
  if (reuses_states()) {
    text += fmt::format("{} ({}, distance up to {:g}): {:.1f} % of token-layers computed\n", reuse->mechanism,
                        reuse->setting, reuse->match_threshold, 100 * reuse->computed);
    if (reuse->least_tokens > 0) {
      text += fmt::format("  for sequences of {} tokens or more, error {:.4f}, at most {:.4f} of all traffic\n",
                          reuse->least_tokens, reuse->error, reuse->bound);
    }
  }
  if (!exit) return text;
  const std::string whose = exit_below > 0 ? fmt::format(" below {} tokens", exit_below) : std::string();
  text += fmt::format("early exit{} ({}): {:.1f} % of sequences, {:.1f} MiB\n", whose, llmcache::to_string(early_exit),
                      100 * expected_share, static_cast<double>(bytes) / (1 << 20));
  for (std::size_t l = 0; l < expected_exits.size(); ++l) {
    if (expected_exits[l] > 0) text += fmt::format("  in front of layer {}: {:.1f} %\n", l, 100 * expected_exits[l]);
  }
  return text;
}

}  // namespace llmcache
