#include "reuse/tiers/tiers.h"

#include <c10/core/GradMode.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "execute/clock.h"
#include "llmcache/store/state_store.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// For looking through all keys of a store.
constexpr double kEraseMs = 60'000;
/// What a prefetch holds while it waits, about.
constexpr std::size_t kPrefetchBytes = std::size_t{64} << 10;
/// Of all that wait together.
constexpr std::size_t kMostPrefetchBytes = std::size_t{16} << 20;

}  // namespace

Tiers::Tiers(StoreOptions options, std::vector<std::unique_ptr<StoredPart>> parts, Cache cache)
    : options_(std::move(options)),
      parts_(std::move(parts)),
      cache_(std::move(cache)),
      queue_(options_.max_pending_write_bytes),
      fetching_(kMostPrefetchBytes) {
  if (!on()) return;
  for (const auto& part : parts_) layouts_.push_back(part->layout());
  identity_epoch_ = cache_.epoch();
  identity_ = cache_.identity();  // reads all weights once: not within a request
}

Tiers::~Tiers() {
  fetching_.stop();
  queue_.stop();
}

void Tiers::flush() {
  fetching_.flush();
  queue_.flush();
}

std::string Tiers::erase_tenant(const std::string& tenant, std::uint64_t epoch) {
  flush();
  std::set<std::string> prefixes;
  for (const auto& part : parts_) prefixes.insert(keys_of(*part, tenant, epoch).prefix());
  for (const std::string& prefix : prefixes) {
    const StoreOutcome outcome = options_.store->erase_prefix(prefix, store_deadline(kEraseMs));
    if (outcome != StoreOutcome::kDone) return fmt::format("{}: {}", options_.store->name(), to_string(outcome));
  }
  return {};
}

std::vector<std::vector<StoredRow>> Tiers::rows_of(const Call& call) const {
  std::vector<std::vector<StoredRow>> rows;
  for (const auto& part : parts_) rows.push_back(part->rows(call));
  return rows;
}

TierKeys Tiers::keys_of(const StoredPart& part, const std::string& tenant, std::uint64_t epoch) {
  std::string identity;
  {
    const std::lock_guard lock(mutex_);
    if (identity_epoch_ == epoch) identity = identity_;
  }
  if (identity.empty()) {
    identity = cache_.identity();
    const std::lock_guard lock(mutex_);
    identity_ = identity;
    identity_epoch_ = epoch;
  }
  std::size_t number = 0;
  while (parts_[number].get() != &part) ++number;
  const auto secret = options_.tenant_secrets.find(tenant);
  return {part.domain(), identity, layouts_[number], tenant,
          secret == options_.tenant_secrets.end() ? std::string_view() : std::string_view(secret->second)};
}

void Tiers::look_up(const Call& call, Answers& answers) {
  Stopwatch clock;
  LookUp look;
  look.epoch = call.dropped;
  try {
    look_up_all(look, rows_of(call));
  } catch (const std::exception&) {  // no memory: the request goes on without
    ++look.counts.failures;
  }
  for (const auto& [row, reason] : look.missed) answers.not_stored(row, reason);
  look.counts.wait_ms = clock.lap();
  answers.report().lookup_ms += look.counts.wait_ms;
  add(look.counts);
}

void Tiers::prefetch(const Call& call) {
  const auto fetch_rows = [this, rows = rows_of(call), epoch = call.dropped] {
    const c10::NoGradGuard no_grad;
    LookUp look;
    look.epoch = epoch;
    look.waits = false;
    try {
      look_up_all(look, rows);
    } catch (const std::exception&) {
      ++look.counts.failures;
    }
    add(look.counts);
  };
  StoreStats counts;
  if (fetching_.add(fetch_rows, kPrefetchBytes)) counts.prefetches = 1;
  add(counts);
}

void Tiers::look_up_all(LookUp& look, const std::vector<std::vector<StoredRow>>& rows) {
  std::set<std::int64_t> answered;  // rows whose whole output is there
  for (std::size_t p = 0; p < rows.size(); ++p) {
    for (const StoredRow& row : rows[p]) {
      if (answered.contains(row.row)) continue;
      bool whole = false;
      if (!look.over) {
        look.last = MissReason::kNew;
        look_up(look, *parts_[p], row, whole);
      }
      if (!parts_[p]->answers_rows()) continue;
      if (whole) answered.insert(row.row);
      if (!whole && look.last != MissReason::kNew) look.missed[row.row] = look.last;
    }
  }
}

