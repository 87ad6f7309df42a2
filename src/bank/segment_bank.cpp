#include "bank/segment_bank.h"

#include <c10/core/InferenceMode.h>
#include <xxhash.h>

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "bank/tensor_bytes.h"

namespace llmcache {
namespace {

/// What values and scales take beside their data.
constexpr std::size_t kStatesOverhead = sizeof(StoredStates) + 2 * kTensorOverhead;
/// What an entry takes beside states, tokens and partition, with its places in index, policy and ledger.
constexpr std::size_t kSegmentBeside = sizeof(SegmentEntry) + 512;

/// Does `part` have most of the tokens of `run`? Then what stands around it there is no passage of its own.
bool is_most_of(const BlockMatch& part, const BlockMatch& run) {
  const std::size_t begin = std::max(part.begin, run.begin);
  const std::size_t end = std::min(part.begin + part.tokens, run.begin + run.tokens);
  return begin < end && 5 * (end - begin) >= 4 * run.tokens;
}

}  // namespace

SegmentEntry::SegmentEntry(std::string_view partition, std::span<const std::int64_t> tokens, SegmentOrigin origin,
                           const std::vector<KeySpec>& specs, BankFormat format, std::pmr::memory_resource* memory)
    : specs_(specs),
      format_(format),
      partition_(partition, memory),
      tokens_(tokens.begin(), tokens.end(), memory),
      origin_(origin),
      stored_(specs.size()) {}

bool SegmentEntry::complete() const noexcept {
  return std::ranges::all_of(stored_, [](const StoredStates& states) { return states.bytes() > 0; });
}

SegmentEntry::Form SegmentEntry::form_of(const KeySpec& spec, std::int64_t tokens) {
  Form form{spec.sizes, spec.token_dim};
  const auto dim = static_cast<std::size_t>(spec.token_dim);
  form.sizes[dim] = tokens;
  if (dim + 1 != form.sizes.size()) return form;
  std::rotate(form.sizes.begin(), form.sizes.end() - 1, form.sizes.end());
  form.token_dim = 0;
  return form;
}

void SegmentEntry::set(std::size_t i, const at::Tensor& state) {
  // A tensor made in inference mode could not be used outside of it.
  const c10::InferenceMode normal(false);
  // Scales belong to groups of the last dimension: where that is the tokens', they come first.
  const auto dim = specs_[i].token_dim;
  const bool last = dim == state.dim() - 1;
  stored_[i] = StoredStates::encode(last ? state.detach().movedim(dim, 0) : state.detach(), last ? 0 : dim, format_);
}

at::Tensor SegmentEntry::state(std::size_t i, std::int64_t begin, std::int64_t count) const {
  const auto own = stored_[i].rows(begin, count);
  return stored_[i].token_dim() == specs_[i].token_dim ? own : own.movedim(0, specs_[i].token_dim);
}

SegmentBank::SegmentBank(Settings settings)
    : CapacityBank(settings.capacity_bytes, settings.eviction, settings.total),
      settings_(std::move(settings)),
      pending_(settings_.capacity_bytes),
      entries_(&memory_),
      index_(settings_.ids_per_token, settings_.block_tokens, tokens_of_slot(), &memory_),
      means_(settings_.ids_per_token, settings_.block_tokens, tokens_of_slot(), &memory_) {}

BlockHashIndex::Tokens SegmentBank::tokens_of_slot() {
  return [this](std::uint32_t slot) {
    const SegmentEntry& entry = *entries_[slot];
    return BlockHashIndex::Sequence{entry.partition(), entry.tokens()};
  };
}

/// Runs of a request, ascending, without overlap: of whole sequences, or of means where these have most of a run.
std::vector<BlockMatch> SegmentBank::runs(const BlockHashIndex::Sequence& request,
                                          const BlockHashIndex::Wanted& wanted) const {
  // Where a mean's tokens stand in the sequence that its positions are of is not known to its index.
  auto means = wanted.moved ? means_.segments(request, wanted) : std::vector<BlockMatch>{};
  std::vector<BlockMatch> all = index_.segments(request, wanted);
  // Of a longer run a mean's part is left as it is: there the surroundings are the request's too.
  std::erase_if(means, [&](const BlockMatch& mean) {
    return std::ranges::any_of(all,
                               [&](const BlockMatch& run) { return is_most_of(run, mean) && !is_most_of(mean, run); });
  });
  std::erase_if(all, [&](const BlockMatch& run) {
    return std::ranges::any_of(means, [&](const BlockMatch& mean) { return is_most_of(mean, run); });
  });
  all.insert(all.end(), means.begin(), means.end());
  std::ranges::sort(all, {}, &BlockMatch::begin);
  std::size_t taken = wanted.from;
  for (BlockMatch& run : all) {
    const std::size_t less = std::min(run.tokens, taken - std::min(taken, run.begin));
    run.begin += less;
    run.donor_begin += less;
    run.tokens -= less;
    taken = std::max(taken, run.begin + run.tokens);
  }
  std::erase_if(all, [&](const BlockMatch& run) { return run.tokens < wanted.least; });
  return all;
}

std::vector<SegmentHit> SegmentBank::find(std::string_view partition, std::span<const std::int64_t> tokens,
                                          const Wanted& wanted, double now_s) {
  const BlockHashIndex::Sequence request{partition, tokens};
  std::vector<SegmentHit> hits;
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto add = [&](const BlockMatch& match, bool exact) {
    hits.push_back({static_cast<std::int64_t>(match.begin), entries_[match.slot],
                    static_cast<std::int64_t>(match.donor_begin), static_cast<std::int64_t>(match.tokens), exact});
    if (wanted.use) touch(match.slot, now_s);
  };
  const BlockMatch prefix = index_.prefix(request);
  if (prefix.tokens > 0) add(prefix, true);
  const auto least = static_cast<std::size_t>(std::max<std::int64_t>(wanted.least, 1));
  for (const BlockMatch& match : runs(request, {prefix.tokens, least, wanted.moved})) add(match, false);
  return hits;
}

/// Empty if it is more than the capacity.
std::optional<std::size_t> SegmentBank::entry_bytes(std::size_t tokens) const {
  std::size_t bytes = 0;
  for (const KeySpec& spec : settings_.specs) {
    const SegmentEntry::Form form = SegmentEntry::form_of(spec, static_cast<std::int64_t>(tokens));
    bytes += StoredStates::bytes_for(form.sizes, spec.options, settings_.format) + kStatesOverhead;
    if (bytes > account_.limit()) return std::nullopt;
  }
  return bytes;
}

SegmentBank::Room SegmentBank::reserve(std::string_view partition, std::span<const std::int64_t> tokens) {
  try {
    const std::lock_guard lock(mutex_);
    drop_aged();
    if (index_.prefix({partition, tokens}).tokens == tokens.size() / settings_.ids_per_token) return {};
  } catch (const std::bad_alloc&) {
    return {nullptr, true};
  }
  return reserve_mean(partition, tokens, {});
}

SegmentBank::Room SegmentBank::reserve_mean(std::string_view partition, std::span<const std::int64_t> tokens,
                                            SegmentOrigin origin) {
  try {
    const auto bytes = entry_bytes(tokens.size() / settings_.ids_per_token);
    if (!bytes) return {nullptr, true};
    auto pending = std::make_unique<SegmentEntry>(partition, tokens, origin, settings_.specs, settings_.format,
                                                  std::pmr::new_delete_resource());
    auto reserved = Reservation::of(pending_, *bytes);
    if (!reserved) return {nullptr, true};
    pending->reserved_ = std::move(*reserved);
    return {std::move(pending), false};
  } catch (const std::exception&) {
    return {nullptr, true};
  }
}

void SegmentBank::insert(Room room, double saved_ms, double now_s) {
  if (room.refused) return reject();
  if (!room.pending || !room.pending->complete()) return;
  try {
    insert_pending(*room.pending, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory
    reject();
  }
}

void SegmentBank::insert_mean(Room mean, const SegmentEntry& replaced, double saved_ms, double now_s) {
  if (mean.refused) return reject();
  if (!mean.pending || !mean.pending->complete()) return;
  try {
    insert_pending_mean(*mean.pending, replaced, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory
    reject();
  }
}

void SegmentBank::insert_pending(SegmentEntry& pending, double saved_ms, double now_s) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const BlockMatch known = index_.prefix({pending.partition(), pending.tokens()});
  if (known.tokens == tokens_of(pending)) return;  // somebody was faster
  const bool replaces = is_whole(known);
  const SegmentEntry* const entry = take_over(pending, saved_ms, now_s);
  if (entry == nullptr) return;
  ++insertions_;
  if (replaces) replace_by(known, *entry);
}

/// True if it is all of a sequence.
bool SegmentBank::is_whole(const BlockMatch& known) const {
  return known.tokens > 0 && known.tokens == tokens_of(*entries_[known.slot]);
}

/// A whole sequence that `entry`, which is kept now, begins with. Nothing happens if it was evicted for room on the
/// way: the slot may be the new entry's own.
void SegmentBank::replace_by(const BlockMatch& known, const SegmentEntry& entry) noexcept {
  if (!policy_.contains(known.slot)) return;
  const SegmentEntry& old = *entries_[known.slot];
  if (&old != &entry && tokens_of(old) == known.tokens) replace(known.slot);
}

void SegmentBank::insert_pending_mean(SegmentEntry& pending, const SegmentEntry& replaced, double saved_ms,
                                      double now_s) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  if (replaced.is_mean()) {
    if (!slot_of(replaced)) return;  // somebody was faster
  } else {
    const BlockMatch whole{0, 0, 0, tokens_of(pending)};
    const auto means = means_.segments({pending.partition(), pending.tokens()}, {});
    if (std::ranges::any_of(means, [&](const BlockMatch& known) { return is_most_of(known, whole); })) return;
  }
  if (take_over(pending, saved_ms, now_s) == nullptr || !replaced.is_mean()) return;
  if (const auto slot = slot_of(replaced)) replace(*slot);  // unless it was evicted for room
}

std::vector<std::weak_ptr<const SegmentEntry>> SegmentBank::listed() {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto slots = policy_.order();
  std::vector<std::weak_ptr<const SegmentEntry>> all;
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) all.emplace_back(entries_[*slot]);
  return all;
}

