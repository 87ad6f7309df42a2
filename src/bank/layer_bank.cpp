#include "bank/layer_bank.h"

#include <ATen/ATen.h>

#include <exception>
#include <new>

#include "bank/tensor_bytes.h"

namespace llmcache {
namespace {

/// What a FingerprintIndex takes of itself, at most.
constexpr std::size_t kIndexBytes = 1024;
/// What an entry takes beside its tensors, with fingerprints and its places in indices, policy and ledger, about.
constexpr std::size_t kLayerBeside = sizeof(LayerEntry) + 1024;
/// Of entries that went: there is a bank for each layer.
constexpr std::size_t kRememberedEntries = std::size_t{1} << 12;

/// Of its tensors.
std::size_t tensor_bytes(const LayerBank::Candidate& candidate) {
  std::size_t bytes = taken_bytes(candidate.hidden) + kTensorOverhead;
  for (const at::Tensor& input : candidate.inputs) {
    if (input.defined()) bytes += taken_bytes(input) + kTensorOverhead;
  }
  return bytes;
}

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

LayerBank::Partition::Partition(const std::vector<const Fingerprinter*>& fingerprinters, MemoryAccount& account,
                                std::pmr::memory_resource* memory)
    : indices(memory), slots(memory) {
  auto room = Reservation::of(account, kIndexBytes * fingerprinters.size());
  if (!room) throw std::bad_alloc();
  reserved = std::move(*room);
  indices.reserve(fingerprinters.size());
  for (const Fingerprinter* fingerprinter : fingerprinters) {
    indices.emplace_back(fingerprinter->options().kind, memory);
  }
}

LayerBank::LayerBank(Settings settings, std::vector<const Fingerprinter*> fingerprinters)
    : CapacityBank(settings.capacity_bytes, settings.eviction, settings.total, kRememberedEntries),
      settings_(std::move(settings)),
      fingerprinters_(std::move(fingerprinters)),
      partitions_(&memory_),
      nodes_(&memory_),
      by_key_(&memory_),
      ttl_(settings_.ttl_seconds, &memory_),
      generations_(fingerprinters_.size(), 0) {}

std::optional<LayerBank::Hit> LayerBank::find(std::string_view partition, std::size_t which,
                                              const Fingerprint& fingerprint, double tau, double now_s) {
  const std::lock_guard lock(mutex_);
  flush_old(now_s);
  follow_centres();
  const auto it = partitions_.find(partition);
  // A fingerprint from before the centre changed cannot be compared any more: its request is a miss.
  if (it == partitions_.end() || fingerprint.generation != generations_[which]) return std::nullopt;
  const auto match = it->second.indices[which].best(fingerprint, tau);
  if (!match) return std::nullopt;
  const std::uint32_t slot = it->second.slots[match->id];
  touch(slot, now_s);
  const Node& node = nodes_[slot];
  return Hit{node.entry, match->similarity, slot, node.audits, node.audits == 0 ? 0 : node.error_sum / node.audits};
}

void LayerBank::insert(std::string_view partition, const Candidate& candidate, double now_s) {
  const std::lock_guard lock(mutex_);
  try {
    insert_unless_held(partition, candidate, now_s);
  } catch (const std::exception&) {  // no memory to compare it with what is held
    ++rejected_;
  }
}

void LayerBank::insert_unless_held(std::string_view partition, const Candidate& candidate, double now_s) {
  flush_old(now_s);
  follow_centres();
  const auto fingerprints = current_fingerprints(candidate);
  if (!fingerprints || holds_same(partition, candidate, now_s)) return;
  auto reserved = make_room(partition, tensor_bytes(candidate), kLayerBeside, now_s);
  std::shared_ptr<const LayerEntry> entry;
  const bool kept = reserved && take_evicting(partition, now_s, [&] {
                      if (!entry) entry = make_entry(candidate, *reserved);
                      insert_indexed(partition, candidate, entry, *fingerprints, now_s);
                    });
  ++(kept ? insertions_ : rejected_);
}

/// Takes what is reserved, unless it throws.
std::shared_ptr<const LayerEntry> LayerBank::make_entry(const Candidate& candidate, Reservation& reserved) {
  const std::pmr::polymorphic_allocator<LayerEntry> allocator(&memory_);
  return std::allocate_shared<LayerEntry>(allocator, candidate.number, candidate.hidden, candidate.inputs, reserved,
                                          &memory_);
}

LayerBank::Restored LayerBank::restore(std::string_view partition, Candidate candidate, double now_s) {
  for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
    candidate.fingerprints.push_back(fingerprinters_[which]->make(candidate.states[which], candidate.ids));
  }
  const std::size_t bytes = tensor_bytes(candidate);
  const std::lock_guard lock(mutex_);
  try {
    flush_old(now_s);
    follow_centres();
    const auto fingerprints = current_fingerprints(candidate);
    if (!fingerprints) return Restored::kNoFingerprint;
    if (holds_same(partition, candidate, now_s)) return Restored::kKnown;
    if (!fits(partition, bytes, kLayerBeside)) return Restored::kNoRoom;
    auto reserved = make_room(partition, bytes, kLayerBeside, now_s);
    if (!reserved) return Restored::kNoRoom;
    insert_indexed(partition, candidate, make_entry(candidate, *reserved), *fingerprints, now_s);
  } catch (const std::exception&) {  // no memory
    return Restored::kNoRoom;
  }
  ++insertions_;
  return Restored::kTaken;
}

std::vector<LayerBank::Place> LayerBank::listed() {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto slots = policy_.order();
  std::vector<Place> all;
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) all.push_back({*slot, nodes_[*slot].entry});
  return all;
}

