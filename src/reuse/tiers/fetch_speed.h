// Whether fetching is faster than computing, by what both took before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace llmcache {

/// Running means of what a store and the model took. Thread-safe.
class FetchSpeed {
 public:
  /// A call of the store gave values of so many bytes together, and took so long.
  void fetched(std::size_t bytes, double ms);
  /// The model computed so many tokens in this time.
  void computed(std::int64_t tokens, double ms);

  /// The store had, or had not, the first of what it was asked for.
  void found(bool had);

  /// Milliseconds that fetching so many bytes is expected to take; 0: not known.
  [[nodiscard]] double fetch_ms(std::size_t bytes) const;
  /// Milliseconds that computing so many tokens is expected to take; 0: not known.
  [[nodiscard]] double compute_ms(std::int64_t tokens) const;
  /// True if asking is expected to pay, or not enough is known: what a hit saves, as often as there is one, against
  /// what a miss costs. Of those for which it does not, one in kTrials is tried all the same: else a rate that was
  /// measured in a bad moment would be believed for ever.
  [[nodiscard]] bool worth(std::size_t bytes, std::int64_t tokens);
  /// Values of `value_bytes` that a store is expected to give within half of `deadline_ms`; 1 at least.
  [[nodiscard]] std::size_t values_within(double deadline_ms, std::size_t value_bytes) const;

  [[nodiscard]] double bytes_per_s() const;

 private:
  static constexpr std::uint64_t kTrials = 256;

  mutable std::mutex mutex_;
  double ms_per_byte_ = 0;  ///< 0: not known
  double answer_ms_ = 0;    ///< of a call that gives nothing; 0: not known
  double ms_per_token_ = 0;
  double found_ = 1;  ///< share of what was asked for
  std::uint64_t refused_ = 0;
};

}  // namespace llmcache
