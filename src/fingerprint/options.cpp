#include "llmcache/fingerprint/options.h"

#include <fmt/core.h>

#include <cmath>

#include "llmcache/error.h"

namespace llmcache {
namespace {

constexpr FingerprintKind kKinds[] = {FingerprintKind::kRaw,        FingerprintKind::kPca,
                                      FingerprintKind::kSimHash64,  FingerprintKind::kSimHash128,
                                      FingerprintKind::kSimHash256, FingerprintKind::kJaccard};
constexpr std::int64_t kMaxShingle = 1024;

[[noreturn]] void refuse_fingerprint(const std::string& message) {
  throw Error(ErrorCode::kInvalidOptions, "FingerprintOptions." + message);
}

}  // namespace

const char* to_string(FingerprintKind kind) noexcept {
  switch (kind) {
    case FingerprintKind::kRaw:
      return "raw";
    case FingerprintKind::kPca:
      return "pca";
    case FingerprintKind::kSimHash64:
      return "simhash64";
    case FingerprintKind::kSimHash128:
      return "simhash128";
    case FingerprintKind::kSimHash256:
      return "simhash256";
    case FingerprintKind::kJaccard:
      return "jaccard";
  }
  return "unknown";
}

FingerprintKind fingerprint_kind_from_string(const std::string& text) {
  for (const auto kind : kKinds) {
    if (text == to_string(kind)) return kind;
  }
  throw Error(
      ErrorCode::kInvalidOptions,
      fmt::format("'{}' is no fingerprint; known are raw, pca, simhash64, simhash128, simhash256, jaccard", text));
}

int simhash_bits(FingerprintKind kind) noexcept {
  switch (kind) {
    case FingerprintKind::kSimHash64:
      return 64;
    case FingerprintKind::kSimHash128:
      return 128;
    case FingerprintKind::kSimHash256:
      return 256;
    default:
      return 0;
  }
}

const char* to_string(Centring centring) noexcept {
  switch (centring) {
    case Centring::kOff:
      return "off";
    case Centring::kRunning:
      return "running";
    case Centring::kFitted:
      return "fitted";
  }
  return "unknown";
}

Centring centring_from_string(const std::string& text) {
  for (const auto centring : {Centring::kOff, Centring::kRunning, Centring::kFitted}) {
    if (text == to_string(centring)) return centring;
  }
  throw Error(ErrorCode::kInvalidOptions, fmt::format("'{}' is no centring; known are off, running, fitted", text));
}

void FingerprintOptions::validate() const {
  const auto kind_number = static_cast<int>(kind);
  if (kind_number < 0 || kind_number > static_cast<int>(FingerprintKind::kJaccard)) {
    refuse_fingerprint(fmt::format("kind is {}, which is no FingerprintKind", kind_number));
  }
  const auto centring_number = static_cast<int>(centring);
  if (centring_number < 0 || centring_number > static_cast<int>(Centring::kFitted)) {
    refuse_fingerprint(fmt::format("centring is {}, which is no Centring", centring_number));
  }
  if (shingle < 1 || shingle > kMaxShingle) {
    refuse_fingerprint(fmt::format("shingle is {}; 1 to {} tokens are expected", shingle, kMaxShingle));
  }
  if (kind == FingerprintKind::kPca && !pca) {
    refuse_fingerprint("pca is empty; kind 'pca' needs a model: PcaModel::fit or PcaModel::load");
  }
  if (kind == FingerprintKind::kPca || kind == FingerprintKind::kJaccard || centring != Centring::kFitted) return;
  if (mean.empty() && !pca) refuse_fingerprint("mean is empty; centring 'fitted' needs a mean or a PCA model");
  for (std::size_t i = 0; i < mean.size(); ++i) {
    if (!std::isfinite(mean[i]))
      refuse_fingerprint(fmt::format("mean[{}] is {}; finite values are expected", i, mean[i]));
  }
}

}  // namespace llmcache
