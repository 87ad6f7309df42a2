#include "bank/prefix_bank.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

namespace llmcache {
namespace {

/// What a tensor takes beside its data.
constexpr std::size_t kTensorOverhead = sizeof(c10::TensorImpl) + sizeof(c10::StorageImpl);

at::Tensor empty_like_spec(const KeySpec& spec, std::int64_t tokens) {
  auto sizes = spec.sizes;
  sizes[static_cast<std::size_t>(spec.token_dim)] = tokens;
  return at::empty(sizes, spec.options);
}

std::size_t bytes_a_token(const KeySpec& spec) {
  std::size_t bytes = spec.options.dtype().itemsize();
  for (std::size_t d = 0; d < spec.sizes.size(); ++d) {
    if (static_cast<std::int64_t>(d) != spec.token_dim) bytes *= static_cast<std::size_t>(spec.sizes[d]);
  }
  return bytes;
}

}  // namespace

KeyBlock::KeyBlock(const std::vector<KeySpec>& specs, std::int64_t room, std::size_t bytes, MemoryAccount& account)
    : room_(room), bytes_(0), account_(account) {
  tensors_.reserve(specs.size());
  for (const KeySpec& spec : specs) tensors_.push_back(empty_like_spec(spec, room));
  bytes_ = bytes;  // from here on its own to release
}

KeyBlock::~KeyBlock() {
  tensors_.clear();
  account_.release(bytes_);
}

PrefixLease::PrefixLease(PrefixLease&& other) noexcept
    : bank_(std::exchange(other.bank_, nullptr)),
      known_(std::move(other.known_)),
      reserved_(std::move(other.reserved_)),
      known_tokens_(other.known_tokens_),
      continues_(other.continues_),
      committed_(other.committed_) {}

PrefixLease& PrefixLease::operator=(PrefixLease&& other) noexcept {
  if (this != &other) {
    if (bank_ != nullptr) bank_->release(*this);
    bank_ = std::exchange(other.bank_, nullptr);
    known_ = std::move(other.known_);
    reserved_ = std::move(other.reserved_);
    known_tokens_ = other.known_tokens_;
    continues_ = other.continues_;
    committed_ = other.committed_;
  }
  return *this;
}

PrefixLease::~PrefixLease() {
  if (bank_ != nullptr) bank_->release(*this);
}

PrefixBank::PrefixBank(Settings settings)
    : settings_(std::move(settings)),
      account_(settings_.capacity_bytes),
      memory_(account_),
      tree_(settings_.token_width, &memory_),
      policy_(settings_.eviction, &memory_) {
  for (const KeySpec& spec : settings_.specs) {
    const auto bytes = bytes_a_token(spec);
    token_bytes_ += bytes;
    largest_bytes_ = std::max(largest_bytes_, bytes);
  }
}

PrefixBank::~PrefixBank() = default;

std::size_t PrefixBank::bytes_of(std::int64_t tokens) const noexcept {
  return static_cast<std::size_t>(tokens) * token_bytes_ + settings_.specs.size() * kTensorOverhead;
}

EntryCost PrefixBank::cost_of(std::int64_t tokens, double saved_ms) const noexcept {
  EntryCost cost;
  cost.bytes = static_cast<std::size_t>(tokens) * token_bytes_;
  cost.saved_ms = saved_ms * static_cast<double>(tokens);
  return cost;
}

PrefixLease PrefixBank::find(std::string_view space, std::span<const std::int64_t> tokens, double now_s) {
  PrefixLease lease;
  const std::lock_guard lock(mutex_);
  const auto path = tree_.walk(space, tokens);
  lease.known_.reserve(path.size());
  lease.bank_ = this;
  for (const auto& step : path) {
    if (step.tokens == 0) continue;
    const KeyRange& range = tree_.payload(step.slot);
    lease.known_.push_back({range.block, range.offset, static_cast<std::int64_t>(step.tokens)});
    ++range.block->pins_;
    lease.known_tokens_ += static_cast<std::int64_t>(step.tokens);
  }
  if (!path.empty()) {
    const auto& last = path.back();
    lease.continues_ = last.tokens == tree_.tokens(last.slot) && tree_.first_child(last.slot) == Tree::kNone;
  }
  touch(path, now_s);
  return lease;
}

void PrefixBank::touch(const std::vector<Tree::Step>& path, double now_s) {
  // The end first: what is older goes first, and a branch goes from its end.
  for (auto step = path.rbegin(); step != path.rend(); ++step) policy_.hit(step->slot, now_s);
}

std::shared_ptr<KeyBlock> PrefixBank::make_block(std::int64_t room, double now_s) {
  const std::size_t bytes = bytes_of(room);
  if (bytes > account_.limit()) return nullptr;
  while (!account_.try_reserve(bytes)) {
    if (!evict_one(now_s)) return nullptr;
  }
  for (;;) {
    try {
      const std::pmr::polymorphic_allocator<KeyBlock> allocator(&memory_);
      return std::allocate_shared<KeyBlock>(allocator, settings_.specs, room, bytes, account_);
    } catch (const std::bad_alloc&) {
      if (evict_one(now_s)) continue;
    } catch (const std::exception&) {  // LibTorch has no memory
    }
    account_.release(bytes);
    return nullptr;
  }
}

bool PrefixBank::reserve(PrefixLease& lease, const KeyRange* after, std::int64_t count, std::int64_t room,
                         double now_s) {
  lease.reserved_.reserve(lease.reserved_.size() + 2);
  lease.bank_ = this;
  const std::lock_guard lock(mutex_);
  const std::size_t before = lease.reserved_.size();
  if (after != nullptr) {
    KeyBlock& block = *after->block;
    const auto spare = after->offset + after->tokens == block.claimed_ ? block.room_ - block.claimed_ : 0;
    if (const auto taken = std::min(spare, count); taken > 0) {
      lease.reserved_.push_back({after->block, block.claimed_, taken});
      block.claimed_ += taken;
      ++block.pins_;
      count -= taken;
    }
  }
  if (count == 0) return true;
  auto block = room > count ? make_block(room, now_s) : nullptr;
  if (!block) block = make_block(count, now_s);
  if (block) {
    block->claimed_ = count;
    block->pins_ = 1;
    lease.reserved_.push_back({std::move(block), 0, count});
    return true;
  }
  if (lease.reserved_.size() > before) {
    KeyBlock& spare = *lease.reserved_.back().block;
    spare.claimed_ = lease.reserved_.back().offset;
    --spare.pins_;
    lease.reserved_.pop_back();
  }
  ++counters_.rejected;
  return false;
}

void PrefixBank::commit(PrefixLease& lease, std::string_view space, std::span<const std::int64_t> tokens,
                        std::span<const KeyRange> ranges, double saved_ms, double now_s) {
  const std::lock_guard lock(mutex_);
  lease.committed_ = true;
  for (;;) {
    try {
      insert(space, tokens, ranges, saved_ms, now_s);
      return;
    } catch (const std::bad_alloc&) {
      if (evict_one(now_s)) continue;
      ++counters_.rejected;
      return;
    }
  }
}

void PrefixBank::insert(std::string_view space, std::span<const std::int64_t> tokens, std::span<const KeyRange> ranges,
                        double saved_ms, double now_s) {
  const auto width = settings_.token_width;
  auto path = tree_.walk(space, tokens);
  std::int64_t known = 0;
  for (const auto& step : path) known += static_cast<std::int64_t>(step.tokens);
  if (known * static_cast<std::int64_t>(width) >= static_cast<std::int64_t>(tokens.size())) {
    touch(path, now_s);
    return;
  }
  // Each step below leaves a tree that is right, so that a later one may fail.
  const auto in_policy = [&](std::int64_t count, auto make) {
    const auto slot = tree_.next_slot();
    policy_.insert(slot, cost_of(count, saved_ms), now_s);
    try {
      make();
    } catch (...) {
      policy_.erase(slot);
      throw;
    }
    ++counters_.entries;
    return slot;
  };
  path.reserve(path.size() + ranges.size() + 1);
  Tree::Slot at = path.empty() ? tree_.root(space) : path.back().slot;
  if (!path.empty() && path.back().tokens < tree_.tokens(at)) {
    const auto cut = static_cast<std::int64_t>(path.back().tokens);
    const KeyRange whole = tree_.payload(at);
    const auto slot = in_policy(cut, [&] {
      tree_.split(at, static_cast<std::size_t>(cut), {whole.block, whole.offset, cut},
                  {whole.block, whole.offset + cut, whole.tokens - cut});
    });
    at = path.back().slot = slot;
  }
  bool added = false;
  try {
    std::int64_t position = 0;
    for (const KeyRange& range : ranges) {
      const auto skip = std::min(range.tokens, std::max<std::int64_t>(known - position, 0));
      const KeyRange rest{range.block, range.offset + skip, range.tokens - skip};
      position += skip;
      if (rest.tokens == 0) continue;
      const auto own =
          tokens.subspan(static_cast<std::size_t>(position) * width, static_cast<std::size_t>(rest.tokens) * width);
      KeyRange& last = tree_.payload(at);
      const bool grows = !tree_.is_root(at) && tree_.first_child(at) == Tree::kNone && last.block == rest.block &&
                         last.offset + last.tokens == rest.offset;
      if (grows) {
        tree_.extend(at, own);
        last.tokens += rest.tokens;
      } else {
        at = in_policy(rest.tokens, [&] { tree_.add(at, own, rest); });
        path.push_back({at, static_cast<std::size_t>(rest.tokens)});
      }
      position += rest.tokens;
      counters_.tokens += static_cast<std::uint64_t>(rest.tokens);
      if (!std::exchange(added, true)) ++counters_.insertions;
    }
  } catch (...) {
    tree_.drop_if_empty(at);
    throw;
  }
  touch(path, now_s);
}

/// A node below `slot`, or that itself, which can go: no children, and no running pass uses its block.
PrefixBank::Tree::Slot PrefixBank::leaf_below(Tree::Slot slot) noexcept {
  constexpr int kTries = 64;  // among many children that are all in use, the next victim does as well
  const Tree::Slot top = slot;
  for (int i = 0; i < kTries; ++i) {
    while (tree_.first_child(slot) != Tree::kNone) slot = tree_.first_child(slot);
    if (tree_.payload(slot).block->pins_ == 0) return slot;
    while (slot != top && tree_.next_sibling(slot) == Tree::kNone) slot = tree_.parent(slot);
    if (slot == top) break;
    slot = tree_.next_sibling(slot);
  }
  return Tree::kNone;
}

bool PrefixBank::evict_one(double now_s) noexcept {
  for (std::size_t tries = policy_.size(); tries > 0; --tries) {
    const auto victim = policy_.victim(now_s);
    if (!victim) return false;
    const auto leaf = leaf_below(*victim);
    if (leaf == Tree::kNone) {
      policy_.hit(*victim, now_s);  // in use
      continue;
    }
    const auto parent = tree_.parent(leaf);
    const bool shared = !tree_.is_root(parent) && tree_.payload(parent).block == tree_.payload(leaf).block;
    counters_.tokens -= static_cast<std::uint64_t>(tree_.payload(leaf).tokens);
    --counters_.entries;
    ++counters_.evictions;
    policy_.erase(leaf);
    tree_.remove(leaf);
    if (shared) compact(parent);
    return true;
  }
  return false;
}

/// Gives back the room in the block of a node without children that nobody else uses, where that is half of it.
void PrefixBank::compact(Tree::Slot slot) noexcept {
  KeyRange& range = tree_.payload(slot);
  KeyBlock& block = *range.block;
  if (tree_.first_child(slot) != Tree::kNone || block.pins_ > 0 || range.block.use_count() > 1) return;
  if (2 * range.tokens > block.room_) return;
  // One tensor after the other, so that little more room is taken meanwhile.
  const std::size_t transient = largest_bytes_ * static_cast<std::size_t>(range.tokens) + kTensorOverhead;
  if (!account_.try_reserve(transient)) return;
  try {
    for (std::size_t i = 0; i < block.tensors_.size(); ++i) {
      const KeySpec& spec = settings_.specs[i];
      auto smaller = empty_like_spec(spec, range.tokens);
      smaller.copy_(block.tensors_[i].narrow(spec.token_dim, range.offset, range.tokens));
      block.tensors_[i] = std::move(smaller);
    }
  } catch (const std::exception&) {  // some are replaced, so that the node is of no use
    counters_.tokens -= static_cast<std::uint64_t>(range.tokens);
    --counters_.entries;
    ++counters_.evictions;
    policy_.erase(slot);
    tree_.remove(slot);
    account_.release(transient);
    return;
  }
  const std::size_t bytes = bytes_of(range.tokens);
  account_.release(block.bytes_ - bytes + transient);
  block.bytes_ = bytes;
  block.room_ = block.claimed_ = range.tokens;
  range.offset = 0;
}

void PrefixBank::release(PrefixLease& lease) noexcept {
  {
    const std::lock_guard lock(mutex_);
    for (const KeyRange& range : lease.known_) --range.block->pins_;
    for (auto range = lease.reserved_.rbegin(); range != lease.reserved_.rend(); ++range) {
      --range->block->pins_;
      const bool last = range->block->claimed_ == range->offset + range->tokens;
      if (!lease.committed_ && last) range->block->claimed_ = range->offset;
    }
  }
  lease.known_.clear();
  lease.reserved_.clear();
}

void PrefixBank::clear() {
  const std::lock_guard lock(mutex_);
  policy_.clear();
  std::destroy_at(&tree_);
  std::construct_at(&tree_, settings_.token_width, &memory_);
  counters_.entries = 0;
  counters_.tokens = 0;
}

PrefixBank::Counters PrefixBank::counters() const {
  const std::lock_guard lock(mutex_);
  Counters counters = counters_;
  counters.bytes = account_.used();
  counters.peak_bytes = account_.peak();
  return counters;
}

}  // namespace llmcache
