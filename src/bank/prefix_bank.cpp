#include "bank/prefix_bank.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fmt/core.h>
#include <xxhash.h>

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "bank/tenant_key.h"
#include "bank/tensor_bytes.h"

namespace llmcache {
namespace {

/// What a tensor of a block takes beside its data.
constexpr std::size_t kBlockTensorOverhead = kTensorOverhead + sizeof(at::Tensor);
/// What a block takes beside its tensors: itself and the counts of its shared_ptr.
constexpr std::size_t kBlockOverhead = sizeof(KeyBlock) + 4 * sizeof(void*);

/// What one token takes in a tensor of this spec.
std::size_t bytes_of_token(const KeySpec& spec) {
  std::size_t bytes = spec.options.dtype().itemsize();
  for (std::size_t i = 0; i < spec.sizes.size(); ++i) {
    if (static_cast<std::int64_t>(i) != spec.token_dim) bytes *= static_cast<std::size_t>(spec.sizes[i]);
  }
  return bytes;
}

std::int64_t end_of(const KeyRange& range) { return range.offset + range.tokens; }

/// True if `next` lies right behind `range`.
bool follows(const KeyRange& range, const KeyRange& next) {
  return range.block == next.block && end_of(range) == next.offset;
}

}  // namespace

KeyBlock::KeyBlock(const std::vector<KeySpec>& specs, std::int64_t room, Reservation reserved)
    : reserved_(std::move(reserved)), room_(room) {
  // A tensor made in inference mode could not be written to outside of it.
  const c10::InferenceMode normal(false);
  tensors_.reserve(specs.size());
  for (const KeySpec& spec : specs) {
    std::vector<std::int64_t> sizes = spec.sizes;
    sizes[static_cast<std::size_t>(spec.token_dim)] = room;
    tensors_.push_back(at::empty(sizes, spec.options));
  }
}

PrefixLease::PrefixLease(PrefixLease&& other) noexcept
    : bank_(std::exchange(other.bank_, nullptr)),
      known_(std::exchange(other.known_, {})),
      reserved_(std::exchange(other.reserved_, {})),
      known_tokens_(std::exchange(other.known_tokens_, 0)),
      evicted_(std::exchange(other.evicted_, {})),
      shortest_(other.shortest_),
      longest_(other.longest_),
      continues_(std::exchange(other.continues_, false)),
      refused_(std::exchange(other.refused_, false)),
      kept_(std::exchange(other.kept_, false)),
      kept_for_(std::move(other.kept_for_)) {}

PrefixLease& PrefixLease::operator=(PrefixLease&& other) noexcept {
  if (this == &other) return *this;
  if (bank_ != nullptr) bank_->release(*this);
  bank_ = std::exchange(other.bank_, nullptr);
  known_ = std::exchange(other.known_, {});
  reserved_ = std::exchange(other.reserved_, {});
  known_tokens_ = std::exchange(other.known_tokens_, 0);
  evicted_ = std::exchange(other.evicted_, {});
  shortest_ = other.shortest_;
  longest_ = other.longest_;
  continues_ = std::exchange(other.continues_, false);
  refused_ = std::exchange(other.refused_, false);
  kept_ = std::exchange(other.kept_, false);
  kept_for_ = std::move(other.kept_for_);
  return *this;
}

PrefixLease::~PrefixLease() {
  if (bank_ != nullptr) bank_->release(*this);
}

PrefixBank::PrefixBank(Settings settings)
    : CapacityBank(settings.capacity_bytes, settings.eviction, settings.total),
      settings_(std::move(settings)),
      passes_(settings_.capacity_bytes),
      tree_(settings_.ids_per_token, &memory_) {
  for (const KeySpec& spec : settings_.specs) {
    token_bytes_.push_back(bytes_of_token(spec));
    all_token_bytes_ += token_bytes_.back();
  }
}

PrefixLease PrefixBank::find(std::string_view partition, std::span<const std::int64_t> tokens, double now_s) {
  return look(partition, tokens, now_s);
}

PrefixLease PrefixBank::peek(std::string_view partition, std::span<const std::int64_t> tokens) {
  return look(partition, tokens, std::nullopt);
}

/// `used_at`: when the nodes on the path count as used; unset: they do not.
PrefixLease PrefixBank::look(std::string_view partition, std::span<const std::int64_t> tokens,
                             std::optional<double> used_at) {
  PrefixLease lease;
  const std::lock_guard lock(mutex_);
  drop_aged();
  const PrefixTree::Match match = tree_.match(partition, tokens);
  if (match.tokens > 0) {
    for (std::uint32_t node = match.node; !tree_.is_root(node); node = tree_.parent(node)) {
      KeyRange part = held(node);
      if (node == match.node) part.tokens = static_cast<std::int64_t>(match.in_node);
      lease.shortest_ = std::min(lease.shortest_, part.shortest);
      lease.longest_ = std::max(lease.longest_, part.longest);
      if (!lease.known_.empty() && follows(part, lease.known_.back())) {
        lease.known_.back().offset = part.offset;
        lease.known_.back().tokens += part.tokens;
        lease.known_.back().widen(part);
      } else {
        lease.known_.push_back(std::move(part));
      }
    }
    // Nothing fails from here on. The root was used last, so that a leaf is older than what is above it.
    std::ranges::reverse(lease.known_);
    for (std::uint32_t node = match.node; used_at && !tree_.is_root(node); node = tree_.parent(node)) {
      touch(node, *used_at);
    }
    for (const KeyRange& range : lease.known_) pin(*range.block);
    lease.known_tokens_ = static_cast<std::int64_t>(match.tokens);
    lease.continues_ = match.in_node == tree_.size(match.node) && tree_.is_leaf(match.node);
  }
  lease.evicted_ = count_evicted(evicted_, partition, tokens, settings_.ids_per_token, match.tokens);
  lease.bank_ = this;
  return lease;
}

bool PrefixBank::reserve(PrefixLease& lease, const KeyRange* after, std::int64_t count, std::int64_t room,
                         std::uint8_t length_class) {
  if (count <= 0) return true;
  const KeyRange last = after == nullptr ? KeyRange{} : *after;  // `after` may lie in the vector that grows
  std::unique_lock lock(mutex_);
  try {
    lease.reserved_.reserve(lease.reserved_.size() + 2);
  } catch (const std::bad_alloc&) {
    lease.refused_ = true;
    return false;
  }
  const auto give = [&](const std::shared_ptr<KeyBlock>& block, std::int64_t tokens) {
    lease.bank_ = this;
    lease.reserved_.push_back({block, block->claimed_, tokens, length_class, length_class});
    block->claimed_ += tokens;
    pin(*block);
  };
  const std::size_t before = lease.reserved_.size();
  std::int64_t spare = 0;
  if (last.block && end_of(last) == last.block->claimed_) spare = std::min(count, last.block->room_ - end_of(last));
  if (spare > 0) give(last.block, spare);
  if (spare == count) return true;
  const std::int64_t rest = count - spare;
  std::shared_ptr<KeyBlock> block;
  if (room > rest) block = make_block(lock, room);
  if (!block) block = make_block(lock, rest);
  if (block) {
    give(block, rest);
    return true;
  }
  lease.refused_ = true;
  if (lease.reserved_.size() > before) {
    if (last.block->claimed_ == end_of(last) + spare) last.block->claimed_ -= spare;
    unpin(*last.block);
    lease.reserved_.pop_back();
  }
  return false;
}

void PrefixBank::commit(PrefixLease& lease, std::string_view partition, std::span<const std::int64_t> tokens,
                        std::span<const KeyRange> ranges, double saved_ms, double now_s) {
  std::size_t held = 0;
  for (const KeyRange& range : ranges) held += static_cast<std::size_t>(range.tokens);
  const std::size_t count = std::min(tokens.size() / settings_.ids_per_token, held);
  const std::size_t known_before = std::min(count, static_cast<std::size_t>(lease.known_tokens_));
  const Sequence sequence{partition, tokens.first(count * settings_.ids_per_token), ranges, saved_ms, now_s};
  const std::lock_guard lock(mutex_);
  drop_aged();
  bool room = !std::exchange(lease.refused_, false);
  // After a failure it goes on where the tree ends by then: that may be earlier, if what it found was evicted.
  const auto step = [&] {
    room = take_over(sequence);
    if (room && grow(sequence)) ++insertions_;
  };
  refused_ = EvictedKeys::Cause::kRoom;
  if (ledger_ && ledger_->ages() && tree_.match(partition, sequence.tokens).tokens < known_before) {
    room = false;  // its beginning became too old meanwhile, and would come back as new
    refused_ = EvictedKeys::Cause::kAge;
  }
  if (room && take_evicting(partition, now_s, step) && room) return;
  ++rejected_;
  const std::size_t known = tree_.match(partition, sequence.tokens).tokens;
  add_evicted_prefixes(evicted_, partition, sequence.tokens, settings_.ids_per_token, known, refused_);
}

/// Makes the blocks of what is not known yet the bank's, and evicts for them; false if there is no room.
bool PrefixBank::take_over(const Sequence& sequence) noexcept {
  const auto is_own = [this](const KeyRange& range) { return !is_held(*range.block); };
  while (std::ranges::any_of(sequence.ranges, is_own)) {
    // What is known changes with what is evicted.
    const std::size_t known = tree_.match(sequence.partition, sequence.tokens).tokens;
    std::size_t end = 0;
    const auto next = std::ranges::find_if(sequence.ranges, [&](const KeyRange& range) {
      end += static_cast<std::size_t>(range.tokens);
      return end > known && is_own(range);
    });
    if (next == sequence.ranges.end()) return true;
    KeyBlock& block = *next->block;
    auto reserved = make_room(sequence.partition, block.reserved_.bytes(),
                              bytes_beside(static_cast<std::size_t>(block.room_)), sequence.now_s);
    if (!reserved) return false;
    block.reserved_ = std::move(*reserved);
    if (block.pins_ > 0) pinned_bytes_ += block.reserved_.bytes();
  }
  return true;
}

/// Makes known what is not yet, in blocks that are held; false if all is. std::bad_alloc: a part of it may be known
/// then.
bool PrefixBank::grow(const Sequence& sequence) {
  const PrefixTree::Match match = tree_.match(sequence.partition, sequence.tokens);
  if (match.tokens == sequence.tokens.size() / settings_.ids_per_token) return false;
  try {
    append_behind(match, sequence);
    return true;
  } catch (const std::bad_alloc&) {
    tree_.drop_if_empty(sequence.partition);
    if (tree_.empty()) ranges_.reset();
    throw;
  }
}

/// Appends what the ranges hold behind the tokens of the match, as many ranges as possible in one node.
void PrefixBank::append_behind(const PrefixTree::Match& match, const Sequence& sequence) {
  const std::size_t count = sequence.tokens.size() / settings_.ids_per_token;
  std::uint32_t node = match.node;
  if (node == PrefixTree::kNone) {
    node = tree_.root(sequence.partition);
  } else if (!tree_.is_root(node) && match.in_node < tree_.size(node)) {
    node = split(node, match.in_node, sequence, match.tokens);
  }
  std::size_t begin = 0;  // of the range that comes, in the sequence
  KeyRange next;
  for (std::size_t i = 0; i < sequence.ranges.size() && begin < count; ++i) {
    const KeyRange& range = sequence.ranges[i];
    const std::size_t end = std::min(begin + static_cast<std::size_t>(range.tokens), count);
    if (end > match.tokens) {
      const auto skipped = static_cast<std::int64_t>(std::max(begin, match.tokens) - begin);
      const KeyRange piece{range.block, range.offset + skipped, static_cast<std::int64_t>(end - begin) - skipped,
                           range.shortest, range.longest};
      if (next.block && follows(next, piece)) {
        next.tokens += piece.tokens;
        next.widen(piece);
      } else {
        next = piece;
      }
      // The ranges that follow in the same block go with it.
      const bool more = i + 1 < sequence.ranges.size() && end < count && follows(range, sequence.ranges[i + 1]);
      if (!more && next.tokens > 0) {
        node = append(node, next, sequence, end - static_cast<std::size_t>(next.tokens));
        next = {};
      }
    }
    begin = end;
  }
}

/// Cuts a node behind `count` tokens, where `end` tokens of the sequence end. Returns the upper half. The lower one
/// keeps its place in the policy, at the cost that was given for both: the hits that it has had are worth more than
/// that.
std::uint32_t PrefixBank::split(std::uint32_t node, std::size_t count, const Sequence& sequence, std::size_t end) {
  const auto tokens = static_cast<std::int64_t>(count);
  const std::uint32_t slot = prepare(tokens, sequence, end);
  try {
    tree_.split(node, count);
  } catch (...) {
    leave(slot);
    throw;
  }
  make_as_old(slot, node);
  KeyRange& lower = held(node);
  held(slot) = {lower.block, lower.offset, tokens, lower.shortest, lower.longest, lower.saved_ms};
  lower.offset += tokens;
  lower.tokens -= tokens;
  return slot;
}

/// Puts tokens of the sequence, from number `begin` on, behind a node. Returns the node that holds them. A leaf that
/// they continue in its own block is extended, and keeps its place in the policy too.
std::uint32_t PrefixBank::append(std::uint32_t node, const KeyRange& range, const Sequence& sequence,
                                 std::size_t begin) {
  const std::size_t ids_per_token = settings_.ids_per_token;
  const auto count = static_cast<std::size_t>(range.tokens);
  const auto tokens = sequence.tokens.subspan(begin * ids_per_token, count * ids_per_token);
  std::uint32_t holder = node;
  if (!tree_.is_root(node) && tree_.is_leaf(node) && follows(held(node), range)) {
    tree_.extend(node, tokens);
    held(node).tokens += range.tokens;
    held(node).widen(range);
  } else {
    holder = prepare(range.tokens, sequence, begin + count);
    try {
      tree_.attach(node, tokens);
    } catch (...) {
      leave(holder);
      throw;
    }
    held(holder) = range;
    held(holder).saved_ms = static_cast<float>(sequence.saved_ms);
  }
  range.block->held_ = std::max(range.block->held_, end_of(range));
  contents_.tokens += count;
  return holder;
}

/// All that a new node needs beside the tree, which gives it this slot next. `end`: where it ends in the sequence.
std::uint32_t PrefixBank::prepare(std::int64_t tokens, const Sequence& sequence, std::size_t end) {
  const std::uint32_t slot = tree_.next_slot();
  if (!ranges_) ranges_.emplace(&memory_);
  while (slot >= ranges_->size()) ranges_->emplace_back();
  EntryCost cost;
  cost.bytes = static_cast<std::size_t>(tokens) * all_token_bytes_;
  cost.saved_ms = static_cast<double>(tokens) * sequence.saved_ms;
  cost.key = XXH3_64bits_withSeed(sequence.tokens.data(), end * settings_.ids_per_token * sizeof(std::int64_t),
                                  XXH3_64bits(sequence.partition.data(), sequence.partition.size()));
  enter(slot, sequence.partition, cost, sequence.now_s);
  return slot;
}

void PrefixBank::release(PrefixLease& lease) noexcept {
  lease.bank_ = nullptr;
  const std::vector<KeyRange> known = std::exchange(lease.known_, {});
  const std::vector<KeyRange> reserved = std::exchange(lease.reserved_, {});
  const std::lock_guard lock(mutex_);
  let_go(lease, known);
  for (std::size_t i = reserved.size(); i-- > 0;) {
    KeyBlock& block = *reserved[i].block;
    // What nodes hold of it is theirs, whoever made it known.
    if (block.claimed_ == end_of(reserved[i])) {
      block.claimed_ = std::clamp(block.held_, reserved[i].offset, end_of(reserved[i]));
    }
    unpin(block);
  }
  for (const KeyRange& range : known) unpin(*range.block);
}

void PrefixBank::remove_all() noexcept {
  tree_.clear();
  ranges_.reset();
  contents_.tokens = 0;
}

std::vector<PrefixBank::Listed> PrefixBank::listed() {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto slots = policy_.order();
  std::vector<char> taken(tree_.slots());
  std::vector<Listed> all;
  std::vector<std::uint32_t> path;  // of a node that comes, from it up to the first that was taken
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) {
    for (std::uint32_t node = *slot; !tree_.is_root(node) && !taken[node]; node = tree_.parent(node)) {
      path.push_back(node);
      taken[node] = 1;
    }
    for (; !path.empty(); path.pop_back()) all.push_back(listed(path.back()));
  }
  return all;
}

