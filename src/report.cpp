#include "llmcache/report.h"

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "units.h"

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

const char* to_string(MissReason reason) noexcept {
  switch (reason) {
    case MissReason::kNew:
      return "new";
    case MissReason::kEvicted:
      return "evicted";
    case MissReason::kExpired:
      return "expired";
    case MissReason::kNotWorth:
      return "not worth it";
    case MissReason::kOverBudget:
      return "over budget";
    case MissReason::kOutput:
      return "output";
    case MissReason::kNotLookedUp:
      return "not looked up";
    case MissReason::kAudit:
      return "audit";
    case MissReason::kFallback:
      return "fallback";
    case MissReason::kOwnQuota:
      return "own quota";
    case MissReason::kOtherTenant:
      return "other tenant";
    case MissReason::kStoreMiss:
      return "store miss";
    case MissReason::kStoreTimeout:
      return "store timeout";
    case MissReason::kStoreFailed:
      return "store failed";
    case MissReason::kStoreNotWorth:
      return "store not worth it";
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

namespace {

/// Token-layers of a sequence, or of layer `l` of all.
LayerTokens sum_of(const std::vector<LayerTokens>& layers) {
  LayerTokens sum;
  for (const LayerTokens& layer : layers) {
    sum.computed += layer.computed;
    sum.reused += layer.reused;
  }
  return sum;
}

/// Groups what follows one another and is alike.
template <class Item, class Alike>
std::vector<std::pair<std::size_t, std::size_t>> runs_of(const std::vector<Item>& items, const Alike& alike) {
  std::vector<std::pair<std::size_t, std::size_t>> runs;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (!runs.empty() && alike(items[runs.back().first], items[i])) {
      runs.back().second = i;
    } else {
      runs.emplace_back(i, i);
    }
  }
  return runs;
}

/// "layer 3" or "layers 3 to 7".
std::string numbers_text(const char* what, std::pair<std::size_t, std::size_t> run) {
  if (run.first == run.second) return fmt::format("{} {}", what, run.first);
  return fmt::format("{}s {} to {}", what, run.first, run.second);
}

}  // namespace

std::string ForwardReport::summary() const {
  std::int64_t tokens = 0;
  std::int64_t known = 0;
  std::map<std::string, std::size_t> sources;
  for (const SequenceReport& sequence : sequences) {
    tokens += sequence.tokens;
    known += sequence.reused_tokens;
    ++sources[llmcache::to_string(sequence.source)];
  }
  std::string rows;
  for (const auto& [source, count] : sources) rows += fmt::format("{}{} {}", rows.empty() ? "" : ", ", count, source);
  auto text = fmt::format("{} row{} ({}), {} tokens, {} known, {:.0f} % of the work computed {}; {:.2f} ms",
                          sequences.size(), sequences.size() == 1 ? "" : "s", rows, tokens, known,
                          100 * computed_fraction(), llmcache::to_string(execution), total_ms);
  if (execution == Execution::kNone) {
    text = fmt::format("{} row{} ({}), {} tokens, nothing computed; {:.2f} ms", sequences.size(),
                       sequences.size() == 1 ? "" : "s", rows, tokens, total_ms);
  }
  std::int64_t source = 0;
  std::int64_t source_known = 0;
  for (const SequenceReport& sequence : sequences) {
    source += sequence.source_tokens;
    source_known += sequence.source_reused;
  }
  if (source > 0) text += fmt::format("; {} of {} source tokens not computed", source_known, source);
  if (verified) text += fmt::format(" ({:.2f} ms of it to verify)", verify_ms);
  if (!fallback.empty()) text += "; fallback: " + fallback;
  return text;
}

std::string ForwardReport::to_string() const {
  const double layers_ms = std::accumulate(layer_ms.begin(), layer_ms.end(), 0.0);
  std::string text = summary() + "\n";
  text += fmt::format(
      "  time: look-up {:.3f} ms, before the layers {:.2f} ms, layers {:.2f} ms, after them {:.2f} ms, storing {:.3f} "
      "ms\n",
      lookup_ms, embed_ms, layers_ms, head_ms, store_ms);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const SequenceReport& sequence = sequences[i];
    const LayerTokens sum = sum_of(sequence.layers);
    text += fmt::format("  row {}: {} tokens, {}; computed in {} token-layers of {}", i, sequence.tokens,
                        llmcache::to_string(sequence.source), sum.computed, sum.computed + sum.reused);
    if (sequence.source == Source::kSimilar) {
      text += fmt::format("; similarity {:.4f} to sequence number {}, went on at layer {}", sequence.similarity,
                          sequence.entry, sequence.resumed_layer);
    }
    if (sequence.source == Source::kPrefix) {
      text += fmt::format("; {} tokens known", sequence.reused_tokens);
      if (sequence.resumed_layer > 0)
        text += fmt::format(", which run through layers below {} again", sequence.resumed_layer);
    }
    if (sequence.source == Source::kEarlyExit) {
      text += fmt::format("; left in front of layer {}, expected error {:.4f}", sequence.resumed_layer,
                          sequence.expected_error);
    }
    if (sequence.evicted_tokens > 0) text += fmt::format("; {} were known once", sequence.evicted_tokens);
    if (sequence.miss != MissReason::kNew) {
      text += fmt::format("; not reused: {}", llmcache::to_string(sequence.miss));
    }
    if (sequence.shared_tokens > 0) text += fmt::format("; {} shared with another row", sequence.shared_tokens);
    if (sequence.audited) text += fmt::format("; audited, error {:.4f}", sequence.error);
    text += "\n";
  }
  for (const auto& run : runs_of(layer_ms, [](double a, double b) { return (a == 0) == (b == 0); })) {
    const double ms = std::accumulate(layer_ms.begin() + static_cast<std::ptrdiff_t>(run.first),
                                      layer_ms.begin() + static_cast<std::ptrdiff_t>(run.second) + 1, 0.0);
    text +=
        "  " + numbers_text("layer", run) + (ms == 0 ? std::string(": not run\n") : fmt::format(": {:.3f} ms\n", ms));
  }
  return text;
}

