#include "bank/token_bank.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <new>

namespace llmcache {
namespace {

/// Sequences that the entry's states on its aligned tokens are the mean over, summed over these tokens.
std::int64_t support(const TokenEntry& entry, const TokenAlignment& alignment) {
  std::int64_t sum = 0;
  for (const AlignedBlock& block : alignment.blocks) {
    for (std::int64_t t = 0; t < block.tokens; ++t) sum += entry.count(block.donor_begin + t);
  }
  return sum;
}

}  // namespace

TokenBank::TokenBank(Settings settings)
    : settings_(std::move(settings)),
      account_(settings_.capacity_bytes, settings_.total),
      drafts_(settings_.capacity_bytes),
      memory_(account_),
      spaces_(&memory_),
      nodes_(&memory_),
      free_(&memory_),
      index_(&memory_),
      policy_(settings_.eviction, &memory_) {}

std::vector<std::shared_ptr<const TokenEntry>> TokenBank::similar(std::string_view space,
                                                                  const std::vector<std::uint64_t>& hashes,
                                                                  std::size_t limit) {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const TokenEntry>> entries;
  const auto it = spaces_.find(space);
  if (it == spaces_.end()) return entries;
  for (const auto& candidate : index_.best(it->second.number, hashes, limit)) {
    entries.push_back(nodes_[candidate.id].entry);
  }
  return entries;
}

std::optional<TokenBank::Candidate> TokenBank::find(std::string_view space, const TokenView& tokens, double now_s,
                                                    std::size_t tried) {
  std::optional<Candidate> best;
  double least = 1;
  std::int64_t most = 0;
  for (auto& entry : similar(space, shingle_hashes(tokens, settings_.alignment.least_shifted), tried)) {
    auto alignment = align_tokens(tokens, entry->view(), settings_.alignment);
    const double edits = alignment.edit_fraction();
    const auto supported = support(*entry, alignment);
    if (edits > least || (edits == least && supported <= most)) continue;
    least = edits;
    most = supported;
    best = Candidate{std::move(entry), std::move(alignment)};
  }
  if (best) {
    const std::lock_guard lock(mutex_);
    if (const auto slot = slot_of(best->entry.get())) policy_.hit(*slot, now_s);
  }
  return best;
}

std::unique_ptr<TokenDraft> TokenBank::reserve(std::int64_t tokens) {
  const std::size_t bytes = settings_.layout.bytes(tokens);
  if (!drafts_.try_reserve(bytes)) return nullptr;
  try {
    return std::make_unique<TokenDraft>(settings_.layout, tokens, drafts_, bytes);
  } catch (const std::exception&) {
    drafts_.release(bytes);
    return nullptr;
  }
}

/// Makes the states of the draft, where they align with the entry's in their places, the mean over what the entry's are
/// the mean of, and the draft's. Returns of how many sequences each token's states are the mean now.
std::vector<std::uint16_t> TokenBank::average(TokenDraft& draft, const TokenEntry& entry,
                                              const TokenAlignment& alignment, std::int64_t& averaged) const {
  std::vector<std::uint16_t> counts(static_cast<std::size_t>(draft.tokens()), 1);
  averaged = 0;
  if (settings_.most_averaged < 2) return counts;
  for (const AlignedBlock& block : alignment.blocks) {
    if (block.shifted() || block.tokens < settings_.least_averaged) continue;
    std::vector<float> weights;  // of the entry's states
    for (std::int64_t t = block.begin; t < block.begin + block.tokens; ++t) {
      const auto known = std::min<std::int64_t>(entry.count(t), settings_.most_averaged - 1);
      counts[static_cast<std::size_t>(t)] = static_cast<std::uint16_t>(known + 1);
      weights.push_back(static_cast<float>(known) / static_cast<float>(known + 1));
    }
    for (std::size_t i = 0; i < settings_.layout.specs.size(); ++i) {
      auto own = draft.tensor(i).narrow(0, block.begin, block.tokens);
      std::vector<std::int64_t> shape(static_cast<std::size_t>(own.dim()), 1);
      shape[0] = block.tokens;
      own.lerp_(entry.rows(i).narrow(0, block.donor_begin, block.tokens),
                at::tensor(weights).to(own.options()).view(shape));
    }
    averaged += block.tokens;
  }
  return counts;
}

void TokenBank::keep(std::string_view space, const TokenView& tokens, std::unique_ptr<TokenDraft> draft,
                     double saved_ms, double now_s) {
  try {
    if (draft) return keep_computed(space, tokens, *draft, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory; a draft that is half a mean is dropped
    draft.reset();
  }
  const std::lock_guard lock(mutex_);
  ++counters_.rejected;
}

/// Throws where there is no memory or no room; then it is not kept.
void TokenBank::keep_computed(std::string_view space, const TokenView& tokens, TokenDraft& draft, double saved_ms,
                              double now_s) {
  const auto hashes = shingle_hashes(tokens, settings_.alignment.least_shifted);
  std::vector<std::uint16_t> counts(static_cast<std::size_t>(tokens.size()), 1);
  std::shared_ptr<const TokenEntry> superseded;
  std::int64_t averaged = 0;
  auto in_place = settings_.alignment;
  in_place.shifted = false;
  Candidate best;
  std::int64_t most = 0;
  for (auto& entry : similar(space, hashes, 3)) {
    auto alignment = align_tokens(tokens, entry->view(), in_place);
    const auto supported = support(*entry, alignment);
    const bool same = alignment.edit_fraction() == 0;
    if (!same && supported <= most) continue;
    most = supported;
    best = {std::move(entry), std::move(alignment)};
    if (same) break;
  }
  if (best.entry) {
    if (best.alignment.edit_fraction() == 0) {  // the same sequence
      const std::lock_guard lock(mutex_);
      if (const auto slot = slot_of(best.entry.get())) policy_.hit(*slot, now_s);
      return;
    }
    counts = average(draft, *best.entry, best.alignment, averaged);
    const auto lives_on = static_cast<double>(averaged) / static_cast<double>(best.entry->tokens());
    if (lives_on >= settings_.superseded_from) superseded = std::move(best.entry);
    best.entry.reset();  // it may have to leave for this one
  }
  const std::lock_guard lock(mutex_);
  const auto entry = make_entry(tokens, draft, counts, now_s);
  for (;;) {
    try {
      place(space, entry, hashes, saved_ms, now_s);
      break;
    } catch (const std::bad_alloc&) {
      if (!evict_one(now_s)) throw;
    }
  }
  ++counters_.insertions;
  if (averaged > 0) ++counters_.averaged;
  if (!superseded) return;
  if (const auto slot = slot_of(superseded.get())) remove(*slot);
}

/// Of the draft's tensors; evicts for them. Throws std::bad_alloc if there is no room all the same.
std::shared_ptr<const TokenEntry> TokenBank::make_entry(const TokenView& tokens, TokenDraft& draft,
                                                        const std::vector<std::uint16_t>& counts, double now_s) {
  const std::size_t bytes = draft.bytes();
  if (bytes > account_.limit()) throw std::bad_alloc();
  while (!account_.try_reserve(bytes)) {
    if (!evict_one(now_s)) throw std::bad_alloc();
  }
  for (;;) {
    try {
      const std::pmr::polymorphic_allocator<TokenEntry> allocator(&memory_);
      return std::allocate_shared<TokenEntry>(allocator, settings_.layout, draft, tokens, counts, account_, &memory_);
    } catch (const std::bad_alloc&) {
      if (evict_one(now_s)) continue;
      account_.release(bytes);
      throw;
    } catch (...) {
      account_.release(bytes);
      throw;
    }
  }
}

/// Makes the entry findable, or throws std::bad_alloc and it is not.
void TokenBank::place(std::string_view space, const std::shared_ptr<const TokenEntry>& entry,
                      const std::vector<std::uint64_t>& hashes, double saved_ms, double now_s) {
  auto it = spaces_.find(space);
  const bool new_space = it == spaces_.end();
  if (new_space) it = spaces_.try_emplace(std::pmr::string(space, &memory_), Space{next_space_++, 0}).first;
  const bool new_slot = free_.empty();
  const auto slot = new_slot ? static_cast<std::uint32_t>(nodes_.size()) : free_.back();
  bool indexed = false;
  try {
    if (new_slot) {
      // Whatever is freed later finds its place in the list without taking memory.
      if (free_.capacity() < nodes_.size() + 1) free_.reserve(2 * nodes_.size() + 8);
      nodes_.emplace_back();
    }
    index_.insert(slot, it->second.number, hashes);
    indexed = true;
    policy_.insert(slot, {entry->bytes(), saved_ms}, now_s);
  } catch (...) {
    if (indexed) index_.erase(slot);
    if (new_slot && nodes_.size() > slot) nodes_.pop_back();
    if (new_space) spaces_.erase(it);
    release_if_empty();
    throw;
  }
  if (!new_slot) free_.pop_back();
  nodes_[slot] = {entry, it};
  ++it->second.entries;
}

std::optional<std::uint32_t> TokenBank::slot_of(const TokenEntry* entry) const {
  for (std::size_t slot = 0; slot < nodes_.size(); ++slot) {
    if (nodes_[slot].entry.get() == entry) return static_cast<std::uint32_t>(slot);
  }
  return std::nullopt;
}

void TokenBank::remove(std::uint32_t slot) noexcept {
  Node& node = nodes_[slot];
  index_.erase(slot);
  policy_.erase(slot);
  if (--node.space->second.entries == 0) spaces_.erase(node.space);
  node = {};
  free_.push_back(slot);
  release_if_empty();
}

/// Gives back the tables of slots where nothing is held.
void TokenBank::release_if_empty() noexcept {
  if (policy_.size() > 0) return;
  std::pmr::vector<Node>(&memory_).swap(nodes_);
  std::pmr::vector<std::uint32_t>(&memory_).swap(free_);
}

bool TokenBank::evict_one(double now_s) {
  const auto slot = policy_.victim(now_s);
  if (!slot) return false;
  remove(*slot);
  ++counters_.evictions;
  return true;
}

void TokenBank::clear() {
  const std::lock_guard lock(mutex_);
  while (const auto slot = policy_.victim(0)) remove(*slot);
  policy_.clear();
}

TokenBank::Counters TokenBank::counters() const {
  const std::lock_guard lock(mutex_);
  Counters counters = counters_;
  counters.entries = policy_.size();
  counters.bytes = account_.used();
  counters.peak_bytes = account_.peak();
  return counters;
}

}  // namespace llmcache