PrefixBank::Listed PrefixBank::listed(std::uint32_t node) const {
  const KeyRange& range = held(node);
  Listed one;
  one.shortest = range.shortest;
  one.longest = range.longest;
  one.saved_ms = range.saved_ms;
  std::vector<std::uint32_t> path;
  std::uint32_t root = node;
  for (; !tree_.is_root(root); root = tree_.parent(root)) path.push_back(root);
  one.partition = tree_.partition(root);
  for (; !path.empty(); path.pop_back()) {
    one.begin = one.tokens.size() / settings_.ids_per_token;
    const auto tokens = tree_.tokens(path.back());
    one.tokens.insert(one.tokens.end(), tokens.begin(), tokens.end());
  }
  return one;
}

std::optional<std::size_t> PrefixBank::bytes_for(std::size_t tokens) const noexcept {
  const auto block = block_bytes(static_cast<std::int64_t>(tokens));
  if (!block) return std::nullopt;
  return *block + bytes_beside(tokens);
}

/// Of tree, index, policy and ledger, with what allocators add.
std::size_t PrefixBank::bytes_beside(std::size_t tokens) const noexcept {
  constexpr std::size_t kNodeBytes = 512;
  return tokens * settings_.ids_per_token * sizeof(std::int64_t) + kNodeBytes;
}

