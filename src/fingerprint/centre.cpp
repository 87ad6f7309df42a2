#include "llmcache/fingerprint/centre.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "llmcache/error.h"

namespace llmcache {

bool is_usable_state(std::span<const float> state) noexcept {
  bool any = false;
  for (const float value : state) {
    if (!std::isfinite(value)) return false;
    any |= value != 0;
  }
  return any;
}

RunningCentre::RunningCentre(std::int64_t dims) {
  if (dims < 1) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("dims is {}; the size of a state, at least 1, is expected", dims));
  }
  sums_.resize(static_cast<std::size_t>(dims));
}

bool RunningCentre::observe(std::span<const float> state) {
  if (state.size() != sums_.size()) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("a state of {} values was given; {} are expected", state.size(), sums_.size()));
  }
  if (observations_ == kLast || !is_usable_state(state)) return false;
  std::shared_ptr<std::vector<float>> next;
  if (observations_ + 1 == next_) next = std::make_shared<std::vector<float>>(sums_.size());  // all that can fail
  for (std::size_t i = 0; i < state.size(); ++i) sums_[i] += static_cast<double>(state[i]);
  ++observations_;
  if (!next) return false;
  const auto count = static_cast<double>(observations_);
  std::transform(sums_.begin(), sums_.end(), next->begin(),
                 [count](double sum) { return static_cast<float>(sum / count); });
  centre_ = std::move(next);
  next_ *= 2;
  ++generation_;
  return true;
}

RunningCentre::State RunningCentre::state() const {
  return {observations_, sums_, centre_ ? *centre_ : std::vector<float>{}};
}

bool RunningCentre::restore(State state) {
  const std::size_t values = state.observations < kFirst ? 0 : sums_.size();
  if (observations_ > 0 || state.observations > kLast || state.sums.size() != sums_.size() ||
      state.centre.size() != values) {
    return false;
  }
  if (values > 0) {
    centre_ = std::make_shared<const std::vector<float>>(std::move(state.centre));
    ++generation_;
  }
  sums_ = std::move(state.sums);
  observations_ = state.observations;
  while (next_ <= observations_) next_ *= 2;
  return true;
}

void RunningCentre::forget() noexcept {
  std::fill(sums_.begin(), sums_.end(), 0.0);
  observations_ = 0;
  next_ = kFirst;
  if (!centre_) return;
  centre_.reset();
  ++generation_;
}

}  // namespace llmcache