namespace {

/// Real tokens of an approximated sequence that at least one layer was spared, without those that were known.
std::int64_t spared_tokens(const SequenceReport& sequence) noexcept {
  const bool approximated = sequence.source == Source::kPartial || sequence.source == Source::kSimilar ||
                            sequence.source == Source::kEarlyExit;
  if (!approximated || sequence.layers.empty()) return 0;
  const auto fewest = std::ranges::min_element(sequence.layers, {}, &LayerTokens::computed)->computed;
  const std::int64_t open = sequence.tokens - sequence.reused_tokens - sequence.shared_tokens;
  return std::clamp<std::int64_t>(open - fewest, 0, open);
}

/// True: it is the reason of all tokens of a sequence, those that were evicted once among them.
bool says_more(MissReason reason) noexcept {
  return reason == MissReason::kFallback || reason == MissReason::kAudit || reason == MissReason::kStoreTimeout ||
         reason == MissReason::kStoreFailed;
}

}  // namespace

void TokenBalance::add(const ForwardReport& report) noexcept {
  const auto count = [](auto& part, std::int64_t tokens) { part += static_cast<std::uint64_t>(tokens); };
  const auto because = [&](MissReason reason) -> auto& { return computed_because[static_cast<std::size_t>(reason)]; };
  for (const SequenceReport& sequence : report.sequences) {
    count(requested, sequence.tokens);
    if (report.replaced) {  // nothing of it was used
      count(because(MissReason::kFallback), sequence.tokens);
      continue;
    }
    const std::int64_t spared = spared_tokens(sequence);
    const bool identical = sequence.source == Source::kIdentical;
    count(reused_from[static_cast<std::size_t>(identical ? Source::kIdentical : Source::kPrefix)],
          sequence.reused_tokens);
    if (spared > 0) count(reused_from[static_cast<std::size_t>(sequence.source)], spared);
    count(shared, sequence.shared_tokens);
    const std::int64_t computed = sequence.tokens - sequence.reused_tokens - sequence.shared_tokens - spared;
    const std::int64_t evicted = says_more(sequence.miss) ? 0 : std::min(sequence.evicted_tokens, computed);
    count(because(sequence.evicted_because), evicted);
    count(because(sequence.miss), computed - evicted);
  }
}

