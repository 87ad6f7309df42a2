// Reuse within a stated error budget (Fidelity::kBudget): what is promised, and how it is kept.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "llmcache/bank/format.h"

namespace at {
class Tensor;
}  // namespace at

namespace llmcache {

/// What the error of a reused answer is. An answer that was computed in full has the error 0.
enum class BudgetMetric {
  /// 1 if its decision differs from that of the full model's answer, else 0. The decision is the place of the largest
  /// score (BudgetOptions::scores).
  kDecision,
  /// Distance to the full model's answer, divided by the mean distance between answers to different inputs (of the
  /// calibration sample), at most 1.
  kRelativeError,
  /// Decoders: 1 if the token with the largest logit behind the last token differs, else 0.
  kTokenAgreement,
};

/// "decision", "relative", "token".
const char* to_string(BudgetMetric metric) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
BudgetMetric budget_metric_from_string(const std::string& text);

/// The promise: with confidence 1 - delta (over the draw of the calibration sample) the mean error among *all* requests
/// that are served, reused or not, is at most epsilon, as long as traffic is like the sample.
struct Budget {
  BudgetMetric metric = BudgetMetric::kDecision;
  double epsilon = 0.01;  ///< above 0, at most 0.5. Default: one answer of a hundred
  double delta = 0.1;     ///< above 0, below 1

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// Scores of classes from outputs: `[n, values]` to `[n, classes]`, row by row; at least two classes. Called from any
/// thread that calls forward, and must always answer alike.
using ScoreFunction = std::function<at::Tensor(const at::Tensor& outputs)>;

/// Scores of a linear classifier in the layout of nn.Linear: outputs * weight^T + bias. `weight`: float `[classes,
/// values]`; `bias`: `[classes]`, or undefined for none. Throws Error(kInvalidOptions) for other shapes.
ScoreFunction linear_scores(const at::Tensor& weight, const at::Tensor& bias);
ScoreFunction linear_scores(const at::Tensor& weight);

/// Early exit: a sequence with one pooled output leaves the pass at the first layer whose answer is good enough.
enum class EarlyExit {
  kOff,
  /// The answer of the most similar kept sequence, corrected by what their states differ in.
  kCachedNeighbour,
  /// The answer that a regression makes from the state alone: for comparison.
  kCacheFree,
};

/// "off", "neighbour", "cache-free".
const char* to_string(EarlyExit early_exit) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
EarlyExit early_exit_from_string(const std::string& text);

/// Settings of Fidelity::kBudget. What is reused, and how readily, LayerCache::calibrate() finds out; without a
/// calibration nothing is reused beyond kLossless. Banks of early exits are made of the calibration sample, and serve
/// all tenants: calibrate on what all of them may be answered from. Token states are kept for each tenant apart.
struct BudgetOptions {
  Budget budget = {};

  /// Makes scores of classes from a pooled output: a linear classifier behind an embedding model, say. Empty (default):
  /// the output is its own scores. For kDecision; for kRelativeError it helps to tell easy inputs.
  ScoreFunction scores = {};

  /// For models with one pooled output a sequence. Default: with the cached neighbour.
  EarlyExit early_exit = EarlyExit::kCachedNeighbour;

  /// Layers in front of which sequences may leave, ascending, from 0 (before any layer has run). Empty (default): the
  /// calibration takes those where looking for an answer saves more time than it costs, as it measures both.
  std::vector<std::int64_t> exit_layers = {};

  /// Reuse of token states between near-identical sequences of an encoder: an edited document, a passage under another
  /// question, a fixed instruction before changing text. Default: if the calibration finds it cheaper than early exits.
  bool token_reuse = true;

  /// Reuse of keys and values of passages and edited prompts in a causal decoder, beyond exact prefixes; for outputs
  /// kAll and kLastToken. Default: as far as the calibration allows.
  bool segment_reuse = true;

  /// How states of tokens are held for reuse: int8 takes 0.28 of float32's bytes. What it costs is part of what the
  /// calibration measures. Where it rounds, nothing that is reused counts as exact, a known beginning of a decoder's
  /// request neither (Source::kPartial). Default: as they were computed.
  BankFormat format = BankFormat::kAsComputed;

  /// Part of Options::capacity_bytes that calibrated banks may take, 0 to 1; the rest keeps whole outputs, and keys
  /// and values of known prefixes. Default 0.7.
  double capacity_share = 0.7;

  /// Share of reused answers that are computed in full too, 0 to 1, while nothing speaks against the calibration; more
  /// are as soon as something does. 0 switches the supervision off: the promise then rests on the calibration alone.
  /// After a sudden drift some 1 / audit_rate wrong answers are served before one is noticed. Default 0.05.
  double audit_rate = 0.05;

  /// False (default): an audited answer is the full computation's, made within the call. True: the reused answer is
  /// returned, and a thread of the cache's own computes it in full afterwards: after a drift more wrong answers are
  /// served until a level is closed.
  bool background_audit = false;

  /// Chooses what is audited. Any value; default 0.
  std::uint64_t seed = 0;

  /// Throws Error(kInvalidOptions) that names the field at fault. `layers`: of the model, 0 if not known.
  void validate(std::int64_t layers = 0) const;
};

}  // namespace llmcache
