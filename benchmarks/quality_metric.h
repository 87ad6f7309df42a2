// Quality of a model's outputs on a workload as one number, and how far caching moved it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "statistics.h"

namespace llmcache::bench {

enum class Metric {
  kAccuracy,               ///< share of sequences whose class the probe names right
  kChoiceAccuracy,         ///< share of requests whose right choice has the largest summed log-likelihood
  kChoiceAccuracyPerByte,  ///< the same, of sums divided by the choices' lengths in bytes
  kPerplexity,             ///< exp(negative log-likelihood a token)
  kAnswerNll,              ///< negative log-likelihood of the gold answers, nats a token
  kSpearman,               ///< rank correlation of predicted and gold similarity
  kF1,                     ///< mean F1 of the words of answers that are found in a passage
  kExactMatch,             ///< share of these answers that are a gold answer
};

/// "accuracy", "choice_accuracy" and so on.
const char* to_string(Metric metric) noexcept;

/// What one request contributes. Accuracies and exact match: number right, number scored. F1: F1, 1. Perplexity and
/// answer NLL: negative log-likelihood, tokens. Spearman: predicted, gold.
struct Sample {
  double value = 0;
  double weight = 0;
};

/// The metric over all samples; NaN for none.
double metric_value(Metric metric, const std::vector<Sample>& samples);

/// A metric with caching, without, and the difference.
struct Comparison {
  double value = 0;
  double baseline = 0;  ///< NaN: not measured
  double change = 0;    ///< value - baseline, in the metric's own unit
  Interval ci95;        ///< of the change
};

/// `baseline` has the samples of the same requests, in the same order, without caching; or is empty:
/// then only the value is measured. The interval is a paired percentile bootstrap (Efron and
/// Tibshirani 1993, chapter 13): 1,000 times as many requests are drawn with replacement, the same
/// for both sides. The seed is fixed: equal samples give equal intervals.
Comparison compare(Metric metric, const std::vector<Sample>& samples, const std::vector<Sample>& baseline);

}  // namespace llmcache::bench