std::optional<LayerBank::Kept> LayerBank::look(const Place& place) const {
  const auto entry = place.entry.lock();
  const std::lock_guard lock(mutex_);
  const Node* const node = nodes_.find(place.slot);
  if (!entry || node == nullptr || node->entry != entry) return std::nullopt;
  return Kept{entry,
              std::string(node->partition->first),
              {node->states.begin(), node->states.end()},
              node->audits,
              node->error_sum,
              node->saved_ms};
}

void LayerBank::use(std::uint64_t key, double now_s) {
  const std::lock_guard lock(mutex_);
  if (const auto it = by_key_.find(key); it != by_key_.end()) touch(it->second, now_s);
}

/// Makes the entry findable, or throws and changes nothing.
void LayerBank::insert_indexed(std::string_view partition, const Candidate& candidate,
                               const std::shared_ptr<const LayerEntry>& entry,
                               const std::vector<Fingerprint>& fingerprints, double now_s) {
  auto it = partitions_.find(partition);
  if (it == partitions_.end()) {
    it = partitions_.try_emplace(std::pmr::string(partition, &memory_), fingerprinters_, account_, &memory_).first;
  }
  std::uint32_t slot = kNoSlot;
  try {
    slot = nodes_.insert(make_node(candidate, entry, it));
    Node& node = nodes_[slot];
    if (node.audits > 0) ++refreshes_.audited_entries;
    node.local = it->second.slots.insert(slot);
    for (std::size_t which = 0; which < fingerprints.size(); ++which) {
      it->second.indices[which].insert(node.local, fingerprints[which]);
    }
    // Another request with this key, if there is one, stays the one that is found by it.
    by_key_.try_emplace(candidate.key, slot);
    enter(slot, partition, {entry->hidden().nbytes(), candidate.saved_ms, candidate.key}, now_s);
    ttl_.insert(slot, now_s);
  } catch (...) {
    if (slot != kNoSlot) {
      remove(slot);
    } else {
      drop_if_empty(it);
    }
    throw;
  }
}

LayerBank::Node LayerBank::make_node(const Candidate& candidate, const std::shared_ptr<const LayerEntry>& entry,
                                     Partitions::iterator partition) {
  Node node{entry, partition, candidate.key, std::pmr::vector<float>(&memory_),
            std::pmr::vector<std::int64_t>(&memory_)};
  for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
    if (!fingerprinters_[which]->needs_state()) continue;
    node.states.insert(node.states.end(), candidate.states[which].begin(), candidate.states[which].end());
  }
  if (!fingerprinters_.empty() && !fingerprinters_[0]->needs_state()) {
    node.ids.assign(candidate.ids.begin(), candidate.ids.end());
  }
  node.audits = candidate.audits;
  node.error_sum = candidate.error_sum;
  node.saved_ms = candidate.saved_ms;
  return node;
}

