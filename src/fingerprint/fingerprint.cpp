#include "llmcache/fingerprint/fingerprint.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"
#include "llmcache/fingerprint/jaccard.h"

namespace llmcache {
namespace {

/// Below this share of the longer of state and centre their difference is rounding.
constexpr double kRounding = 1e-6;

double length(std::span<const float> values) {
  double sum = 0;  // not detail::dot: squares of floats overflow floats
  for (const float value : values) sum += static_cast<double>(value) * static_cast<double>(value);
  return std::sqrt(sum);
}

/// False if no direction is left.
bool normalise(std::vector<float>& values, double least) {
  const double norm = length(values);
  if (!(norm > least) || !std::isfinite(norm)) return false;
  for (float& value : values) value = static_cast<float>(static_cast<double>(value) / norm);
  return true;
}

std::int64_t checked_dims(const FingerprintOptions& options, std::int64_t dims) {
  options.validate();
  if (options.kind == FingerprintKind::kJaccard) return dims;
  if (dims < 1) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("dims is {}; the size of a state, at least 1, is expected", dims));
  }
  const bool fitted = options.centring == Centring::kFitted && options.kind != FingerprintKind::kPca;
  const bool own_mean = fitted && !options.mean.empty();
  if ((options.kind == FingerprintKind::kPca || (fitted && !own_mean)) && options.pca->dims() != dims) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("FingerprintOptions.pca was fitted to states of {} values, these have {}; fit it to states "
                            "of this model and layer",
                            options.pca->dims(), dims));
  }
  if (own_mean && options.mean.size() != static_cast<std::size_t>(dims)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("FingerprintOptions.mean has {} values; the states have {}", options.mean.size(), dims));
  }
  return dims;
}

void check_equal(std::size_t a, std::size_t b, FingerprintKind kind) {
  if (a == b && a != 0) return;
  throw Error(ErrorCode::kInvalidInput,
              fmt::format("fingerprints with {} and {} values of kind '{}' cannot be compared; make both with one "
                          "Fingerprinter of that kind",
                          a, b, to_string(kind)));
}

}  // namespace

double similarity(FingerprintKind kind, const Fingerprint& a, const Fingerprint& b) {
  switch (kind) {
    case FingerprintKind::kRaw:
    case FingerprintKind::kPca:
      check_equal(a.vector.size(), b.vector.size(), kind);
      return detail::unit_cosine(a.vector.data(), b.vector.data(), a.vector.size());
    case FingerprintKind::kJaccard:
      if (a.shingles.empty() || b.shingles.empty()) check_equal(a.shingles.size(), 0, kind);
      return jaccard(a.shingles, b.shingles);
    default:
      check_equal(a.bits.size(), b.bits.size(), kind);
      return simhash_similarity(hamming(a.bits, b.bits), static_cast<int>(64 * a.bits.size()));
  }
}

Fingerprinter::Fingerprinter(FingerprintOptions options, std::int64_t dims)
    : options_(std::move(options)), dims_(checked_dims(options_, dims)) {
  if (const int bits = simhash_bits(options_.kind)) simhash_.emplace(bits, dims, options_.seed);
  if (options_.kind == FingerprintKind::kJaccard || options_.kind == FingerprintKind::kPca) return;
  if (options_.centring == Centring::kRunning) running_.emplace(dims);
  if (options_.centring == Centring::kFitted) {
    if (options_.mean.empty()) {
      const auto mean = options_.pca->mean();
      fitted_ = std::make_shared<const std::vector<float>>(mean.begin(), mean.end());
    } else {
      fitted_ = std::make_shared<const std::vector<float>>(options_.mean);
    }
  }
}

void Fingerprinter::check_size(std::span<const float> state) const {
  if (state.size() != static_cast<std::size_t>(dims_)) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("a state of {} values was given; {} are expected", state.size(), dims_));
  }
}

Fingerprinter::Centre Fingerprinter::centre() const {
  if (!running_) return {fitted_, 0};
  const std::lock_guard lock(mutex_);
  return {running_->centre(), running_->generation()};
}

bool Fingerprinter::observe(std::span<const float> state) {
  if (!running_) return false;
  const std::lock_guard lock(mutex_);
  return running_->observe(state);
}

std::optional<RunningCentre::State> Fingerprinter::running() const {
  if (!running_) return std::nullopt;
  const std::lock_guard lock(mutex_);
  return running_->state();
}

bool Fingerprinter::restore(RunningCentre::State state) {
  if (!running_) return false;
  const std::lock_guard lock(mutex_);
  return running_->restore(std::move(state));
}

void Fingerprinter::forget() noexcept {
  if (!running_) return;
  const std::lock_guard lock(mutex_);
  running_->forget();
}

std::uint64_t Fingerprinter::generation() const { return centre().generation; }

std::optional<Fingerprint> Fingerprinter::make(std::span<const float> state, std::span<const std::int64_t> ids) const {
  Fingerprint result;
  if (options_.kind == FingerprintKind::kJaccard) {
    if (ids.empty()) return std::nullopt;
    result.shingles = shingle_hashes(ids, options_.shingle, options_.seed);
    return result;
  }
  check_size(state);
  if (!is_usable_state(state)) return std::nullopt;
  if (options_.kind == FingerprintKind::kPca) {
    const double least = kRounding * std::max(length(state), length(options_.pca->mean()));
    result.vector = options_.pca->project(state);
    if (!normalise(result.vector, least)) return std::nullopt;
    return result;
  }
  std::vector<float> centred(state.begin(), state.end());
  double least = 0;
  const Centre centre = this->centre();
  result.generation = centre.generation;
  if (centre.mean) {
    least = kRounding * std::max(length(state), length(*centre.mean));
    for (std::size_t i = 0; i < centred.size(); ++i) centred[i] -= (*centre.mean)[i];
  }
  if (!normalise(centred, least)) return std::nullopt;
  if (simhash_) {
    result.bits = (*simhash_)(centred);
  } else {
    result.vector = std::move(centred);
  }
  return result;
}

}  // namespace llmcache
