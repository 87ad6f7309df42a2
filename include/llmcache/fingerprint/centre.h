// The mean state that is taken off before a fingerprint is made.
//
// Mean embeddings of real text lie in a narrow cone: most pairs of unrelated texts have a cosine above
// 0.7. The difference to the mean state spreads over all directions, so its cosine tells texts apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace llmcache {

/// True if every value is a finite number and at least one is not zero: a state that a fingerprint may be made of.
bool is_usable_state(std::span<const float> state) noexcept;

/// Mean of the states seen so far, taken over at fixed numbers of observations.
///
/// The centre in force is the mean of the first 16 states, then of the first 32, 64, ... up to 4096,
/// and stays as it is from there on. Before the 16th state there is no centre. So it changes at most
/// nine times, and fingerprints that were made before a change cannot be compared with later ones.
/// Thread safety: none; Fingerprinter guards it.
class RunningCentre {
 public:
  static constexpr std::uint64_t kFirst = 16;
  static constexpr std::uint64_t kLast = 4096;

  /// `dims`: values of a state. Throws Error(kInvalidOptions) unless it is positive.
  explicit RunningCentre(std::int64_t dims);

  /// Takes a state of `dims` values into the mean. True if the centre in force has changed. A state
  /// that is not usable (see is_usable_state) is left out. After kLast states nothing happens any more.
  /// Throws Error(kInvalidInput) if the number of values is wrong.
  bool observe(std::span<const float> state);

  /// Forgets all states: there is no centre, until 16 new ones have been seen. That is a change too
  /// where there was one. Cannot fail.
  void forget() noexcept;

  /// All that it has seen, to go on from in another process.
  struct State {
    std::uint64_t observations = 0;
    std::vector<double> sums;   ///< `[dims]`
    std::vector<float> centre;  ///< `[dims]`, in force; empty: there is none
  };
  [[nodiscard]] State state() const;
  /// Goes on from there. False, and nothing has changed, unless it has seen no state so far and this could have been
  /// its own.
  [[nodiscard]] bool restore(State state);

  /// The centre in force; null before the first one. What it points to never changes.
  [[nodiscard]] const std::shared_ptr<const std::vector<float>>& centre() const noexcept { return centre_; }
  /// How often the centre has changed; forget() does not start this again.
  [[nodiscard]] std::uint64_t generation() const noexcept { return generation_; }
  /// States taken in so far, at most kLast.
  [[nodiscard]] std::uint64_t observations() const noexcept { return observations_; }

 private:
  std::vector<double> sums_;
  std::uint64_t observations_ = 0;
  std::uint64_t next_ = kFirst;
  std::uint64_t generation_ = 0;
  std::shared_ptr<const std::vector<float>> centre_;
};

}  // namespace llmcache
