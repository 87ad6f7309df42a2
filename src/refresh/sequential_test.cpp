#include "refresh/sequential_test.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "llmcache/error.h"

namespace llmcache {
namespace {

/// Errors, in units of epsilon, that capital is staked on: against the budget while open ...
constexpr std::array kTooHigh = {2.0, 4.0, 8.0, 16.0};
/// ... and for it while closed.
constexpr std::array kLow = {0.0, 0.25, 0.5, 0.75};
/// An error of more than this is not staked on: the capital must stay positive whatever comes.
constexpr double kHighestError = 0.9;
/// The CUSUM may pass by this factor what makes q_t the largest; how long audits stay frequent after a drift has ended.
constexpr double kMemory = 100;

/// q_t grows with this power of the CUSUM: two to three errors' worth of evidence, and everything is audited.
double ramp(double cusum) { return cusum * cusum * cusum; }

}  // namespace

void RiskGate::Settings::validate() const {
  const auto check = [](const char* field, double value, bool good, const char* expected) {
    if (!good) {
      throw Error(ErrorCode::kInvalidOptions,
                  fmt::format("RiskGate::Settings.{} is {}; {} is expected", field, value, expected));
    }
  };
  check("epsilon", epsilon, epsilon > 0 && epsilon <= 0.5, "above 0 and at most 0.5");
  check("max_audit_rate", max_audit_rate, max_audit_rate > 0 && max_audit_rate <= 1, "above 0 and at most 1");
  check("audit_rate", audit_rate, audit_rate > 0 && audit_rate <= max_audit_rate, "above 0 and at most max_audit_rate");
  check("closed_audit_rate", closed_audit_rate, closed_audit_rate > 0 && closed_audit_rate <= 1,
        "above 0 and at most 1");
  check("close_level", close_level, close_level > 0 && close_level < 1, "above 0 and below 1");
  check("reopen_level", reopen_level, reopen_level > 0 && reopen_level < 1, "above 0 and below 1");
}

RiskGate::RiskGate(Settings settings) : settings_(settings), generator_(settings.seed) {
  settings_.validate();
  for (std::size_t i = 0; i < kStakes; ++i) ratios_[i] = std::min(kTooHigh[i], kHighestError / settings_.epsilon);
  start(true);
  cusums_.fill(1);  // what was certified is under no suspicion
}

void RiskGate::start(bool open) {
  counters_.open = open;
  counters_.period_requests = 0;
  stakes_ = {};
  cusums_ = ratios_;
  information_ = 0;
  reserve_ = 1;
  weighted_losses_ = 0;
}

double RiskGate::audit_rate() const {
  if (!counters_.open) return settings_.closed_audit_rate;
  return std::min(settings_.max_audit_rate,
                  settings_.audit_rate * ramp(*std::max_element(cusums_.begin(), cusums_.end())));
}

double RiskGate::level() const {
  const auto spent = [](std::uint64_t times) { return -static_cast<int>(std::min<std::uint64_t>(times, 900)) - 1; };
  return counters_.open ? std::ldexp(settings_.close_level, spent(counters_.closings - forced_))
                        : std::ldexp(settings_.reopen_level, spent(counters_.reopenings));
}

double RiskGate::factor(std::size_t stake, double rate, double loss) const {
  const double epsilon = settings_.epsilon;
  if (!counters_.open) return 1 + (1 - kLow[stake]) / (1 - epsilon) * (epsilon - loss);
  return 1 + rate * (ratios_[stake] - 1) / (1 - rate * epsilon) * (loss / rate - epsilon);
}

void RiskGate::take(double rate, double loss) {
  // While closed only observed requests are bet on, so there each of them counts in full.
  information_ += (counters_.open ? rate : 1) * settings_.epsilon;
  weighted_losses_ += loss / rate;
  // What is left of the reserve falls with the root of the information only, so that a late drift finds not much less
  // fresh capital than an early one.
  const double left = 1 / std::sqrt(1 + information_);
  const double fresh = (reserve_ - left) / kStakes;
  reserve_ = left;
  double capital = reserve_;
  const double highest = kMemory * settings_.max_audit_rate / settings_.audit_rate;
  for (std::size_t i = 0; i < kStakes; ++i) {
    const double by = std::max(factor(i, rate, loss), 0.0);
    stakes_[i] = (stakes_[i] + fresh) * by;
    if (counters_.open) cusums_[i] = std::clamp(cusums_[i] * by, 1.0, highest);
    capital += stakes_[i];
  }
  if (capital * level() < 1) return;
  ++(counters_.open ? counters_.closings : counters_.reopenings);
  start(!counters_.open);
}

RiskGate::Decision RiskGate::next(bool could_reuse) {
  const std::lock_guard lock(mutex_);
  Decision decision;
  decision.rate = audit_rate();
  decision.period = counters_.closings + counters_.reopenings;
  const bool chosen = static_cast<double>(generator_() >> 11) * 0x1p-53 < decision.rate;
  decision.reuse = counters_.open && could_reuse;
  decision.audit = could_reuse && chosen;
  ++counters_.requests;
  ++counters_.period_requests;
  counters_.candidates += could_reuse ? 1 : 0;
  // Nothing more will be known of a request that is not audited. Open, it counts as a loss of 0; closed, it counts only
  // if it would have been observed.
  if (!decision.audit && (counters_.open || chosen) && !blind_) take(decision.rate, 0);
  return decision;
}

void RiskGate::record(const Decision& decision, double loss) {
  const double checked = loss >= 0 && loss <= 1 ? loss : 1;
  const std::lock_guard lock(mutex_);
  if (!decision.audit) return;
  blind_ = false;
  ++counters_.audits;
  counters_.losses += checked;
  if (decision.period == counters_.closings + counters_.reopenings) take(decision.rate, checked);
}

void RiskGate::fail(const Decision& decision) {
  const std::lock_guard lock(mutex_);
  if (!decision.audit || counters_.open || decision.period != counters_.closings + counters_.reopenings) return;
  // No capital is put in for it, so that however many fail, opening takes no longer once they are made again.
  for (std::size_t i = 0; i < kStakes; ++i) stakes_[i] *= std::max(factor(i, decision.rate, 1), 0.0);
}

void RiskGate::close() {
  const std::lock_guard lock(mutex_);
  blind_ = true;
  if (!counters_.open) return;
  ++counters_.closings;
  ++forced_;
  start(false);
}

bool RiskGate::open() const {
  const std::lock_guard lock(mutex_);
  return counters_.open;
}

RiskGate::Counters RiskGate::counters() const {
  const std::lock_guard lock(mutex_);
  Counters counters = counters_;
  counters.audit_rate = audit_rate();
  counters.level = level();
  counters.capital = reserve_;
  for (const double stake : stakes_) counters.capital += stake;
  if (counters.period_requests > 0) {
    counters.error_estimate = weighted_losses_ / static_cast<double>(counters.period_requests);
  }
  return counters;
}

}  // namespace llmcache
