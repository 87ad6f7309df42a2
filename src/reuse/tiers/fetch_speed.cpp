#include "reuse/tiers/fetch_speed.h"

#include <algorithm>

namespace llmcache {
namespace {

/// Weight of the latest measurement.
constexpr double kLatest = 0.2;
/// A call with fewer bytes tells how long an answer takes, one with more at which rate bytes come.
constexpr std::size_t kRateBytes = std::size_t{64} << 10;
/// A pass over fewer tokens takes about as long as one over one token, which says nothing of many.
constexpr std::int64_t kPassTokens = 16;
constexpr std::size_t kMostValues = 64;
/// A store that had nothing for long may be filled by others meanwhile.
constexpr double kLeastFound = 0.05;

void take_into(double& mean, double value) { mean = mean == 0 ? value : (1 - kLatest) * mean + kLatest * value; }

}  // namespace

void FetchSpeed::fetched(std::size_t bytes, double ms) {
  const std::lock_guard lock(mutex_);
  if (bytes < kRateBytes) {
    take_into(answer_ms_, ms);
  } else {
    take_into(ms_per_byte_, std::max(ms - answer_ms_, ms / 2) / static_cast<double>(bytes));
  }
}

void FetchSpeed::computed(std::int64_t tokens, double ms) {
  if (tokens < kPassTokens || !(ms > 0)) return;
  const std::lock_guard lock(mutex_);
  take_into(ms_per_token_, ms / static_cast<double>(tokens));
}

void FetchSpeed::found(bool had) {
  const std::lock_guard lock(mutex_);
  found_ = std::max(kLeastFound, (1 - kLatest) * found_ + (had ? kLatest : 0));
}

double FetchSpeed::fetch_ms(std::size_t bytes) const {
  const std::lock_guard lock(mutex_);
  return ms_per_byte_ == 0 ? 0 : answer_ms_ + ms_per_byte_ * static_cast<double>(bytes);
}

double FetchSpeed::compute_ms(std::int64_t tokens) const {
  const std::lock_guard lock(mutex_);
  return ms_per_token_ * static_cast<double>(tokens);
}

bool FetchSpeed::worth(std::size_t bytes, std::int64_t tokens) {
  const double computing = compute_ms(tokens);
  const std::lock_guard lock(mutex_);
  const bool known = computing > 0 && (answer_ms_ > 0 || ms_per_byte_ > 0);
  const double fetching = answer_ms_ + ms_per_byte_ * static_cast<double>(bytes);
  const double saved = found_ * (computing - fetching) - (1 - found_) * answer_ms_;
  return !known || saved > 0 || ++refused_ % kTrials == 0;
}

std::size_t FetchSpeed::values_within(double deadline_ms, std::size_t value_bytes) const {
  const double one = fetch_ms(value_bytes);
  if (one == 0) return 1;
  return static_cast<std::size_t>(std::clamp(deadline_ms / 2 / one, 1.0, static_cast<double>(kMostValues)));
}

double FetchSpeed::bytes_per_s() const {
  constexpr double kMsPerS = 1'000;
  const std::lock_guard lock(mutex_);
  return ms_per_byte_ == 0 ? 0 : kMsPerS / ms_per_byte_;
}

}  // namespace llmcache