PrefixBank::Kept PrefixBank::keep(std::string_view partition, std::span<const std::int64_t> tokens, double share) {
  Kept kept{look(partition, tokens, std::nullopt)};
  const auto count = static_cast<std::int64_t>(tokens.size() / settings_.ids_per_token);
  if (kept.lease.known_tokens() < count) {
    kept.refused = fmt::format(
        "only {} of its {} tokens could be kept: it needs more room than there is, or more than "
        "its tenant's quota",
        kept.lease.known_tokens(), count);
  } else {
    kept.lease.kept_for_ = std::string(tenant_of(partition));
    const std::lock_guard lock(mutex_);
    kept.refused = hold(kept.lease, share);
  }
  if (!kept.refused.empty()) kept.lease = {};
  return kept;
}

PrefixBank::Counters PrefixBank::counters() const {
  const std::lock_guard lock(mutex_);
  return {current(), contents_};
}

/// Empty if it is more than the capacity.
std::optional<std::size_t> PrefixBank::block_bytes(std::int64_t room) const noexcept {
  const auto tokens = static_cast<std::size_t>(room);
  if (all_token_bytes_ > 0 && tokens > account_.limit() / all_token_bytes_) return std::nullopt;
  std::size_t bytes = settings_.specs.size() * kBlockTensorOverhead + kBlockOverhead;
  for (std::size_t i = 0; i < token_bytes_.size(); ++i) {
    bytes += taken_bytes(tokens * token_bytes_[i], settings_.specs[i].options.device());
  }
  return bytes;
}