bool SegmentBank::knows(std::string_view partition, std::span<const std::int64_t> tokens, const SegmentOrigin& origin) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  if (origin.averaged <= 1) return index_.prefix({partition, tokens}).tokens == tokens.size() / settings_.ids_per_token;
  // The index of means finds the longest, which need not be this one.
  for (std::uint32_t slot = 0; slot < entries_.end_slot(); ++slot) {
    const auto* const held = entries_.find(slot);
    if (held == nullptr || !(*held)->is_mean() || (*held)->partition() != partition) continue;
    if (std::ranges::equal((*held)->tokens(), tokens)) return true;
  }
  return false;
}

std::optional<std::size_t> SegmentBank::bytes_for(std::string_view partition,
                                                  std::span<const std::int64_t> tokens) const {
  const auto bytes = entry_bytes(tokens.size() / settings_.ids_per_token);
  if (!bytes) return std::nullopt;
  return *bytes + tokens.size_bytes() + partition.size() + kSegmentBeside;
}

std::weak_ptr<const SegmentEntry> SegmentBank::restore(std::string_view partition, std::span<const std::int64_t> tokens,
                                                       const SegmentOrigin& origin, std::vector<StoredStates> states,
                                                       double saved_ms, double now_s) {
  try {
    const auto bytes = entry_bytes(tokens.size() / settings_.ids_per_token);
    if (!bytes) return {};
    SegmentEntry pending(partition, tokens, origin, settings_.specs, settings_.format, std::pmr::new_delete_resource());
    pending.stored_ = std::move(states);
    const std::size_t beside = tokens.size_bytes() + partition.size() + kSegmentBeside;
    const std::lock_guard lock(mutex_);
    drop_aged();
    if (!fits(partition, *bytes, beside)) return {};
    auto reserved = make_room(partition, *bytes, beside, now_s);
    if (!reserved) return {};
    const BlockMatch known = origin.averaged > 1 ? BlockMatch{} : index_.prefix({partition, tokens});
    const bool replaces = is_whole(known);
    const auto entry = make_entry(pending, *reserved);
    insert_indexed(entry, saved_ms, now_s);
    insertions_ += entry->is_mean() ? 0 : 1;
    if (replaces) replace_by(known, *entry);
    return entry;
  } catch (const std::bad_alloc&) {
    return {};
  }
}

