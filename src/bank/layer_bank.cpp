#include "bank/layer_bank.h"

#include <ATen/ATen.h>

#include <exception>
#include <new>

#include "bank/tensor_bytes.h"

namespace llmcache {
namespace {

/// What a FingerprintIndex takes of itself, at most.
constexpr std::size_t kIndexBytes = 1024;

bool same_inputs(const LayerEntry& entry, const std::vector<at::Tensor>& inputs) {
  if (entry.inputs().size() != inputs.size()) return false;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& kept = entry.inputs()[i];
    if (kept.defined() != inputs[i].defined()) return false;
    if (kept.defined() && (kept.scalar_type() != inputs[i].scalar_type() || !at::equal(kept, inputs[i]))) return false;
  }
  return true;
}

}  // namespace

LayerBank::Space::Space(const std::vector<const Fingerprinter*>& fingerprinters, MemoryAccount& given,
                        std::pmr::memory_resource* memory)
    : account(given), reserved(kIndexBytes * fingerprinters.size()), indices(memory), slots(memory), free(memory) {
  indices.reserve(fingerprinters.size());
  if (!account.try_reserve(reserved)) throw std::bad_alloc();
  for (const Fingerprinter* fingerprinter : fingerprinters) {
    indices.emplace_back(fingerprinter->options().kind, memory);
  }
}

LayerBank::Space::~Space() { account.release(reserved); }

LayerBank::LayerBank(Settings settings, std::vector<const Fingerprinter*> fingerprinters)
    : settings_(std::move(settings)),
      fingerprinters_(std::move(fingerprinters)),
      account_(settings_.capacity_bytes, settings_.total),
      memory_(account_),
      spaces_(&memory_),
      nodes_(&memory_),
      free_(&memory_),
      by_key_(&memory_),
      policy_(settings_.eviction, &memory_),
      ttl_(settings_.ttl_seconds, &memory_),
      generations_(fingerprinters_.size(), 0) {}

std::optional<LayerBank::Hit> LayerBank::find(std::string_view space, std::size_t which, const Fingerprint& fingerprint,
                                              double tau, double now_s) {
  const std::lock_guard lock(mutex_);
  flush_old(now_s);
  follow_centres();
  const auto it = spaces_.find(space);
  // A fingerprint from before the centre changed cannot be compared any more: its request is a miss.
  if (it == spaces_.end() || fingerprint.generation != generations_[which]) return std::nullopt;
  const auto match = it->second.indices[which].best(fingerprint, tau);
  if (!match) return std::nullopt;
  const std::uint32_t slot = it->second.slots[match->id];
  policy_.hit(slot, now_s);
  const Node& node = nodes_[slot];
  return Hit{node.entry, match->similarity, slot, node.checks, node.checks == 0 ? 0 : node.drift_sum / node.checks};
}

void LayerBank::insert(std::string_view space, const Candidate& candidate, double now_s) {
  const std::lock_guard lock(mutex_);
  try {
    insert_unless_held(space, candidate, now_s);
  } catch (const std::exception&) {  // no memory to compare it with what is held
    ++counters_.rejected;
  }
}

void LayerBank::insert_unless_held(std::string_view space, const Candidate& candidate, double now_s) {
  std::size_t bytes = candidate.hidden.nbytes() + kTensorOverhead;
  for (const at::Tensor& input : candidate.inputs) {
    if (input.defined()) bytes += input.nbytes() + kTensorOverhead;
  }
  flush_old(now_s);
  follow_centres();
  const auto fingerprints = current(candidate);
  if (!fingerprints || holds_same(space, candidate, now_s)) return;
  bool room = bytes <= account_.limit();
  while (room && !account_.try_reserve(bytes)) room = evict_one(now_s);
  if (!room) {
    ++counters_.rejected;
    return;
  }
  std::shared_ptr<const LayerEntry> entry;
  for (;;) {
    try {
      if (!entry) {
        const std::pmr::polymorphic_allocator<LayerEntry> allocator(&memory_);
        entry = std::allocate_shared<LayerEntry>(allocator, candidate.number, candidate.hidden, candidate.inputs, bytes,
                                                 account_, &memory_);
      }
      place(space, candidate, entry, *fingerprints, now_s);
      ++counters_.insertions;
      return;
    } catch (const std::bad_alloc&) {
      if (evict_one(now_s)) continue;
      ++counters_.rejected;
      if (!entry) account_.release(bytes);
      return;
    }
  }
}