std::uint64_t TokenBalance::reused() const noexcept {
  return std::accumulate(reused_from.begin(), reused_from.end(), shared);
}

std::uint64_t TokenBalance::computed() const noexcept {
  return std::accumulate(computed_because.begin(), computed_because.end(), std::uint64_t{0});
}

double Stats::hit_rate() const noexcept {
  std::uint64_t hits = identical_hits + prefix_hits + similar_hits;
  if (budget) hits += budget->early_exits + budget->token_reuses + budget->segment_reuses;
  return sequences == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(sequences);
}

namespace {

void add_budget(const BudgetStats& budget, std::uint64_t sequences, std::string& text) {
  text +=
      fmt::format("budget: {}; {} early exits, {} token and {} segment reuses of {} sequences; {} in banks\n",
                  budget.calibrated ? "calibrated" : "not calibrated, so nothing is reused within it",
                  budget.early_exits, budget.token_reuses, budget.segment_reuses, sequences, size_text(budget.bytes));
  text += fmt::format(
      "  supervision: threshold {} of {}, {} audits with {:g} errors, closed {} and opened again {} times\n",
      budget.threshold_index, budget.thresholds, budget.audits, budget.audit_errors, budget.closings,
      budget.reopenings);
  if (budget.audits_failed > 0) {
    text += fmt::format("  {} audits failed, the latest: {}\n", budget.audits_failed, budget.audit_failure);
  }
  if (budget.audits_dropped > 0) text += fmt::format("  {} audits dropped\n", budget.audits_dropped);
  if (budget.calibrating_bytes > 0) text += fmt::format("  calibrating in {}\n", size_text(budget.calibrating_bytes));
}

void add_store(const StoreStats& store, std::string& text) {
  text += fmt::format("stores:    asked for {} rows; {} entries of {} tokens came, {} were not there, {} damaged; ",
                      store.lookups, store.hits, store.tokens, store.misses, store.damaged);
  text += fmt::format("{} timeouts, {} failures, {} not worth it; {} entries written, {} dropped\n", store.timeouts,
                      store.failures, store.not_worth, store.writes, store.writes_dropped);
  for (const TierStats& tier : store.tiers) {
    if (!tier.last_failure.empty()) {
      text += fmt::format("  {}: {}, the latest failure: {}\n", tier.name, tier.open ? "left alone" : "works",
                          tier.last_failure);
    }
  }
}

/// Why tokens were computed, the commonest reason first; empty: none were.
std::string computed_text(const TokenBalance& balance) {
  std::vector<std::pair<std::uint64_t, std::size_t>> reasons;
  for (std::size_t i = 0; i < kMissReasons; ++i) reasons.emplace_back(balance.computed_because[i], i);
  std::ranges::stable_sort(reasons, std::greater(), [](const auto& reason) { return reason.first; });
  std::string text;
  for (const auto& [tokens, i] : reasons) {
    if (tokens == 0) break;
    text += fmt::format("{}{} {}", text.empty() ? "computed:  " : ", ", tokens, to_string(static_cast<MissReason>(i)));
  }
  return text.empty() ? text : text + "\n";
}

std::string layer_line(const LayerStats& l) {
  return fmt::format(
      "tau {:.4f}, {} hits, {} entries in {}, {} insertions, {} evictions, {} rejected, {} expired, {} decayed; {} "
      "audits, {} dropped, {} other decisions, error mean {:.4f}, largest {:.4f}",
      l.tau, l.hits, l.entries, size_text(l.bytes), l.insertions, l.evictions, l.rejected, l.expired, l.decayed,
      l.audits, l.dropped, l.decision_changes, l.relative_error_mean, l.relative_error_max);
}

}  // namespace

