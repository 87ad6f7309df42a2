#include "match/shingle_index.h"

#include <algorithm>

namespace llmcache {
namespace {

int thinning_of(std::size_t hashes) noexcept {
  int thinning = 0;
  while ((hashes >> thinning) > ShingleIndex::kSample) ++thinning;
  return thinning;
}

/// The distinct hashes of a sample, each made one of its partition.
std::vector<std::uint64_t> sample(std::uint32_t partition, std::span<const std::uint64_t> hashes, int thinning) {
  const std::uint64_t mask = (std::uint64_t{1} << thinning) - 1;
  std::vector<std::uint64_t> chosen;
  for (const std::uint64_t hash : hashes) {
    // The high bits decide, the table uses the low ones.
    if (((hash >> 40) & mask) == 0) chosen.push_back(hash ^ (partition * 0x9e3779b97f4a7c15u));
  }
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  return chosen;
}

}  // namespace

void ShingleIndex::insert(std::uint32_t id, std::uint32_t partition, std::span<const std::uint64_t> hashes) {
  const int thinning = thinning_of(hashes.size());
  const auto chosen = sample(partition, hashes, thinning);
  std::size_t placed = 0;
  try {
    while (entries_.size() <= id) entries_.emplace_back(entries_.get_allocator().resource());
    if (counts_.size() < entries_.size()) counts_.resize(entries_.size(), 0);
    entries_[id].hashes.assign(chosen.begin(), chosen.end());
    for (; placed < chosen.size(); ++placed) {
      Posting& posting = postings_.try_emplace(chosen[placed]).first->second;
      if (posting.size() == kPostings) posting.erase(posting.begin());
      posting.push_back(id);
    }
  } catch (...) {
    for (std::size_t i = 0; i < std::min(placed + 1, chosen.size()); ++i) withdraw(id, chosen[i]);
    if (id < entries_.size()) entries_[id].hashes.clear();
    if (held_ == 0) clear();
    throw;
  }
  Entry& entry = entries_[id];
  entry.partition = partition;
  entry.thinning = thinning;
  ++held_;
}

void ShingleIndex::withdraw(std::uint32_t id, std::uint64_t hash) noexcept {
  const auto it = postings_.find(hash);
  if (it == postings_.end()) return;
  std::erase(it->second, id);
  if (it->second.empty()) postings_.erase(it);
}

void ShingleIndex::erase(std::uint32_t id) noexcept {
  if (id >= entries_.size() || entries_[id].thinning < 0) return;
  Entry& entry = entries_[id];
  for (const std::uint64_t hash : entry.hashes) withdraw(id, hash);
  std::pmr::vector<std::uint64_t>(entry.hashes.get_allocator()).swap(entry.hashes);
  entry.thinning = -1;
  if (--held_ == 0) clear();
}

std::vector<ShingleIndex::Candidate> ShingleIndex::best(std::uint32_t partition, std::span<const std::uint64_t> hashes,
                                                        std::size_t limit) {
  const int thinning = thinning_of(hashes.size());
  std::vector<std::uint32_t> touched;
  for (const std::uint64_t hash : sample(partition, hashes, thinning)) {
    const auto it = postings_.find(hash);
    if (it == postings_.end()) continue;
    for (const std::uint32_t id : it->second) {
      if (entries_[id].partition == partition && counts_[id]++ == 0) touched.push_back(id);
    }
  }
  std::vector<Candidate> found;
  for (const std::uint32_t id : touched) {
    found.push_back({id, static_cast<std::int64_t>(counts_[id]) << std::max(thinning, entries_[id].thinning)});
    counts_[id] = 0;
  }
  const auto kept = std::min(limit, found.size());
  std::partial_sort(
      found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(),
      [](const Candidate& a, const Candidate& b) { return a.shared != b.shared ? a.shared > b.shared : a.id > b.id; });
  found.resize(kept);
  return found;
}

void ShingleIndex::clear() noexcept {
  auto* memory = entries_.get_allocator().resource();
  postings_ = std::pmr::unordered_map<std::uint64_t, Posting>(memory);
  std::pmr::vector<Entry>(memory).swap(entries_);
  std::pmr::vector<std::uint32_t>(memory).swap(counts_);
  held_ = 0;
}

}  // namespace llmcache
