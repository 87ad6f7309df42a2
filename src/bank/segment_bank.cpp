#include "bank/segment_bank.h"

#include <c10/core/InferenceMode.h>
#include <xxhash.h>

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

namespace llmcache {
namespace {

/// What values and scales take beside their data.
constexpr std::size_t kStatesOverhead = sizeof(StoredStates) + 2 * (sizeof(c10::TensorImpl) + sizeof(c10::StorageImpl));

/// Does `part` have most of the tokens of `run`? Then what stands around it there is no passage of its own.
bool is_most_of(const BlockMatch& part, const BlockMatch& run) {
  const std::size_t begin = std::max(part.begin, run.begin);
  const std::size_t end = std::min(part.begin + part.tokens, run.begin + run.tokens);
  return begin < end && 5 * (end - begin) >= 4 * run.tokens;
}

}  // namespace

SegmentEntry::SegmentEntry(std::string_view space, std::span<const std::int64_t> tokens, SegmentOrigin origin,
                           const std::vector<KeySpec>& specs, BankFormat format, std::pmr::memory_resource* memory)
    : specs_(specs),
      format_(format),
      space_(space, memory),
      tokens_(tokens.begin(), tokens.end(), memory),
      origin_(origin),
      stored_(specs.size()) {}

SegmentEntry::~SegmentEntry() {
  stored_.clear();
  if (account_ != nullptr) account_->release(bytes_);
}

bool SegmentEntry::complete() const noexcept {
  return std::ranges::all_of(stored_, [](const StoredStates& states) { return states.bytes() > 0; });
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

// The containers start empty and allocate nothing until the first insertion.
SegmentBank::SegmentBank(Settings settings)
    : settings_(std::move(settings)),
      account_(settings_.capacity_bytes, settings_.total),
      drafts_(settings_.capacity_bytes),
      memory_(account_),
      index_(settings_.token_width, settings_.block_tokens, tokens_of_slot(), &memory_),
      means_(settings_.token_width, settings_.block_tokens, tokens_of_slot(), &memory_),
      policy_(settings_.eviction, &memory_) {}

BlockHashIndex::Tokens SegmentBank::tokens_of_slot() {
  return [this](std::uint32_t slot) {
    const SegmentEntry& entry = *(*entries_)[slot];
    return BlockHashIndex::Sequence{entry.space(), entry.tokens()};
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

std::vector<SegmentHit> SegmentBank::find(std::string_view space, std::span<const std::int64_t> tokens,
                                          const Wanted& wanted, double now_s) {
  const BlockHashIndex::Sequence request{space, tokens};
  std::vector<SegmentHit> hits;
  const std::lock_guard lock(mutex_);
  const auto add = [&](const BlockMatch& match, bool exact) {
    hits.push_back({static_cast<std::int64_t>(match.begin), (*entries_)[match.slot],
                    static_cast<std::int64_t>(match.donor_begin), static_cast<std::int64_t>(match.tokens), exact});
    if (wanted.use) policy_.hit(match.slot, now_s);
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
    auto sizes = spec.sizes;
    sizes[static_cast<std::size_t>(spec.token_dim)] = static_cast<std::int64_t>(tokens);
    bytes += StoredStates::bytes_for(sizes, spec.options, settings_.format) + kStatesOverhead;
    if (bytes > account_.limit()) return std::nullopt;
  }
  return bytes;
}

SegmentBank::Room SegmentBank::reserve(std::string_view space, std::span<const std::int64_t> tokens) {
  {
    const std::lock_guard lock(mutex_);
    if (index_.prefix({space, tokens}).tokens == tokens.size() / settings_.token_width) return {};
  }
  return reserve_mean(space, tokens, {});
}

SegmentBank::Room SegmentBank::reserve_mean(std::string_view space, std::span<const std::int64_t> tokens,
                                            SegmentOrigin origin) {
  try {
    const auto bytes = entry_bytes(tokens.size() / settings_.token_width);
    auto draft = std::make_unique<SegmentEntry>(space, tokens, origin, settings_.specs, settings_.format,
                                                std::pmr::new_delete_resource());
    if (!bytes || !drafts_.try_reserve(*bytes)) return {nullptr, true};
    draft->account_ = &drafts_;
    draft->bytes_ = *bytes;
    return {std::move(draft), false};
  } catch (const std::exception&) {
    return {nullptr, true};
  }
}

void SegmentBank::reject() {
  const std::lock_guard lock(mutex_);
  ++counters_.rejected;
}

void SegmentBank::insert(Room room, double saved_ms, double now_s) {
  if (room.refused) return reject();
  if (!room.draft || !room.draft->complete()) return;
  try {
    insert_draft(*room.draft, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory
    reject();
  }
}

void SegmentBank::insert_mean(Room mean, const SegmentEntry& replaced, double saved_ms, double now_s) {
  if (mean.refused) return reject();
  if (!mean.draft || !mean.draft->complete()) return;
  try {
    insert_mean_draft(*mean.draft, replaced, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory
    reject();
  }
}

void SegmentBank::insert_draft(SegmentEntry& draft, double saved_ms, double now_s) {
  const std::lock_guard lock(mutex_);
  const std::size_t count = tokens_of(draft);
  const BlockMatch known = index_.prefix({draft.space(), draft.tokens()});
  if (known.tokens == count) return;  // somebody was faster
  const bool replaces = known.tokens > 0 && known.tokens == tokens_of(*(*entries_)[known.slot]);
  const SegmentEntry* const entry = take_over(draft, saved_ms, now_s);
  if (entry == nullptr) return;
  ++counters_.insertions;
  // Unless it was evicted for room on the way: the slot may be the new entry's own.
  if (!replaces || !policy_.contains(known.slot)) return;
  const SegmentEntry& old = *(*entries_)[known.slot];
  if (&old == entry || tokens_of(old) != known.tokens) return;
  remove(known.slot);
  ++counters_.replaced;
}

void SegmentBank::insert_mean_draft(SegmentEntry& draft, const SegmentEntry& replaced, double saved_ms, double now_s) {
  const std::lock_guard lock(mutex_);
  const auto slot_of_replaced = [&]() -> std::optional<std::uint32_t> {
    for (std::uint32_t slot = 0; entries_ && slot < entries_->size(); ++slot) {
      if ((*entries_)[slot].get() == &replaced) return slot;
    }
    return std::nullopt;
  };
  if (replaced.is_mean()) {
    if (!slot_of_replaced()) return;  // somebody was faster
  } else {
    const BlockMatch whole{0, 0, 0, tokens_of(draft)};
    for (const BlockMatch& known : means_.segments({draft.space(), draft.tokens()}, {})) {
      if (is_most_of(known, whole)) return;
    }
  }
  if (take_over(draft, saved_ms, now_s) == nullptr || !replaced.is_mean()) return;
  if (const auto slot = slot_of_replaced()) {  // unless it was evicted for room
    remove(*slot);
    ++counters_.replaced;
  }
}

/// Makes an entry of the draft's states, and evicts for it; null, and counted as rejected, if there is no room.
const SegmentEntry* SegmentBank::take_over(SegmentEntry& draft, double saved_ms, double now_s) {
  std::shared_ptr<SegmentEntry> entry;
  while (entry || make_room(draft.bytes_, now_s)) {
    try {
      if (!entry) {
        const std::pmr::polymorphic_allocator<SegmentEntry> allocator(&memory_);
        entry = std::allocate_shared<SegmentEntry>(allocator, draft.space(), draft.tokens(), draft.origin(),
                                                   settings_.specs, settings_.format, &memory_);
        entry->account_ = &account_;
        entry->bytes_ = draft.bytes_;
        entry->stored_.swap(draft.stored_);
      }
      place(entry, saved_ms, now_s);
      return entry.get();
    } catch (const std::bad_alloc&) {
      if (!entry) account_.release(draft.bytes_);
      reset_if_empty();
      if (!evict_one(now_s)) break;
    }
  }
  ++counters_.rejected;
  return nullptr;
}

/// All or nothing; throws std::bad_alloc.
void SegmentBank::place(const std::shared_ptr<SegmentEntry>& entry, double saved_ms, double now_s) {
  if (!entries_) entries_.emplace(&memory_);
  const auto free = std::find(entries_->begin(), entries_->end(), nullptr);
  const auto slot = static_cast<std::uint32_t>(free - entries_->begin());
  if (free == entries_->end()) {
    entries_->push_back(entry);
  } else {
    *free = entry;
  }
  EntryCost cost;
  cost.bytes = entry->bytes_;
  cost.saved_ms = saved_ms;
  cost.key = XXH3_64bits_withSeed(entry->tokens().data(), entry->tokens().size_bytes(),
                                  XXH3_64bits(entry->space().data(), entry->space().size()));
  try {
    index_of(*entry).insert(slot);
    try {
      policy_.insert(slot, cost, now_s);
    } catch (...) {
      index_of(*entry).erase(slot);
      throw;
    }
  } catch (...) {
    (*entries_)[slot] = nullptr;
    throw;
  }
  ++counters_.entries;
  counters_.means += entry->is_mean() ? 1 : 0;
  counters_.tokens += tokens_of(*entry);
}

void SegmentBank::remove(std::uint32_t slot) noexcept {
  const SegmentEntry& entry = *(*entries_)[slot];
  index_of(entry).erase(slot);
  policy_.erase(slot);
  --counters_.entries;
  counters_.means -= entry.is_mean() ? 1 : 0;
  counters_.tokens -= tokens_of(entry);
  (*entries_)[slot] = nullptr;
  reset_if_empty();
}

void SegmentBank::reset_if_empty() noexcept {
  if (counters_.entries == 0) entries_.reset();
}

/// Reserves bytes in the account. Evicts nothing if entries in use leave too little.
bool SegmentBank::make_room(std::size_t bytes, double now_s) noexcept {
  if (account_.try_reserve(bytes)) return true;
  std::size_t idle_bytes = 0;
  for (std::uint32_t slot = 0; entries_ && slot < entries_->size(); ++slot) {
    if ((*entries_)[slot] && idle(slot)) idle_bytes += (*entries_)[slot]->bytes_;
  }
  const std::size_t limit = account_.limit();
  const std::size_t staying = account_.used() - std::min(account_.used(), idle_bytes);
  if (bytes > limit || staying > limit - bytes) return false;
  while (!account_.try_reserve(bytes)) {
    if (!evict_one(now_s)) return false;
  }
  return true;
}

bool SegmentBank::evict_one(double now_s) noexcept {
  // An entry in use counts as used again, so that the policy names another one. How often is bounded: some policies
  // name it several times before they do.
  for (int attempts = 0; attempts < 64; ++attempts) {
    const auto victim = policy_.victim(now_s);
    if (!victim) return false;
    if (idle(*victim)) {
      remove(*victim);
      ++counters_.evictions;
      return true;
    }
    policy_.hit(*victim, now_s);
  }
  for (std::uint32_t slot = 0; entries_ && slot < entries_->size(); ++slot) {
    if (!(*entries_)[slot] || !idle(slot)) continue;
    remove(slot);
    ++counters_.evictions;
    return true;
  }
  return false;
}

void SegmentBank::clear() {
  const std::lock_guard lock(mutex_);
  index_.clear();
  means_.clear();
  policy_.clear();
  entries_.reset();
  counters_.entries = 0;
  counters_.means = 0;
  counters_.tokens = 0;
}

SegmentBank::Counters SegmentBank::counters() const {
  const std::lock_guard lock(mutex_);
  Counters counters = counters_;
  counters.bytes = account_.used();
  counters.peak_bytes = account_.peak();
  return counters;
}

}  // namespace llmcache
