#include "llmcache/store/tiered_store.h"

#include <stdexcept>
#include <utility>

#include "store/write_queue.h"

namespace llmcache {
namespace {

constexpr double kPromoteMs = 1'000;

/// The outcome of two calls that says more of what went wrong.
StoreOutcome worse(StoreOutcome a, StoreOutcome b) { return a == StoreOutcome::kDone ? b : a; }

}  // namespace

struct TieredStore::Work {
  explicit Work(std::size_t most_bytes) : queue(most_bytes) {}
  WriteQueue queue;
};

TieredStore::TieredStore(std::vector<std::shared_ptr<StateStore>> stores, std::size_t max_pending_bytes)
    : stores_(std::move(stores)), work_(std::make_unique<Work>(max_pending_bytes)) {
  if (stores_.empty()) throw std::invalid_argument("TieredStore: at least one store is expected");
  for (const auto& store : stores_) {
    if (!store) throw std::invalid_argument("TieredStore: a store is null");
  }
}

TieredStore::~TieredStore() = default;

std::string TieredStore::name() const {
  std::string text;
  for (const auto& store : stores_) text += (text.empty() ? "" : ", ") + store->name();
  return text;
}

StoreValues TieredStore::get(std::span<const std::string> keys, StoreDeadline deadline) {
  StoreValues found;
  found.values.resize(keys.size());
  for (std::size_t tier = 0; tier < stores_.size(); ++tier) {
    std::vector<std::string> missing;
    std::vector<std::size_t> places;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (found.values[i]) continue;
      missing.push_back(keys[i]);
      places.push_back(i);
    }
    if (missing.empty()) return {std::move(found.values), StoreOutcome::kDone};
    StoreValues part = stores_[tier]->get(missing, deadline);
    found.outcome = worse(found.outcome, part.outcome);
    for (std::size_t i = 0; i < missing.size(); ++i) {
      if (!part.values[i]) continue;
      if (tier > 0) {
        const auto promote = [this, tier, key = missing[i], value = *part.values[i]] {
          const StoreItem item{key, value};
          for (std::size_t front = 0; front < tier; ++front) {
            static_cast<void>(stores_[front]->put({&item, 1}, store_deadline(kPromoteMs)));
          }
        };
        static_cast<void>(work_->queue.add(promote, part.values[i]->size()));
      }
      found.values[places[i]] = std::move(part.values[i]);
    }
  }
  return found;
}

StoreOutcome TieredStore::put(std::span<const StoreItem> items, StoreDeadline deadline) {
  StoreOutcome failed = StoreOutcome::kDone;
  bool taken = false;
  for (const auto& store : stores_) {
    const StoreOutcome outcome = store->put(items, deadline);
    taken = taken || outcome == StoreOutcome::kDone;
    failed = worse(failed, outcome);
  }
  return taken ? StoreOutcome::kDone : failed;
}

std::vector<bool> TieredStore::exists(std::span<const std::string> keys, StoreDeadline deadline) {
  std::vector<bool> all(keys.size(), true);
  for (const auto& store : stores_) {
    const std::vector<bool> known = store->exists(keys, deadline);
    for (std::size_t i = 0; i < keys.size(); ++i) all[i] = all[i] && known[i];
  }
  return all;
}

StoreOutcome TieredStore::erase(std::span<const std::string> keys, StoreDeadline deadline) {
  StoreOutcome outcome = StoreOutcome::kDone;
  for (const auto& store : stores_) outcome = worse(outcome, store->erase(keys, deadline));
  return outcome;
}

StoreOutcome TieredStore::erase_prefix(std::string_view prefix, StoreDeadline deadline) {
  StoreOutcome outcome = StoreOutcome::kDone;
  for (const auto& store : stores_) outcome = worse(outcome, store->erase_prefix(prefix, deadline));
  return outcome;
}

std::vector<TierStats> TieredStore::stats() const {
  std::vector<TierStats> all;
  for (const auto& store : stores_) {
    for (TierStats& stats : store->stats()) all.push_back(std::move(stats));
  }
  return all;
}

void TieredStore::flush() { work_->queue.flush(); }

}  // namespace llmcache
