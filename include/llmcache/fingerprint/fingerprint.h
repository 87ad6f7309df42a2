// Fingerprints: made from a state or from token ids, compared by a similarity.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "llmcache/fingerprint/centre.h"
#include "llmcache/fingerprint/options.h"
#include "llmcache/fingerprint/simhash.h"

namespace llmcache {

/// What stands for a request in a look-up. Which member is filled follows from the kind; the others are empty.
/// Two fingerprints can be compared if one Fingerprinter made both and their generations are equal.
struct Fingerprint {
  std::vector<float> vector = {};            ///< raw: [dims], pca: [components]; unit length
  std::vector<std::uint64_t> bits = {};      ///< simhash: one word for each 64 bits
  std::vector<std::uint64_t> shingles = {};  ///< jaccard: hashes, sorted, each once
  std::uint64_t generation = 0;              ///< Fingerprinter::generation() that it was made in

  bool operator==(const Fingerprint&) const = default;
};

/// How alike two fingerprints of one kind are. Raw and PCA: cosine, in [-1, 1]. SimHash: cosine
/// estimated from the Hamming distance, in [-1, 1]. Jaccard: in [0, 1]. Equal to what
/// FingerprintIndex::best reports for the same pair, to the last bit.
/// Throws Error(kInvalidInput) if the member of that kind is empty or of different sizes.
double similarity(FingerprintKind kind, const Fingerprint& a, const Fingerprint& b);

/// Makes fingerprints (LLMCache, arXiv 2512.16843: Input Fingerprint Generator).
/// Thread safety: all functions may be called at once.
class Fingerprinter {
 public:
  /// `dims`: values of a state; not used by kJaccard. Throws Error(kInvalidOptions) if an option is
  /// out of range, if dims < 1, or if the PCA model or the mean has another number of dimensions.
  Fingerprinter(FingerprintOptions options, std::int64_t dims);

  /// Takes a state into the running mean. True if the centre in force has changed (at 16, 32, 64,
  /// ... 4096 states): all fingerprints made before must then be made again from their states. States
  /// with a value that is not finite, and zero states, are left out. Does nothing and is false unless
  /// the centring is kRunning and the kind is kRaw or SimHash.
  /// Throws Error(kInvalidInput) if the number of values is wrong.
  bool observe(std::span<const float> state);

  /// What the running mean has seen; empty unless there is one.
  [[nodiscard]] std::optional<RunningCentre::State> running() const;
  /// Goes on from what another Fingerprinter's running mean had seen, whose states were of the same model and layer.
  /// False, and nothing has changed, if there is none here, it has seen states of its own, or that one had other sizes.
  [[nodiscard]] bool restore(RunningCentre::State state);

  /// Forgets the states of the running mean, as if none had been observed. Fingerprints that were made
  /// with a running centre can then not be compared with later ones: generation() tells.
  void forget() noexcept;

  /// The fingerprint of a request: of its state (`ids` are not read), or for kJaccard of its token
  /// ids (`state` is not read). Empty if there is none that means anything, and the request must then
  /// be neither cached nor looked up: a value is not finite; the state is zero, or equals the
  /// centre up to rounding (1e-6 of its length); there are no ids.
  /// Throws Error(kInvalidInput) if the number of values is wrong.
  [[nodiscard]] std::optional<Fingerprint> make(std::span<const float> state, std::span<const std::int64_t> ids) const;

  /// False if `make` reads only the ids.
  [[nodiscard]] bool needs_state() const noexcept { return options_.kind != FingerprintKind::kJaccard; }

  /// Counts the changes of the centre: 0 at first, at most nine, and ten more for each forget().
  [[nodiscard]] std::uint64_t generation() const;

  [[nodiscard]] const FingerprintOptions& options() const noexcept { return options_; }
  [[nodiscard]] std::int64_t dims() const noexcept { return dims_; }

 private:
  struct Centre {
    std::shared_ptr<const std::vector<float>> mean;  ///< null: none
    std::uint64_t generation = 0;
  };
  [[nodiscard]] Centre centre() const;
  void check_size(std::span<const float> state) const;

  FingerprintOptions options_;
  std::int64_t dims_;
  std::optional<SimHash> simhash_;
  std::shared_ptr<const std::vector<float>> fitted_;
  mutable std::mutex mutex_;  ///< guards running_
  std::optional<RunningCentre> running_;
};

}  // namespace llmcache