/// Makes the entry findable, or throws std::bad_alloc and changes nothing.
void LayerBank::place(std::string_view space, const Candidate& candidate,
                      const std::shared_ptr<const LayerEntry>& entry, const std::vector<Fingerprint>& fingerprints,
                      double now_s) {
  auto it = spaces_.find(space);
  if (it == spaces_.end()) {
    it = spaces_.try_emplace(std::pmr::string(space, &memory_), fingerprinters_, account_, &memory_).first;
  }
  Space& own = it->second;
  std::uint32_t slot = 0;
  std::uint32_t local = 0;
  std::size_t indexed = 0;
  bool in_policy = false;
  bool keyed = false;
  try {
    // Whatever is freed later finds its place in the lists without taking memory.
    if (free_.empty()) {
      nodes_.emplace_back(&memory_);
      try {
        free_.reserve(nodes_.capacity());
      } catch (...) {
        nodes_.pop_back();
        throw;
      }
      free_.push_back(static_cast<std::uint32_t>(nodes_.size() - 1));
    }
    slot = free_.back();
    if (own.free.empty()) {
      own.slots.push_back(slot);
      try {
        own.free.reserve(own.slots.capacity());
      } catch (...) {
        own.slots.pop_back();
        throw;
      }
      own.free.push_back(static_cast<std::uint32_t>(own.slots.size() - 1));
    }
    local = own.free.back();
    Node& node = nodes_[slot];
    for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
      if (fingerprinters_[which]->needs_state()) {
        node.states.insert(node.states.end(), candidate.states[which].begin(), candidate.states[which].end());
      }
    }
    if (!fingerprinters_.empty() && !fingerprinters_[0]->needs_state()) {
      node.ids.assign(candidate.ids.begin(), candidate.ids.end());
    }
    for (; indexed < own.indices.size(); ++indexed) own.indices[indexed].insert(local, fingerprints[indexed]);
    // Another request with this key, if there is one, stays the one that is found by it.
    keyed = by_key_.try_emplace(candidate.key, slot).second;
    const std::size_t bytes = static_cast<std::size_t>(entry->hidden().nbytes());
    policy_.insert(slot, {bytes, candidate.saved_ms, candidate.key}, now_s);
    in_policy = true;
    ttl_.insert(slot, now_s);
    node.entry = entry;
    node.space = it;
    node.local = local;
    node.key = candidate.key;
    own.slots[local] = slot;
    own.free.pop_back();
    free_.pop_back();
    ++own.entries;
    ++counters_.entries;
  } catch (...) {
    if (in_policy) policy_.erase(slot);
    if (keyed) by_key_.erase(candidate.key);
    while (indexed > 0) own.indices[--indexed].erase(local);
    if (slot < nodes_.size() && !nodes_[slot].entry) {
      std::pmr::vector<float>(&memory_).swap(nodes_[slot].states);
      std::pmr::vector<std::int64_t>(&memory_).swap(nodes_[slot].ids);
    }
    drop_if_empty(it);
    throw;
  }
}

/// Is a request with the same inputs there already? Then it counts as used.
bool LayerBank::holds_same(std::string_view space, const Candidate& candidate, double now_s) {
  const auto it = by_key_.find(candidate.key);
  if (it == by_key_.end()) return false;
  const Node& node = nodes_[it->second];
  if (node.space->first != space || !same_inputs(*node.entry, candidate.inputs)) return false;
  policy_.hit(it->second, now_s);
  return true;
}

/// The candidate's fingerprints, made again where the centre has changed since. Empty if one means nothing.
std::optional<std::vector<Fingerprint>> LayerBank::current(const Candidate& candidate) {
  std::vector<Fingerprint> fingerprints;
  for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
    std::optional<Fingerprint> one = candidate.fingerprints[which];
    if (one && one->generation != generations_[which]) {
      one = fingerprinters_[which]->make(candidate.states[which], candidate.ids);
      // Made while the centre changed once more: too new. The next call of the bank follows.
      if (one && one->generation != generations_[which]) one.reset();
    }
    if (!one) return std::nullopt;
    fingerprints.push_back(std::move(*one));
  }
  return fingerprints;
}