/// Is a request with the same inputs there already? Then it counts as used.
bool LayerBank::holds_same(std::string_view partition, const Candidate& candidate, double now_s) {
  const auto it = by_key_.find(candidate.key);
  if (it == by_key_.end()) return false;
  const Node& node = nodes_[it->second];
  if (node.partition->first != partition || !same_inputs(*node.entry, candidate.inputs)) return false;
  touch(it->second, now_s);
  return true;
}

/// The candidate's fingerprints, made again where the centre has changed since. Empty if one means nothing.
std::optional<std::vector<Fingerprint>> LayerBank::current_fingerprints(const Candidate& candidate) {
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

void LayerBank::follow_centres() {
  for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
    const std::uint64_t generation = fingerprinters_[which]->generation();
    if (generation != generations_[which]) follow_centre(which, generation);
  }
}

/// Makes all fingerprints of a Fingerprinter again whose centre has changed.
void LayerBank::follow_centre(std::size_t which, std::uint64_t generation) {
  generations_[which] = generation;
  for (auto& [name, partition] : partitions_) partition.indices[which].clear();
  for (std::uint32_t slot = 0; slot < nodes_.end_slot(); ++slot) {
    const Node* const node = nodes_.find(slot);
    if (node != nullptr && !index_again(*node, which, generation)) evict(slot);
  }
}

/// False if there is no fingerprint, or no memory for it: the index may need more room in this order.
bool LayerBank::index_again(const Node& node, std::size_t which, std::uint64_t generation) {
  try {
    const auto fingerprint = fingerprint_of(node, which);
    if (!fingerprint || fingerprint->generation != generation) return false;
    node.partition->second.indices[which].insert(node.local, *fingerprint);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

void LayerBank::flush_old(double now_s) {
  drop_aged();
  while (const auto slot = ttl_.expired(now_s)) {
    evicted_.add(nodes_[*slot].key, EvictedKeys::Cause::kAge);
    remove(*slot);
    ++refreshes_.expired;
  }
  if (settings_.flush_below <= 0) return;
  for (auto slot = policy_.victim(now_s); slot; slot = policy_.victim(now_s)) {
    const auto score = policy_.score(*slot, now_s);
    if (!score || *score >= settings_.flush_below) return;
    evicted_.add(nodes_[*slot].key, EvictedKeys::Cause::kAge);
    remove(*slot);
    ++refreshes_.decayed;
  }
}

void LayerBank::remove(std::uint32_t slot) noexcept {
  const Node& node = nodes_[slot];
  const auto partition = node.partition;
  if (node.local != kNoSlot) {
    for (FingerprintIndex& index : partition->second.indices) index.erase(node.local);
    partition->second.slots.erase(node.local);
  }
  if (const auto it = by_key_.find(node.key); it != by_key_.end() && it->second == slot) by_key_.erase(it);
  leave(slot);
  ttl_.erase(slot);
  if (node.audits > 0) --refreshes_.audited_entries;
  nodes_.erase(slot);
  drop_if_empty(partition);
}

void LayerBank::drop_if_empty(Partitions::iterator partition) noexcept {
  if (partition->second.slots.size() == 0) partitions_.erase(partition);
}

std::optional<EvictedKeys::Cause> LayerBank::why_gone(std::uint64_t key) const {
  const std::lock_guard lock(mutex_);
  return by_key_.contains(key) ? std::nullopt : evicted_.find(key);
}

void LayerBank::record(const Hit& hit, double error, bool within_tolerance) {
  const std::lock_guard lock(mutex_);
  Node* const node = nodes_.find(hit.slot);
  if (node == nullptr || node->entry != hit.entry) return;  // gone already
  if (!within_tolerance) {
    remove(hit.slot);
    ++refreshes_.dropped;
    return;
  }
  if (node->audits++ == 0) ++refreshes_.audited_entries;
  node->error_sum += error;
}

void LayerBank::remove_all() noexcept {
  ttl_.clear();
  partitions_.clear();
  nodes_.clear();
  decltype(by_key_)(&memory_).swap(by_key_);
  refreshes_.audited_entries = 0;
}

LayerBank::Counters LayerBank::counters() const {
  const std::lock_guard lock(mutex_);
  return {current(), refreshes_};
}

}  // namespace llmcache
