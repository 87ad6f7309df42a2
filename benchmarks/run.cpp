#include "run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "setup.h"

namespace llmcache::bench {
namespace {

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

/// Sum of the one divided by the sum of the other; NaN without values.
double ratio_of_sums(const std::vector<double>& one, const std::vector<double>& other) {
  return one.empty() || other.empty() ? kNotMeasured : sum(one) / sum(other);
}

const Run* find(const std::vector<Run>& all, const char* mode, const std::string& weights) {
  const auto found = std::ranges::find_if(
      all, [&](const Run& run) { return run.config.mode == mode && run.config.weights == weights; });
  return found == all.end() ? nullptr : &*found;
}

/// Wilson's interval of a share of errors; of other errors the normal one of their mean.
ObservedError observed(const std::vector<double>& errors, BudgetMetric metric) {
  const auto n = static_cast<std::int64_t>(errors.size());
  const double value = mean(errors);
  if (metric != BudgetMetric::kRelativeError) {
    return {{value, wilson(std::llround(value * static_cast<double>(n)), n), n}};
  }
  double squares = 0;
  for (const double error : errors) squares += (error - value) * (error - value);
  const double half = 1.96 * std::sqrt(squares) / static_cast<double>(n);
  return {{value, {std::max(0.0, value - half), value + half}, n}};
}

std::string why_slower(const Record& r, const std::vector<double>& plain) {
  const double cost = r.latency_ms.mean - mean(plain);
  const double tokens = static_cast<double>(r.tokens) / static_cast<double>(r.requests);
  const bool hits = r.hit_rate > 0 || r.tokens_reused_fraction > 0;
  return fmt::format("{}: {:.2f} ms a request of {:.0f} tokens, which the model takes {:.1f} ms for",
                     hits ? "hits save less than looking up and keeping costs"
                          : "nothing repeats, so what is left is the cost of looking up and keeping",
                     cost, tokens, mean(plain));
}

/// Times of prompts and of single tokens, against nocache and kvcache.
void describe_decoding(const Run& run, const Run* plain, const Run* kvcache, const Setup& setup, Record& r) {
  LaterTurns later = {.turns = static_cast<std::int64_t>(run.later_prefills.size()),
                      .prefill_ms = summarize(run.later_prefills)};
  r.prefill_ms = summarize(run.prefills);
  if (plain != nullptr) {
    r.prefill_speedup_vs_nocache = ratio_of_sums(plain->prefills, run.prefills);
    later.speedup_vs_nocache = ratio_of_sums(plain->later_prefills, run.later_prefills);
  }
  if (kvcache != nullptr) {
    r.speedup_vs_kvcache = ratio_of_sums(kvcache->latencies, run.latencies);
    r.prefill_speedup_vs_kvcache = ratio_of_sums(kvcache->prefills, run.prefills);
    later.speedup_vs_kvcache = ratio_of_sums(kvcache->later_prefills, run.later_prefills);
  }
  if (run.config.chooses_output()) {
    r.tokens_reused_fraction = ratio(run.tokens_reused, run.prompt_tokens);
    r.tokens_shared_fraction = ratio(run.tokens_shared, run.prompt_tokens);
    later.tokens_reused_fraction = ratio(run.later_tokens_reused, run.later_prompt_tokens);
  }
  if (later.turns > 0) r.later_turns = later;
  if (plain != nullptr && &run != plain && (setup.generates() || setup.compares_greedy()) && run.config.exact())
    r.greedy = run.greedy.result();
  if (!setup.generates()) return;
  if (!run.decodes.empty()) r.decode_ms = summarize(run.decodes);
  r.tokens_per_second = run.said / (sum(run.latencies) / 1000);
}

void judge(const Run& run, const Run* plain, const Setup& setup, Record& r) {
  const auto result = [&](Metric metric, std::vector<Sample> Run::*samples) {
    return compare(metric, run.*samples, plain != nullptr ? plain->*samples : std::vector<Sample>{});
  };
  if (setup.scorer().metric() && !run.samples.empty()) r.task = result(*setup.scorer().metric(), &Run::samples);
  if (setup.scorer().second_metric() && !run.second_samples.empty()) {
    r.second_task = result(*setup.scorer().second_metric(), &Run::second_samples);
  }
  if (!run.config.keeps()) return;
  if (setup.task() == Task::kDuplicates) {
    r.task = Comparison{.metric = "precision", .value = run.served.precision()};
    r.recall = run.served.recall();
    r.unsafe_served = {.rate = run.served.unsafe(), .unlabelled = run.served.unlabelled()};
  }
  if (setup.task() == Task::kAnswer) r.same_answer = run.served.same_answer();
}

}  // namespace

void GreedyCount::compare(std::int64_t sequence, std::int64_t first, const at::Tensor& reference,
                          const at::Tensor& logits) {
  const auto chosen = best_tokens(logits);
  const auto wanted = best_tokens(reference);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    if (chosen[i] != wanted.at(i)) compare(sequence, first + row, reference[row], chosen[i]);
    if (chosen[i] == wanted[i]) ++result_.compared;
  }
}

