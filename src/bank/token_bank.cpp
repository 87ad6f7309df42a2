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

/// What an entry takes beside its tensors, with its places in index, policy and ledger.
std::size_t bytes_beside(const TokenView& tokens) {
  constexpr std::size_t kTokenBeside = sizeof(TokenEntry) + 512;
  constexpr std::size_t kIndexedToken = 64;
  return tokens.values.size_bytes() + static_cast<std::size_t>(tokens.size()) * kIndexedToken + kTokenBeside;
}

}  // namespace

TokenBank::TokenBank(Settings settings)
    : CapacityBank(settings.capacity_bytes, settings.eviction, settings.total),
      settings_(std::move(settings)),
      pending_(settings_.capacity_bytes),
      partitions_(&memory_),
      nodes_(&memory_),
      index_(&memory_) {}

std::vector<std::shared_ptr<const TokenEntry>> TokenBank::similar(std::string_view partition,
                                                                  const std::vector<std::uint64_t>& hashes,
                                                                  std::size_t limit) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  std::vector<std::shared_ptr<const TokenEntry>> entries;
  const auto it = partitions_.find(partition);
  if (it == partitions_.end()) return entries;
  for (const auto& candidate : index_.best(it->second.number, hashes, limit)) {
    entries.push_back(nodes_[candidate.id].entry);
  }
  return entries;
}

std::optional<TokenBank::Candidate> TokenBank::find(std::string_view partition, const TokenView& tokens, double now_s,
                                                    std::size_t tried) {
  std::optional<Candidate> best;
  double least = 1;
  std::int64_t most = 0;
  for (auto& entry : similar(partition, shingle_hashes(tokens, settings_.alignment.least_shifted), tried)) {
    auto alignment = align_tokens(tokens, entry->view(), settings_.alignment);
    const double edits = alignment.edit_fraction();
    const auto supported = support(*entry, alignment);
    if (edits > least || (edits == least && supported <= most)) continue;
    least = edits;
    most = supported;
    best = Candidate{std::move(entry), std::move(alignment)};
  }
  if (best) use(best->entry.get(), now_s);
  return best;
}

std::unique_ptr<PendingEntry> TokenBank::reserve(std::int64_t tokens) {
  auto reserved = Reservation::of(pending_, settings_.layout.bytes(tokens));
  if (!reserved) return nullptr;
  try {
    return std::make_unique<PendingEntry>(settings_.layout, tokens, std::move(*reserved));
  } catch (const std::exception&) {
    return nullptr;
  }
}

/// Makes the states that are pending, where they align with the entry's in their places, the mean over what the entry's
/// are the mean of, and themselves. Returns of how many sequences each token's states are the mean now.
std::vector<std::uint16_t> TokenBank::average(PendingEntry& pending, const TokenEntry& entry,
                                              const TokenAlignment& alignment, std::int64_t& averaged) const {
  std::vector<std::uint16_t> counts(static_cast<std::size_t>(pending.tokens()), 1);
  averaged = 0;
  if (settings_.most_averaged < 2) return counts;
  for (const AlignedBlock& block : alignment.blocks) {
    if (block.shifted() || block.tokens < settings_.least_averaged) continue;
    average_block(pending, entry, block, counts);
    averaged += block.tokens;
  }
  return counts;
}

void TokenBank::average_block(PendingEntry& pending, const TokenEntry& entry, const AlignedBlock& block,
                              std::vector<std::uint16_t>& counts) const {
  std::vector<float> weights;  // of the entry's states
  for (std::int64_t t = block.begin; t < block.begin + block.tokens; ++t) {
    const auto known = std::min<std::int64_t>(entry.count(t), settings_.most_averaged - 1);
    counts[static_cast<std::size_t>(t)] = static_cast<std::uint16_t>(known + 1);
    weights.push_back(static_cast<float>(known) / static_cast<float>(known + 1));
  }
  for (std::size_t i = 0; i < settings_.layout.specs.size(); ++i) {
    auto own = pending.tensor(i).narrow(0, block.begin, block.tokens);
    std::vector<std::int64_t> shape(static_cast<std::size_t>(own.dim()), 1);
    shape[0] = block.tokens;
    own.lerp_(entry.rows(i).narrow(0, block.donor_begin, block.tokens),
              at::tensor(weights).to(own.options()).view(shape));
  }
}