std::uint64_t SnapshotReport::entries() const noexcept {
  std::uint64_t sum = 0;
  for (const SnapshotPartReport& part : parts) sum += part.entries;
  return sum;
}

std::uint64_t SnapshotReport::tokens() const noexcept {
  std::uint64_t sum = 0;
  for (const SnapshotPartReport& part : parts) sum += part.tokens;
  return sum;
}

std::string SnapshotReport::summary() const {
  if (!refused.empty()) return fmt::format("nothing of '{}', because {}", path, refused);
  auto text = fmt::format("'{}', {} in {:.0f} ms:", path, size_text(bytes), ms);
  for (const SnapshotPartReport& part : parts) {
    text += fmt::format(" {} {}", part.entries, part.name);
    if (part.tokens > 0) text += fmt::format(" of {} tokens", part.tokens);
    if (part.left > 0) text += fmt::format(" ({} left, because {})", part.left, part.why);
    text += ";";
  }
  text.pop_back();
  return text;
}

std::string Stats::to_string() const {
  std::uint64_t hits = identical_hits + prefix_hits + similar_hits;
  if (budget) hits += budget->early_exits + budget->token_reuses + budget->segment_reuses;
  auto text = fmt::format("requests:  {}, of {} sequences\n", requests, sequences);
  text += fmt::format("hits:      {}: {} identical, {} prefix, {} similar", share_text(hits, sequences), identical_hits,
                      prefix_hits, similar_hits);
  text += budget ? fmt::format(", {} within the budget\n",
                               budget->early_exits + budget->token_reuses + budget->segment_reuses)
                 : std::string("\n");
  text += fmt::format("tokens:    {}; known {}, computed {}; {} of padding not computed\n", tokens,
                      share_text(tokens_reused, tokens), tokens_computed, padding_skipped);
  text += computed_text(balance);
  if (source_tokens > 0) {
    text +=
        fmt::format("sources:   {} tokens, not computed {}\n", source_tokens, share_text(source_reused, source_tokens));
  }
  text += fmt::format(
      "memory:    {} in {} entries, at most {} so far; {} insertions, {} evictions, {} not kept for want of room\n",
      size_text(bytes), entries, size_text(peak_bytes), insertions, evictions, rejected);
  for (const TenantClassStats& tenant : tenants) {
    text += fmt::format("tenants:   {}: {} in {} entries\n", tenant.name, size_text(tenant.bytes), tenant.entries);
  }
  if (pins > 0) text += fmt::format("pinned:    {} prefixes in {}\n", pins, size_text(pinned_bytes));
  if (unusable_states > 0) text += fmt::format("not kept:  {} sequences with unusable states\n", unusable_states);
  if (budget) add_budget(*budget, sequences, text);
  for (const auto& run :
       runs_of(layers, [](const LayerStats&a, const LayerStats&b) { return layer_line(a) == layer_line(b); })) {
    const auto number = [&](std::size_t i) { return static_cast<std::size_t>(layers[i].layer); };
    text +=
        numbers_text("layer", {number(run.first), number(run.second)}) + ": " + layer_line(layers[run.first]) + "\n";
  }
  for (const FallbackStats& fallback : fallbacks) {
    text += fmt::format("fallback:  {}: {} requests were served in a plainer way, the latest because {}\n",
                        fallback.mechanism, fallback.count, fallback.last_reason);
  }
  if (verification.checks > 0 || !verification.closed.empty()) {
    text += fmt::format("verified:  {} answers compared with the plain model, {} differed\n", verification.checks,
                        verification.mismatches);
    for (const std::string& closed : verification.closed) text += "  closed: " + closed + "\n";
  }
  if (!store.tiers.empty()) add_store(store, text);
  if (!snapshot.loaded.path.empty()) text += "loaded:    " + snapshot.loaded.summary() + "\n";
  if (snapshot.saves > 0) text += fmt::format("saved:     {} times\n", snapshot.saves);
  if (snapshot.failed > 0) {
    text += fmt::format("not saved: {} times, the latest because {}\n", snapshot.failed, snapshot.failure);
  }
  return text;
}

}  // namespace llmcache
