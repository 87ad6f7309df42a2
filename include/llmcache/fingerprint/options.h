// What a fingerprint is made of.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "llmcache/fingerprint/pca.h"

namespace llmcache {

/// How a request is made short enough to be compared with many (LLMCache, arXiv 2512.16843: Input Fingerprint
/// Generator). Raw, PCA and SimHash are made of a state: a mean over tokens at some layer.
enum class FingerprintKind {
  kRaw,         ///< the state itself at unit length; compared by cosine
  kPca,         ///< its principal components at unit length; compared by cosine
  kSimHash64,   ///< sides of 64 random hyperplanes; the Hamming distance estimates the cosine
  kSimHash128,  ///< the same with 128
  kSimHash256,  ///< the same with 256
  kJaccard,     ///< the set of runs of tokens; compared by Jaccard similarity; needs no state
};

/// "raw", "pca", "simhash64", "simhash128", "simhash256" or "jaccard".
const char* to_string(FingerprintKind kind) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
FingerprintKind fingerprint_kind_from_string(const std::string& text);

/// Bits of a SimHash kind; 0 for the others.
int simhash_bits(FingerprintKind kind) noexcept;

/// What is taken off a state before its fingerprint is made (see centre.h for why).
enum class Centring {
  kOff,      ///< nothing
  kRunning,  ///< the mean of the states seen so far, see RunningCentre
  kFitted,   ///< a given mean
};

/// "off", "running" or "fitted".
const char* to_string(Centring centring) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
Centring centring_from_string(const std::string& text);

/// Settings of a Fingerprinter. A plain struct: set what differs from the default.
struct FingerprintOptions {
  /// Default 128 bits: 16 bytes an entry, and the error of the estimated cosine is about 0.1 at
  /// cosine 0.5 and 0.04 at 0.95 (one standard deviation).
  FingerprintKind kind = FingerprintKind::kSimHash128;

  /// Default on: without it SimHash of real text is of little use. Not used by kJaccard; kPca always
  /// takes off the mean of its sample.
  Centring centring = Centring::kRunning;

  /// Chooses the hyperplanes (SimHash) and the hash of the shingles (Jaccard). Fingerprints of
  /// different seeds cannot be compared. Any value; default 0.
  std::uint64_t seed = 0;

  /// Tokens of a shingle (kJaccard only), 1 to 1024. Default 3: short enough that one changed token
  /// spoils three shingles only, long enough that a shingle rarely occurs by chance.
  std::int64_t shingle = 3;

  /// Needed for kPca. With kFitted and an empty `mean`, its mean is the centre of the other kinds.
  std::shared_ptr<const PcaModel> pca = {};

  /// The centre for kFitted, one finite value per dimension of the state. Not used otherwise.
  std::vector<float> mean = {};

  /// The state has attention statistics appended. Whoever makes the state does it; a Fingerprinter
  /// does not look at this field. Default off.
  bool attention = false;

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

}  // namespace llmcache