void TokenBank::keep(std::string_view partition, const TokenView& tokens, std::unique_ptr<PendingEntry> pending,
                     double saved_ms, double now_s) {
  try {
    if (pending) return keep_computed(partition, tokens, *pending, saved_ms, now_s);
  } catch (const std::exception&) {  // no memory; what is half a mean is dropped
    pending.reset();
  }
  reject();
}

/// Of the entries that have most text in common with these tokens, the one whose states in their places are the mean
/// over most; one of the same tokens before all.
std::optional<TokenBank::Candidate> TokenBank::best_in_place(std::string_view partition, const TokenView& tokens,
                                                             const std::vector<std::uint64_t>& hashes) {
  auto in_place = settings_.alignment;
  in_place.shifted = false;
  std::optional<Candidate> best;
  std::int64_t most = 0;
  for (auto& entry : similar(partition, hashes, 3)) {
    auto alignment = align_tokens(tokens, entry->view(), in_place);
    const auto supported = support(*entry, alignment);
    const bool same = alignment.edit_fraction() == 0;
    if (!same && supported <= most) continue;
    most = supported;
    best = Candidate{std::move(entry), std::move(alignment)};
    if (same) break;
  }
  return best;
}

/// Throws where there is no memory or no room; then it is not kept.
void TokenBank::keep_computed(std::string_view partition, const TokenView& tokens, PendingEntry& pending,
                              double saved_ms, double now_s) {
  const auto hashes = shingle_hashes(tokens, settings_.alignment.least_shifted);
  std::vector<std::uint16_t> counts(static_cast<std::size_t>(tokens.size()), 1);
  std::shared_ptr<const TokenEntry> superseded;
  std::int64_t averaged = 0;
  if (auto best = best_in_place(partition, tokens, hashes)) {
    if (best->alignment.edit_fraction() == 0) return use(best->entry.get(), now_s);  // the same sequence
    counts = average(pending, *best->entry, best->alignment, averaged);
    const auto lives_on = static_cast<double>(averaged) / static_cast<double>(best->entry->tokens());
    if (lives_on >= settings_.superseded_from) superseded = std::move(best->entry);
  }  // it is let go: it may have to leave for this one
  const std::lock_guard lock(mutex_);
  insert_computed(partition, tokens, pending, counts, hashes, saved_ms, now_s);
  ++insertions_;
  if (averaged > 0) ++averages_.averaged;
  if (!superseded) return;
  if (const auto slot = slot_of(superseded.get())) remove(*slot);
}

/// Makes an entry of the tensors that are pending, and evicts for it. Throws std::bad_alloc if there is no room all the
/// same.
void TokenBank::insert_computed(std::string_view partition, const TokenView& tokens, PendingEntry& pending,
                                const std::vector<std::uint16_t>& counts, const std::vector<std::uint64_t>& hashes,
                                double saved_ms, double now_s) {
  auto reserved = make_room(partition, pending.bytes(), bytes_beside(tokens), now_s);
  std::shared_ptr<const TokenEntry> entry;
  const bool kept = reserved && take_evicting(partition, now_s, [&] {
                      if (!entry) {
                        const std::pmr::polymorphic_allocator<TokenEntry> allocator(&memory_);
                        entry = std::allocate_shared<TokenEntry>(allocator, settings_.layout, pending, tokens, counts,
                                                                 *reserved, &memory_);
                      }
                      insert_indexed(partition, entry, hashes, saved_ms, now_s);
                    });
  if (!kept) throw std::bad_alloc();
}

