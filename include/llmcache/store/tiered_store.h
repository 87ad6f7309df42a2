// Several stores as one: the fast one in front, the large one behind.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llmcache/store/state_store.h"

namespace llmcache {

/// Asks its stores in order until one has a value. What a later one had is given to those in front of it, behind the
/// call, by a thread of its own. What is put is put into all of them; that one of them takes it is success.
class TieredStore final : public StateStore {
 public:
  /// None of them may be null. `max_pending_bytes`: of values on their way to the front; what is more is dropped.
  /// Throws std::invalid_argument.
  explicit TieredStore(std::vector<std::shared_ptr<StateStore>> stores,
                       std::size_t max_pending_bytes = std::size_t{256} << 20);
  ~TieredStore() override;

  [[nodiscard]] std::string name() const override;
  StoreValues get(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome put(std::span<const StoreItem> items, StoreDeadline deadline) override;
  /// True if all stores have it: what is not in each of them is worth writing.
  std::vector<bool> exists(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome erase(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome erase_prefix(std::string_view prefix, StoreDeadline deadline) override;
  [[nodiscard]] std::vector<TierStats> stats() const override;
  /// Waits until nothing is on its way to the front.
  void flush();

 private:
  struct Work;
  const std::vector<std::shared_ptr<StateStore>> stores_;
  std::unique_ptr<Work> work_;
};

}  // namespace llmcache