/// `answered`: the bank knows all of the row now.
void Tiers::look_up(LookUp& look, const StoredPart& part, const StoredRow& row, bool& answered) {
  const std::int64_t known = part.known(row);
  answered = known >= row.tokens;
  if (answered) return;
  TierKeys keys = keys_of(part, row.tenant, look.epoch);
  std::vector<StoredPiece> pieces = part.pieces(row, options_.block_tokens, keys);
  std::erase_if(pieces, [known](const StoredPiece& piece) { return piece.end <= known; });
  if (pieces.empty()) return;
  ++look.counts.lookups;
  look.counts.tokens_wanted += static_cast<std::uint64_t>(pieces.back().end - std::max(known, pieces[0].begin));
  for (std::size_t at = 0; at < pieces.size() && !look.over;) {
    const std::size_t bytes = part.bytes(pieces[at].tokens());
    const std::size_t count = std::min(speed_.values_within(options_.deadline_ms, bytes), pieces.size() - at);
    const auto from = pieces.begin() + static_cast<std::ptrdiff_t>(at);
    const std::vector<StoredPiece> group(from, from + static_cast<std::ptrdiff_t>(count));
    const std::int64_t tokens = group.back().end - std::max(known, group[0].begin);
    if (look.waits && options_.only_if_faster && !speed_.worth(count * bytes, tokens)) {
      ++look.counts.not_worth;
      look.last = MissReason::kStoreNotWorth;
      return;
    }
    if (!fetch(look, part, row, group)) return;
    at += count;
  }
  answered = part.known(row) >= row.tokens;
}

/// Asks for pieces that follow one another. False: what comes behind them is of no use.
bool Tiers::fetch(LookUp& look, const StoredPart& part, const StoredRow& row, const std::vector<StoredPiece>& pieces) {
  std::vector<std::string> keys;
  for (const StoredPiece& piece : pieces) keys.push_back(piece.key);
  Stopwatch clock;
  const StoreValues found = options_.store->get(keys, store_deadline(options_.deadline_ms));
  const double ms = clock.lap();
  std::size_t bytes = 0;
  for (const auto& value : found.values) bytes += value ? value->size() : 0;
  if (found.outcome == StoreOutcome::kDone) {
    speed_.fetched(bytes, ms);
    speed_.found(!found.values.empty() && found.values[0].has_value());
  }
  look.counts.timeouts += found.outcome == StoreOutcome::kTimeout ? 1 : 0;
  look.counts.failures += found.outcome == StoreOutcome::kFailed || found.outcome == StoreOutcome::kRefused ? 1 : 0;
  look.over = found.outcome != StoreOutcome::kDone;
  if (look.over) {
    look.last = found.outcome == StoreOutcome::kTimeout ? MissReason::kStoreTimeout : MissReason::kStoreFailed;
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (i >= found.values.size() || !found.values[i]) {
      if (look.over) return false;
      ++look.counts.misses;
      look.last = MissReason::kStoreMiss;
      return false;
    }
    if (!take(look, part, row, pieces[i], *found.values[i])) return false;
  }
  return true;
}

bool Tiers::take(LookUp& look, const StoredPart& part, const StoredRow& row, const StoredPiece& piece,
                 const std::string& value) {
  auto outcome = StoredPart::Outcome::kNoRoom;
  try {
    const std::string_view entry = entry_of_tier_value(value, part.domain(), piece.key);
    if (!cache_.publish(look.epoch, [&] { outcome = part.take(row, piece, entry); })) {
      look.over = true;
      look.last = MissReason::kNew;
      return false;
    }
  } catch (const DamagedData&) {
    ++look.counts.damaged;
    look.last = MissReason::kStoreMiss;
    const auto forget = [this, key = piece.key] {
      static_cast<void>(options_.store->erase({&key, 1}, store_deadline(options_.write_deadline_ms)));
    };
    static_cast<void>(queue_.add(forget, piece.key.size()));
    return false;
  }
  if (outcome == StoredPart::Outcome::kNoRoom) {
    ++look.counts.no_room;
    return false;
  }
  if (outcome == StoredPart::Outcome::kTaken) {
    ++look.counts.hits;
    look.counts.tokens += static_cast<std::uint64_t>(piece.tokens());
    look.counts.bytes_read += value.size();
  }
  return true;
}