/// A block for a running pass, or null if the bank could not take it over beside what passes use. Its tensors are made
/// without the lock, with their bytes already reserved.
std::shared_ptr<KeyBlock> PrefixBank::make_block(std::unique_lock<std::mutex>& lock, std::int64_t room) {
  const auto bytes = block_bytes(room);
  const std::size_t used = pinned_bytes_ + passes_.used();
  if (!bytes || *bytes > account_.limit() || used > account_.limit() - *bytes) return nullptr;
  auto reserved = Reservation::of(passes_, *bytes);
  if (!reserved) return nullptr;
  lock.unlock();
  std::shared_ptr<KeyBlock> block;
  try {
    block = std::make_shared<KeyBlock>(settings_.specs, room, std::move(*reserved));
  } catch (const std::exception&) {  // null
  }
  lock.lock();
  return block;
}

/// The first leaf at or below a node that no running pass uses, in the order in which children came; kNoSlot if there
/// is none.
std::uint32_t PrefixBank::idle_in_place_of(std::uint32_t node) const noexcept {
  for (std::uint32_t at = node;;) {
    if (!tree_.is_leaf(at)) {
      at = tree_.first_child(at);
      continue;
    }
    if (is_idle(at)) return at;
    while (at != node && tree_.next_sibling(at) == PrefixTree::kNone) at = tree_.parent(at);
    if (at == node) return kNoSlot;
    at = tree_.next_sibling(at);
  }
}