bool SegmentBank::lossless() const noexcept {
  return std::ranges::all_of(settings_.specs, [this](const KeySpec& spec) {
    return StoredStates::lossless(c10::typeMetaToScalarType(spec.options.dtype()), settings_.format);
  });
}

void SegmentBank::use(const SegmentEntry& entry, double now_s) {
  const std::lock_guard lock(mutex_);
  if (const auto slot = slot_of(entry)) touch(*slot, now_s);
}

void SegmentBank::replace(std::uint32_t slot) noexcept {
  remove(slot);
  ++contents_.replaced;
}

/// Makes an entry of the states that are pending, and evicts for it; null, and counted as rejected, if there is no
/// room.
const SegmentEntry* SegmentBank::take_over(SegmentEntry& pending, double saved_ms, double now_s) {
  const std::size_t beside = pending.tokens().size_bytes() + pending.partition().size() + kSegmentBeside;
  auto reserved = make_room(pending.partition(), pending.reserved_.bytes(), beside, now_s);
  std::shared_ptr<SegmentEntry> entry;
  const bool kept = reserved && take_evicting(pending.partition(), now_s, [&] {
                      if (!entry) entry = make_entry(pending, *reserved);
                      insert_indexed(entry, saved_ms, now_s);
                    });
  if (kept) return entry.get();
  ++rejected_;
  if (!pending.is_mean()) {
    add_evicted_prefixes(evicted_, pending.partition(), pending.tokens(), settings_.ids_per_token, 0, refused_);
  }
  return nullptr;
}

