#include "llmcache/report.h"

#include <fmt/core.h>

namespace llmcache {

const char* to_string(Source source) noexcept {
  switch (source) {
    case Source::kComputed:
      return "computed";
    case Source::kIdentical:
      return "identical";
    case Source::kPrefix:
      return "prefix";
    case Source::kPartial:
      return "partial";
    case Source::kSimilar:
      return "similar";
    case Source::kEarlyExit:
      return "early exit";
  }
  return "unknown";
}

const char* to_string(Execution execution) noexcept {
  switch (execution) {
    case Execution::kNone:
      return "none";
    case Execution::kDense:
      return "dense";
    case Execution::kPacked:
      return "packed";
  }
  return "unknown";
}

double ForwardReport::computed_fraction() const noexcept {
  double computed = 0;
  double all = 0;
  for (const SequenceReport& sequence : sequences) {
    for (const LayerTokens& layer : sequence.layers) {
      computed += layer.computed;
      all += layer.computed + layer.reused;
    }
  }
  return all == 0 ? 0 : computed / all;
}

std::string ForwardReport::to_string() const {
  std::string text = fmt::format(
      "{} execution, {:.2f} ms: look-up {:.3f}, embed {:.2f}, head {:.2f}, store {:.3f}; {:.1f} % of token-layers "
      "computed\n",
      llmcache::to_string(execution), total_ms, lookup_ms, embed_ms, head_ms, store_ms, 100 * computed_fraction());
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const SequenceReport& sequence = sequences[i];
    std::int64_t computed = 0;
    std::int64_t reused = 0;
    for (const LayerTokens& layer : sequence.layers) {
      computed += layer.computed;
      reused += layer.reused;
    }
    text += fmt::format("  sequence {}: {} tokens, {}, token-layers computed {}, reused {}", i, sequence.tokens,
                        llmcache::to_string(sequence.source), computed, reused);
    if (sequence.source == Source::kSimilar) {
      text += fmt::format("; similarity {:.4f} to sequence number {}, went on at layer {}", sequence.similarity,
                          sequence.entry, sequence.resumed_layer);
    }
    if (sequence.source == Source::kPrefix) {
      text += fmt::format("; {} tokens known, which go on at layer {}", sequence.reused_tokens, sequence.resumed_layer);
    }
    if (sequence.source == Source::kEarlyExit) {
      text += fmt::format("; left in front of layer {}, expected error {:.4f}", sequence.resumed_layer,
                          sequence.expected_error);
    }
    if (sequence.shared_tokens > 0) text += fmt::format("; {} shared with another row", sequence.shared_tokens);
    if (sequence.shadowed) text += fmt::format("; checked, drift {:.4f}", sequence.drift);
    text += "\n";
  }
  for (std::size_t l = 0; l < layer_ms.size(); ++l) text += fmt::format("  layer {}: {:.3f} ms\n", l, layer_ms[l]);
  return text;
}

double Stats::hit_rate() const noexcept {
  std::uint64_t hits = identical_hits + prefix_hits + similar_hits;
  if (budget) hits += budget->early_exits + budget->token_reuses + budget->segment_reuses;
  return sequences == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(sequences);
}

std::string Stats::to_string() const {
  auto text = fmt::format(
      "{} requests, {} sequences, {} identical, {} prefix and {} similar hits ({:.1f} %); {} tokens, {} reused, {} "
      "computed, {} of padding "
      "skipped; "
      "{} entries in {} bytes (peak {}), {} insertions, {} evictions, {} rejected",
      requests, sequences, identical_hits, prefix_hits, similar_hits, 100 * hit_rate(), tokens, tokens_reused,
      tokens_computed, padding_skipped, entries, bytes, peak_bytes, insertions, evictions, rejected);
  if (unusable_states > 0) text += fmt::format("; {} sequences with unusable states", unusable_states);
  if (budget) {
    text += fmt::format(
        "\n  budget: {}; {} early exits, {} token and {} segment reuses; level {} of {}, {} audits with {} errors, {} "
        "closings, {} reopenings, banks "
        "of {} "
        "bytes",
        budget->calibrated ? "calibrated" : "not calibrated", budget->early_exits, budget->token_reuses,
        budget->segment_reuses, budget->level, budget->levels, budget->audits, budget->audit_errors, budget->closings,
        budget->reopenings, budget->bytes);
    if (budget->audits_failed > 0) {
      text += fmt::format("; {} audits failed, the latest: {}", budget->audits_failed, budget->audit_failure);
    }
    if (budget->audits_dropped > 0) text += fmt::format("; {} audits dropped", budget->audits_dropped);
    if (budget->calibrating_bytes > 0) text += fmt::format("; calibrating in {} bytes", budget->calibrating_bytes);
  }
  for (const LayerStats& l : layers) {
    text += fmt::format(
        "\n  layer {}: tau {:.4f}, {} hits, {} entries in {} bytes, {} insertions, {} evictions, {} rejected, {} "
        "expired, "
        "{} decayed; {} checks, {} dropped, {} other decisions, drift mean {:.4f} max {:.4f}",
        l.layer, l.tau, l.hits, l.entries, l.bytes, l.insertions, l.evictions, l.rejected, l.expired, l.decayed,
        l.checks, l.dropped, l.decision_changes, l.relative_drift_mean, l.relative_drift_max);
  }
  return text;
}

}  // namespace llmcache