std::optional<Fingerprint> LayerBank::fingerprint_of(const Node& node, std::size_t which) const {
  if (!fingerprinters_[which]->needs_state()) return fingerprinters_[which]->make({}, node.ids);
  std::size_t begin = 0;
  for (std::size_t i = 0; i < which; ++i) begin += static_cast<std::size_t>(fingerprinters_[i]->dims());
  const auto dims = static_cast<std::size_t>(fingerprinters_[which]->dims());
  return fingerprinters_[which]->make(std::span(node.states).subspan(begin, dims), {});
}

/// Makes all fingerprints of a Fingerprinter again whose centre has changed.
void LayerBank::follow_centres() {
  for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
    const std::uint64_t generation = fingerprinters_[which]->generation();
    if (generation == generations_[which]) continue;
    generations_[which] = generation;
    for (auto& [name, space] : spaces_) space.indices[which].clear();
    for (std::uint32_t slot = 0; slot < nodes_.size(); ++slot) {
      const Node& node = nodes_[slot];
      if (!node.entry) continue;
      bool placed = false;
      try {
        const auto fingerprint = fingerprint_of(node, which);
        if (fingerprint && fingerprint->generation == generation) {
          node.space->second.indices[which].insert(node.local, *fingerprint);
          placed = true;
        }
      } catch (const std::bad_alloc&) {  // the index needs more room in this order, or there is none: this one goes
      }
      if (!placed) {
        remove(slot);
        ++counters_.evictions;
      }
    }
  }
}

void LayerBank::flush_old(double now_s) {
  while (const auto slot = ttl_.expired(now_s)) {
    remove(*slot);
    ++counters_.expired;
  }
  if (settings_.flush_below <= 0) return;
  for (auto slot = policy_.victim(now_s); slot; slot = policy_.victim(now_s)) {
    const auto score = policy_.score(*slot, now_s);
    if (!score || *score >= settings_.flush_below) return;
    remove(*slot);
    ++counters_.decayed;
  }
}

bool LayerBank::evict_one(double now_s) {
  const auto slot = policy_.victim(now_s);
  if (!slot) return false;
  remove(*slot);
  ++counters_.evictions;
  return true;
}

void LayerBank::remove(std::uint32_t slot) noexcept {
  Node& node = nodes_[slot];
  const auto space = node.space;
  for (FingerprintIndex& index : space->second.indices) index.erase(node.local);
  space->second.free.push_back(node.local);
  --space->second.entries;
  if (const auto it = by_key_.find(node.key); it != by_key_.end() && it->second == slot) by_key_.erase(it);
  policy_.erase(slot);
  ttl_.erase(slot);
  counters_.checked_entries -= node.checks == 0 ? 0 : 1;
  node.checks = 0;
  node.drift_sum = 0;
  node.entry.reset();
  std::pmr::vector<float>(&memory_).swap(node.states);
  std::pmr::vector<std::int64_t>(&memory_).swap(node.ids);
  free_.push_back(slot);
  --counters_.entries;
  drop_if_empty(space);
}

void LayerBank::drop_if_empty(Spaces::iterator space) noexcept {
  if (space->second.entries == 0) spaces_.erase(space);
}

void LayerBank::record(const Hit& hit, double drift, bool within_tolerance) {
  const std::lock_guard lock(mutex_);
  if (hit.slot >= nodes_.size() || nodes_[hit.slot].entry != hit.entry) return;  // gone already
  if (!within_tolerance) {
    remove(hit.slot);
    ++counters_.dropped;
    return;
  }
  Node& node = nodes_[hit.slot];
  counters_.checked_entries += node.checks == 0 ? 1 : 0;
  ++node.checks;
  node.drift_sum += drift;
}

void LayerBank::clear() {
  const std::lock_guard lock(mutex_);
  policy_.clear();
  ttl_.clear();
  spaces_.clear();
  std::pmr::vector<Node>(&memory_).swap(nodes_);
  std::pmr::vector<std::uint32_t>(&memory_).swap(free_);
  decltype(by_key_)(&memory_).swap(by_key_);
  counters_.entries = 0;
  counters_.checked_entries = 0;
}

LayerBank::Counters LayerBank::counters() const {
  const std::lock_guard lock(mutex_);
  Counters counters = counters_;
  counters.bytes = account_.used();
  counters.peak_bytes = account_.peak();
  return counters;
}

}  // namespace llmcache