/// Takes the states and what is reserved for them, unless it throws.
std::shared_ptr<SegmentEntry> SegmentBank::make_entry(SegmentEntry& pending, Reservation& reserved) {
  const std::pmr::polymorphic_allocator<SegmentEntry> allocator(&memory_);
  auto entry = std::allocate_shared<SegmentEntry>(allocator, pending.partition(), pending.tokens(), pending.origin(),
                                                  settings_.specs, settings_.format, &memory_);
  entry->reserved_ = std::move(reserved);
  entry->stored_.swap(pending.stored_);
  return entry;
}

/// All or nothing; throws std::bad_alloc.
void SegmentBank::insert_indexed(const std::shared_ptr<SegmentEntry>& entry, double saved_ms, double now_s) {
  const std::uint32_t slot = entries_.insert(entry);
  contents_.means += entry->is_mean() ? 1 : 0;
  contents_.tokens += tokens_of(*entry);
  EntryCost cost;
  cost.bytes = entry->reserved_.bytes();
  cost.saved_ms = saved_ms;
  entry->saved_ms_ = saved_ms;
  cost.key = XXH3_64bits_withSeed(entry->tokens().data(), entry->tokens().size_bytes(),
                                  XXH3_64bits(entry->partition().data(), entry->partition().size()));
  try {
    index_of(*entry).insert(slot);
    enter(slot, entry->partition(), cost, now_s);
  } catch (...) {
    remove(slot);
    throw;
  }
}

std::optional<std::uint32_t> SegmentBank::slot_of(const SegmentEntry& entry) const {
  for (std::uint32_t slot = 0; slot < entries_.end_slot(); ++slot) {
    const auto* const held = entries_.find(slot);
    if (held != nullptr && held->get() == &entry) return slot;
  }
  return std::nullopt;
}

void SegmentBank::remember(std::uint32_t slot, EvictedKeys::Cause cause) noexcept {
  const SegmentEntry& entry = *entries_[slot];
  if (entry.is_mean()) return;
  add_evicted_prefixes(evicted_, entry.partition(), entry.tokens(), settings_.ids_per_token, 0, cause);
}

EvictedRun SegmentBank::evicted_tokens(std::string_view partition, std::span<const std::int64_t> tokens,
                                       std::int64_t known) const {
  const std::lock_guard lock(mutex_);
  return count_evicted(evicted_, partition, tokens, settings_.ids_per_token, static_cast<std::size_t>(known));
}

void SegmentBank::remove(std::uint32_t slot) noexcept {
  const SegmentEntry& entry = *entries_[slot];
  index_of(entry).erase(slot);
  leave(slot);
  contents_.means -= entry.is_mean() ? 1 : 0;
  contents_.tokens -= tokens_of(entry);
  entries_.erase(slot);
}

std::size_t SegmentBank::busy_bytes() const noexcept {
  std::size_t idle_bytes = 0;
  for (std::uint32_t slot = 0; slot < entries_.end_slot(); ++slot) {
    const auto* const entry = entries_.find(slot);
    if (entry != nullptr && is_idle(slot)) idle_bytes += (*entry)->reserved_.bytes();
  }
  return account_.used() - std::min(account_.used(), idle_bytes);
}

void SegmentBank::remove_all() noexcept {
  index_.clear();
  means_.clear();
  entries_.clear();
  contents_.means = 0;
  contents_.tokens = 0;
}

SegmentBank::Counters SegmentBank::counters() const {
  const std::lock_guard lock(mutex_);
  return {current(), contents_};
}

}  // namespace llmcache