bool PrefixBank::is_idle(std::uint32_t node) const noexcept {
  return tree_.is_leaf(node) && (*ranges_)[node].block->pins_ == 0;
}

std::string_view PrefixBank::key_of(std::uint32_t node) const noexcept {
  while (!tree_.is_root(node)) node = tree_.parent(node);
  return tree_.partition(node);
}

std::uint32_t PrefixBank::last_below(std::uint32_t node) const noexcept {
  while (!tree_.is_leaf(node)) node = tree_.first_child(node);
  return node;
}

void PrefixBank::remember(std::uint32_t leaf, EvictedKeys::Cause cause) noexcept {
  try {
    const Listed gone = listed(leaf);
    add_evicted_prefixes(evicted_, gone.partition, gone.tokens, settings_.ids_per_token, gone.begin, cause);
  } catch (const std::exception&) {  // no memory: it counts as new if it comes again
  }
}

void PrefixBank::remove(std::uint32_t leaf) noexcept {
  const KeyRange gone = std::exchange(held(leaf), {});
  leave(leaf);
  tree_.remove(leaf);
  if (tree_.empty()) ranges_.reset();
  contents_.tokens -= static_cast<std::uint64_t>(gone.tokens);
  KeyBlock& block = *gone.block;
  if (gone.block.use_count() == 1) return;  // the block goes with it
  // What was the end of the block is spare room again; where that is more than half of it, it is given back.
  if (block.claimed_ == end_of(gone)) block.claimed_ = gone.offset;
  if (block.held_ == end_of(gone)) block.held_ = gone.offset;
  block.wasteful_ = true;
  trim_if_wasteful(block);
}