bool GreedyCount::compare(std::int64_t sequence, std::int64_t token, const at::Tensor& reference, std::int64_t chosen) {
  ++result_.compared;
  const std::int64_t best = best_tokens(reference.unsqueeze(0)).front();
  if (chosen == best) return true;
  const double gap = (reference[best].to(at::kDouble) - reference[chosen].to(at::kDouble)).item<double>();
  ++result_.different;
  result_.tied += gap <= kTiedLogits ? 1 : 0;
  if (result_.differences.size() < GreedyResult::kListed) result_.differences.push_back({sequence, token, gap});
  return false;
}

void Run::count(const std::vector<Answer>& answers, const Call& prompt, std::int64_t turn) {
  const Answer& first = answers.front();
  const std::int64_t length = tokens_of(prompt.rows);
  for (const Answer& answer : answers) {
    verify_ms += answer.verify_ms;
    tokens_computed += answer.tokens_computed;
  }
  prefills.push_back(first.ms);
  prompt_tokens += length;
  tokens_reused += first.tokens_reused;
  tokens_shared += first.tokens_shared;
  asked += static_cast<std::int64_t>(first.served_from.size());
  hits += std::ranges::count_if(first.served_from, [](auto from) { return from != ServedCounts::kNotServed; });
  if (turn == 0) return;
  later_prefills.push_back(first.ms);
  later_prompt_tokens += length;
  later_tokens_reused += first.tokens_reused;
}

void Run::keep(const Scores& scores) {
  if (scores.first) samples.push_back(*scores.first);
  if (scores.second) second_samples.push_back(*scores.second);
}

Record record_of(const Run& run, const std::vector<Run>& all, const Setup& setup, Record r) {
  const Run* plain = find(all, "nocache", "as-loaded");
  const Run* kvcache = find(all, "kvcache", run.config.weights);
  r.mode = run.config.mode;
  if (run.config.chooses_output()) r.output = setup.output();
  r.requests = static_cast<std::int64_t>(run.latencies.size());
  r.sequences = run.asked;
  r.tokens = run.tokens;
  r.tokens_computed_fraction = run.tokens_computed / static_cast<double>(run.tokens);
  r.latency_ms = summarize(run.latencies);
  r.verification_ms = run.verify_ms;
  r.hit_rate = ratio(run.hits, run.asked);
  if (plain != nullptr) {
    std::vector<double> ratios;
    for (std::size_t i = 0; i < run.latencies.size(); ++i) ratios.push_back(plain->latencies[i] / run.latencies[i]);
    r.speedup_vs_nocache = ratio_of_sums(plain->latencies, run.latencies);
    r.speedup_median = median(std::move(ratios));
    const Summary divergence = summarize(run.divergences);
    r.divergence = {.mean = divergence.mean, .p95 = divergence.p95, .max = divergence.max};
  }
  if (setup.generates() || (setup.decoder() && (run.config.exact() || run.config.epsilon))) {
    describe_decoding(run, plain, kvcache, setup, r);
  }
  run.system->describe(r);
  if (r.weights_held != to_string(Weights::kPackedInt8)) r.weights_sample.clear();
  if (!run.errors.empty()) r.observed_error = observed(run.errors, setup.calibration().metric());
  if (!run.config.keeps()) r.filled = 0;
  if (setup.judged()) judge(run, plain, setup, r);
  if (plain != nullptr && r.speedup_vs_nocache < 1) r.note = why_slower(r, plain->latencies);
  return r;
}

}  // namespace llmcache::bench