void Tiers::keep(const Call& call, const ForwardReport& report) {
  double ms = report.embed_ms + report.head_ms;
  for (const double layer : report.layer_ms) ms += layer;
  std::int64_t computed = 0;
  for (const SequenceReport& row : report.sequences) {
    computed += row.tokens - row.reused_tokens - row.shared_tokens + row.source_tokens - row.source_reused;
  }
  speed_.computed(computed, ms);
  try {
    const auto rows = rows_of(call);
    for (std::size_t p = 0; p < rows.size(); ++p) {
      for (const StoredRow& row : rows[p]) {
        const SequenceReport& made = report.sequences[static_cast<std::size_t>(row.row)];
        if (made.source != Source::kIdentical) keep(*parts_[p], row, parts_[p]->known_before(made), call.dropped);
      }
    }
  } catch (const std::exception&) {  // no memory: the answer is there all the same
    drop_writes();
  }
}

/// `before`: tokens that were known before the call.
void Tiers::keep(const StoredPart& part, const StoredRow& row, std::int64_t before, std::uint64_t epoch) {
  const std::int64_t known = part.known(row);
  if (known <= before) return;  // what the bank did not keep is not written either
  TierKeys keys = keys_of(part, row.tenant, epoch);
  const auto shared = std::make_shared<const StoredRow>(row);
  for (const StoredPiece& piece : part.pieces(row, options_.block_tokens, keys)) {
    if (piece.end <= before || piece.end > known) continue;
    {
      const std::lock_guard lock(mutex_);
      if (!under_way_.insert(piece.key).second) continue;
    }
    const auto work = [this, &part, shared, piece, epoch] { write(part, *shared, piece, epoch); };
    if (queue_.add(work, part.bytes(piece.tokens()))) continue;
    drop_writes();
    const std::lock_guard lock(mutex_);
    under_way_.erase(piece.key);
  }
}

void Tiers::write(const StoredPart& part, const StoredRow& row, const StoredPiece& piece, std::uint64_t epoch) {
  const c10::NoGradGuard no_grad;
  StoreStats counts;
  try {
    const StoreDeadline deadline = store_deadline(options_.write_deadline_ms);
    const std::vector<bool> there = options_.store->exists({&piece.key, 1}, deadline);
    std::string value;
    bool has = false;
    if (!there.empty() && there[0]) {
      counts.writes_known = 1;
    } else {
      value = begin_tier_value(piece.key);
      cache_.publish(epoch, [&] { has = part.append(value, row, piece); });
      counts.writes_dropped = 1;
    }
    if (has) {
      finish_tier_value(value, part.domain(), piece.key);
      const StoreItem item{piece.key, value};
      if (options_.store->put({&item, 1}, deadline) == StoreOutcome::kDone) {
        counts.writes_dropped = 0;
        counts.writes = 1;
        counts.bytes_written = value.size();
      }
    }
  } catch (const std::exception&) {
    counts.writes_dropped = 1;
  }
  add(counts);
  const std::lock_guard lock(mutex_);
  under_way_.erase(piece.key);
}

void Tiers::drop_writes() {
  const std::lock_guard lock(mutex_);
  ++stats_.writes_dropped;
}

void Tiers::add(const StoreStats& counts) {
  const std::lock_guard lock(mutex_);
  stats_.lookups += counts.lookups;
  stats_.tokens_wanted += counts.tokens_wanted;
  stats_.hits += counts.hits;
  stats_.tokens += counts.tokens;
  stats_.misses += counts.misses;
  stats_.timeouts += counts.timeouts;
  stats_.failures += counts.failures;
  stats_.not_worth += counts.not_worth;
  stats_.damaged += counts.damaged;
  stats_.no_room += counts.no_room;
  stats_.prefetches += counts.prefetches;
  stats_.writes += counts.writes;
  stats_.writes_known += counts.writes_known;
  stats_.writes_dropped += counts.writes_dropped;
  stats_.bytes_read += counts.bytes_read;
  stats_.bytes_written += counts.bytes_written;
  stats_.wait_ms += counts.wait_ms;
}

StoreStats Tiers::stats() const {
  StoreStats stats;
  if (!on()) return stats;
  {
    const std::lock_guard lock(mutex_);
    stats = stats_;
  }
  stats.waiting = queue_.waiting() + fetching_.waiting();
  stats.bytes_per_s = speed_.bytes_per_s();
  stats.compute_ms_per_token = speed_.compute_ms(1);
  stats.tiers = options_.store->stats();
  return stats;
}

}  // namespace llmcache
