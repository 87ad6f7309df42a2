#include "call_totals.h"

#include <numeric>

namespace llmcache {
namespace {

void add_times_of(const ForwardReport& report, CallTimes& times) {
  constexpr double kSeconds = 1e-3;  // of a millisecond
  const double engine_ms =
      report.embed_ms + report.head_ms + std::accumulate(report.layer_ms.begin(), report.layer_ms.end(), 0.0);
  times.lookup.add(kSeconds * report.lookup_ms);
  if (engine_ms > 0) times.engine.add(kSeconds * engine_ms);
  times.store.add(kSeconds * report.store_ms);
  times.total.add(kSeconds * report.total_ms);
}

/// Nothing that was reused for an answer is of use where the plain model's took its place.
SequenceReport replaced(const SequenceReport& sequence) {
  SequenceReport plain = sequence;
  plain.source = Source::kComputed;
  plain.reused_tokens = plain.source_reused = 0;
  for (LayerTokens& layer : plain.layers) layer = {layer.computed + layer.reused, 0};
  return plain;
}

void add_sequences_of(const ForwardReport& report, Stats& sums) {
  sums.sequences += report.sequences.size();
  for (const SequenceReport& told : report.sequences) {
    const SequenceReport sequence = report.replaced ? replaced(told) : told;
    ++sums.sequences_from[static_cast<std::size_t>(sequence.source)];
    sums.identical_hits += sequence.source == Source::kIdentical ? 1 : 0;
    sums.prefix_hits += sequence.source == Source::kPrefix ? 1 : 0;
    sums.tokens += static_cast<std::uint64_t>(sequence.tokens);
    sums.tokens_reused += static_cast<std::uint64_t>(sequence.reused_tokens);
    sums.source_tokens += static_cast<std::uint64_t>(sequence.source_tokens);
    sums.source_reused += static_cast<std::uint64_t>(sequence.source_reused);
    if (!sequence.layers.empty()) sums.tokens_computed += static_cast<std::uint64_t>(sequence.layers.front().computed);
    for (const LayerTokens& layer : sequence.layers) {
      sums.layer_tokens_computed += static_cast<std::uint64_t>(layer.computed);
      sums.layer_tokens_reused += static_cast<std::uint64_t>(layer.reused);
    }
  }
}

}  // namespace

void CallTotals::add(const ForwardReport& report) noexcept {
  const std::lock_guard lock(mutex_);
  ++sums_.requests;
  add_sequences_of(report, sums_);
  sums_.padding_skipped += static_cast<std::uint64_t>(report.padding_skipped);
  sums_.balance.add(report);
  add_times_of(report, sums_.times);
}

void CallTotals::fill(Stats& stats) const {
  const std::lock_guard lock(mutex_);
  stats.requests = sums_.requests;
  stats.sequences = sums_.sequences;
  stats.identical_hits = sums_.identical_hits;
  stats.prefix_hits = sums_.prefix_hits;
  stats.tokens = sums_.tokens;
  stats.tokens_reused = sums_.tokens_reused;
  stats.source_tokens = sums_.source_tokens;
  stats.source_reused = sums_.source_reused;
  stats.tokens_computed = sums_.tokens_computed;
  stats.padding_skipped = sums_.padding_skipped;
  stats.sequences_from = sums_.sequences_from;
  stats.layer_tokens_computed = sums_.layer_tokens_computed;
  stats.layer_tokens_reused = sums_.layer_tokens_reused;
  stats.balance = sums_.balance;
  stats.times = sums_.times;
}

}  // namespace llmcache
