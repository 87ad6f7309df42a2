// Places outside of a cache that keep what it computed: a directory, a server, several of them in order.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache {

/// When a call of a store has to be back.
using StoreDeadline = std::chrono::steady_clock::time_point;

/// The deadline `ms` milliseconds from now.
[[nodiscard]] inline StoreDeadline store_deadline(double ms) {
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double, std::milli>(ms));
}

/// How a call of a store ended.
enum class StoreOutcome {
  kDone,     ///< all of it was done; a value that is not there is no failure
  kTimeout,  ///< the deadline passed; what came before it is in the result
  kFailed,   ///< the store could not be reached, or gave what is no answer
  kRefused,  ///< the store failed a short while ago and was not asked: its circuit breaker is open
  kNoRoom,   ///< of a put: it is full, or the value is larger than it may hold
};

/// "done", "timeout", "failed", "refused", "no room".
[[nodiscard]] inline const char* to_string(StoreOutcome outcome) noexcept {
  switch (outcome) {
    case StoreOutcome::kDone:
      return "done";
    case StoreOutcome::kTimeout:
      return "timeout";
    case StoreOutcome::kFailed:
      return "failed";
    case StoreOutcome::kRefused:
      return "refused";
    case StoreOutcome::kNoRoom:
      return "no room";
  }
  return "unknown";
}

/// What a store did since it was made. Counters never go back.
struct TierStats {
  std::string name;                 ///< StateStore::name()
  std::uint64_t lookups = 0;        ///< keys asked for
  std::uint64_t hits = 0;           ///< of these, keys whose value was given
  std::uint64_t misses = 0;         ///< keys that it has not
  std::uint64_t timeouts = 0;       ///< calls whose deadline passed
  std::uint64_t failures = 0;       ///< calls that failed otherwise
  std::uint64_t refused = 0;        ///< calls that were not tried, because the breaker was open
  std::uint64_t damaged = 0;        ///< values that were not what had been written
  std::uint64_t writes = 0;         ///< values taken over
  std::uint64_t writes_failed = 0;  ///< values that were not
  std::uint64_t evictions = 0;      ///< values that had to go for room, as far as the store tells
  std::uint64_t bytes_read = 0;     ///< of values
  std::uint64_t bytes_written = 0;  ///< likewise
  std::uint64_t entries = 0;        ///< held now, as far as the store tells; else 0
  std::uint64_t bytes = 0;          ///< likewise
  std::uint64_t openings = 0;       ///< times that the breaker opened
  bool open = false;                ///< the breaker is open now
  std::string last_failure;         ///< why a call failed last; empty: none did
};

/// A value to be kept under a key. The bytes must live as long as the call.
struct StoreItem {
  std::string_view key;
  std::string_view value;
};

/// What a look-up found.
struct StoreValues {
  std::vector<std::optional<std::string>> values;  ///< one a key, in their order; unset: not there, or not in time
  StoreOutcome outcome = StoreOutcome::kDone;
};

/// Keeps bytes under keys. A cache that is given one (StoreOptions) looks there for what its own memory lacks.
///
/// Keys are 1 to 200 characters out of letters, digits and ".:_-"; any other key is a std::invalid_argument. Values are
/// any bytes. A put value may be gone at any time. Nothing else is thrown but std::bad_alloc: what goes wrong is an
/// outcome, counted, and for a look-up the same as a value that is not there. Calls are back by their deadline or soon
/// after, and a store that has failed answers kRefused at once until it works again.
///
/// Thread-safe. Of several values one after the other is found, or written: no call is atomic as a whole, each value
/// is.
class StateStore {
 public:
  virtual ~StateStore() = default;

  /// For people and metrics: "directory", "redis 127.0.0.1:6379".
  [[nodiscard]] virtual std::string name() const = 0;
  /// The values of `keys`.
  virtual StoreValues get(std::span<const std::string> keys, StoreDeadline deadline) = 0;
  /// Keeps values; one that is there already is replaced.
  virtual StoreOutcome put(std::span<const StoreItem> items, StoreDeadline deadline) = 0;
  /// By key: it has a value. False where it is not known.
  virtual std::vector<bool> exists(std::span<const std::string> keys, StoreDeadline deadline) = 0;
  /// Forgets values.
  virtual StoreOutcome erase(std::span<const std::string> keys, StoreDeadline deadline) = 0;
  /// Forgets all values whose key begins like this. Takes as long as the store is large.
  virtual StoreOutcome erase_prefix(std::string_view prefix, StoreDeadline deadline) = 0;
  /// One element for each store that this is made of, in the order in which they are asked.
  [[nodiscard]] virtual std::vector<TierStats> stats() const = 0;
};

/// Throws std::invalid_argument unless it is a key as StateStore says.
inline void check_store_key(std::string_view key) {
  constexpr std::size_t kMostCharacters = 200;
  const auto usual = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == ':' ||
           c == '_' || c == '-';
  };
  bool right = !key.empty() && key.size() <= kMostCharacters;
  for (const char c : key) right = right && usual(c);
  if (!right) throw std::invalid_argument("a key of a store is 1 to 200 letters, digits and .:_-");
}

}  // namespace llmcache