void PrefixBank::trim_if_wasteful(KeyBlock& block) noexcept {
  if (block.wasteful_) block.wasteful_ = block.claimed_ > 0 && block.claimed_ <= block.room_ / 2 && !trim(block);
}

/// Gives back the spare room of a block that nobody uses now, tensor by tensor, so that it takes little memory to do
/// so. False if even that cannot be had.
bool PrefixBank::trim(KeyBlock& block) noexcept {
  // On a device the copy would be work of whatever stream is current, which knows nothing of those that write the
  // block.
  if (!block.tensors_.empty() && !block.tensors_.front().is_cpu()) return false;
  std::size_t transient = 0;
  for (const std::size_t bytes : token_bytes_) transient = std::max(transient, bytes);
  transient *= static_cast<std::size_t>(block.claimed_);
  const auto reserved = Reservation::of(account_, transient);
  if (!reserved) return false;
  try {
    const c10::InferenceMode normal(false);
    for (std::size_t i = 0; i < block.tensors_.size(); ++i) {
      at::Tensor& tensor = block.tensors_[i];
      const std::size_t before = tensor.nbytes();
      tensor = tensor.narrow(settings_.specs[i].token_dim, 0, block.claimed_).clone(at::MemoryFormat::Contiguous);
      block.reserved_.shrink_to(block.reserved_.bytes() - (before - tensor.nbytes()));
    }
  } catch (const std::exception&) {  // the other tensors stay larger than they need to be
  }
  block.room_ = block.claimed_;
  return true;
}

/// Why not; empty: the lease holds its blocks on. The ledger has a record of its tenant, to which they are charged.
std::string PrefixBank::hold(PrefixLease& lease, double share) {
  TenantLedger::Tenant* const tenant = ledger_ ? ledger_->find(lease.kept_for_) : nullptr;
  std::size_t more = 0;
  for (const KeyRange& range : lease.known_) {
    if (range.block->kept_++ == 0) more += range.block->reserved_.bytes();
  }
  lease.kept_ = true;
  contents_.kept_bytes += more;
  if (tenant != nullptr) tenant->kept_bytes += more;
  const auto part_of = [share](std::size_t whole) {
    return static_cast<std::size_t>(static_cast<double>(whole) * share);
  };
  std::string refused;
  if (const std::size_t most = part_of(capacity()); contents_.kept_bytes > most) {
    refused = fmt::format("all pinned prefixes would take {} bytes; {} may", contents_.kept_bytes, most);
  } else if (tenant != nullptr && tenant->account.limit() != TenantLedger::kNoQuota &&
             tenant->kept_bytes > part_of(tenant->account.limit())) {
    refused = fmt::format("the pinned prefixes of its tenant would take {} bytes; {} may", tenant->kept_bytes,
                          part_of(tenant->account.limit()));
  }
  if (!refused.empty()) let_go(lease, lease.known_);
  return refused;
}

void PrefixBank::let_go(PrefixLease& lease, const std::vector<KeyRange>& known) noexcept {
  if (!std::exchange(lease.kept_, false)) return;
  std::size_t less = 0;
  for (const KeyRange& range : known) {
    if (--range.block->kept_ == 0) less += range.block->reserved_.bytes();
  }
  contents_.kept_bytes -= less;
  if (TenantLedger::Tenant* const tenant = ledger_ ? ledger_->find(lease.kept_for_) : nullptr) {
    tenant->kept_bytes -= less;
  }
}

void PrefixBank::pin(KeyBlock& block) noexcept {
  if (block.pins_++ == 0 && is_held(block)) pinned_bytes_ += block.reserved_.bytes();
}

void PrefixBank::unpin(KeyBlock& block) noexcept {
  if (--block.pins_ > 0 || !is_held(block)) return;
  pinned_bytes_ -= block.reserved_.bytes();
  trim_if_wasteful(block);
}

}  // namespace llmcache