/// Makes the entry findable, or throws std::bad_alloc and it is not.
void TokenBank::insert_indexed(std::string_view partition, const std::shared_ptr<const TokenEntry>& entry,
                               const std::vector<std::uint64_t>& hashes, double saved_ms, double now_s) {
  auto it = partitions_.find(partition);
  if (it == partitions_.end()) {
    it = partitions_.try_emplace(std::pmr::string(partition, &memory_), Partition{next_partition_++, 0}).first;
  }
  std::uint32_t slot = kNoSlot;
  try {
    slot = nodes_.insert({entry, it, saved_ms});
    ++it->second.entries;
    index_.insert(slot, it->second.number, hashes);
    enter(slot, partition, {entry->bytes(), saved_ms}, now_s);
  } catch (...) {
    if (slot != kNoSlot) {
      remove(slot);
    } else {
      drop_if_empty(it);
    }
    throw;
  }
}

std::vector<TokenBank::Listed> TokenBank::listed() {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto slots = policy_.order();
  std::vector<Listed> all;
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) {
    const Node& node = nodes_[*slot];
    all.push_back({std::string(node.partition->first), node.entry, node.saved_ms});
  }
  return all;
}

bool TokenBank::restore(std::string_view partition, const TokenView& tokens, const std::vector<std::uint16_t>& counts,
                        std::vector<EncodedTensor> tensors, double saved_ms, double now_s) {
  std::size_t bytes = 0;
  for (const EncodedTensor& tensor : tensors) bytes += tensor.bytes();
  const auto hashes = shingle_hashes(tokens, settings_.alignment.least_shifted);
  const std::size_t beside = bytes_beside(tokens);
  const std::lock_guard lock(mutex_);
  if (!fits(partition, bytes, beside)) return false;
  auto reserved = make_room(partition, bytes, beside, now_s);
  if (!reserved) return false;
  try {
    const std::pmr::polymorphic_allocator<TokenEntry> allocator(&memory_);
    const auto entry = std::allocate_shared<TokenEntry>(allocator, settings_.layout, std::move(tensors), tokens, counts,
                                                        *reserved, &memory_);
    insert_indexed(partition, entry, hashes, saved_ms, now_s);
  } catch (const std::bad_alloc&) {
    return false;
  }
  ++insertions_;
  return true;
}

/// The entry of just these tokens; null: there is none.
std::shared_ptr<const TokenEntry> TokenBank::same(std::string_view partition, const TokenView& tokens) {
  for (auto& entry : similar(partition, shingle_hashes(tokens, settings_.alignment.least_shifted), 3)) {
    const TokenView view = entry->view();
    if (view.ids_per_token == tokens.ids_per_token && std::ranges::equal(view.values, tokens.values))
      return std::move(entry);
  }
  return nullptr;
}

bool TokenBank::knows(std::string_view partition, const TokenView& tokens) {
  return same(partition, tokens) != nullptr;
}

void TokenBank::use(std::string_view partition, const TokenView& tokens, double now_s) {
  if (const auto entry = same(partition, tokens)) use(entry.get(), now_s);
}

std::optional<std::uint32_t> TokenBank::slot_of(const TokenEntry* entry) const {
  for (std::uint32_t slot = 0; slot < nodes_.end_slot(); ++slot) {
    const Node* const node = nodes_.find(slot);
    if (node != nullptr && node->entry.get() == entry) return slot;
  }
  return std::nullopt;
}

/// The entry counts as used, if it is there still.
void TokenBank::use(const TokenEntry* entry, double now_s) {
  const std::lock_guard lock(mutex_);
  if (const auto slot = slot_of(entry)) touch(*slot, now_s);
}

void TokenBank::remove(std::uint32_t slot) noexcept {
  const auto partition = nodes_[slot].partition;
  index_.erase(slot);
  leave(slot);
  nodes_.erase(slot);
  --partition->second.entries;
  drop_if_empty(partition);
}

void TokenBank::drop_if_empty(Partitions::iterator partition) noexcept {
  if (partition->second.entries == 0) partitions_.erase(partition);
}

void TokenBank::remove_all() noexcept {
  index_.clear();
  nodes_.clear();
  partitions_.clear();
}

TokenBank::Counters TokenBank::counters() const {
  const std::lock_guard lock(mutex_);
  return {current(), averages_};
}

}  // namespace llmcache
