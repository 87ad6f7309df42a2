#include "quality_served.h"

#include <algorithm>

namespace llmcache::bench {

std::int64_t ServedCounts::request_of(std::int64_t sequence) const {
  const auto& offsets = file_.request_offsets;
  return std::upper_bound(offsets.begin(), offsets.end(), sequence) - offsets.begin() - 1;
}

void ServedCounts::add(std::int64_t request, std::int64_t asking, std::int64_t entry) {
  const auto r = static_cast<std::size_t>(request);
  const bool served = entry != kNotServed;
  const bool known = entry >= 0;
  served_ += served ? 1 : 0;
  if (file_.task == Task::kDuplicates) {
    const bool duplicate = file_.pair_label[r] == 1;
    duplicates_ += duplicate ? 1 : 0;
    const bool equal = known && std::ranges::equal(file_.sequence(asking), file_.sequence(entry));
    const bool pair = known && request_of(entry) == file_.partner[r];
    if (equal || (pair && duplicate)) {
      ++right_;
      recalled_ += duplicate ? 1 : 0;
    } else if (pair) {
      ++unsafe_;
    }
  }
  if (file_.task == Task::kAnswer && known) {
    same_answer_ += file_.group[static_cast<std::size_t>(request_of(entry))] == file_.group[r] ? 1 : 0;
  }
}

double ServedCounts::precision() const { return ratio(right_, right_ + unsafe_); }
double ServedCounts::recall() const { return ratio(recalled_, duplicates_); }
Rate ServedCounts::unsafe() const { return {ratio(unsafe_, served_), wilson(unsafe_, served_), served_}; }
Rate ServedCounts::same_answer() const {
  return {ratio(same_answer_, served_), wilson(same_answer_, served_), served_};
}

}  // namespace llmcache::bench
