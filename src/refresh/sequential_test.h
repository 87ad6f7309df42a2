// Watches, while it serves, whether a mechanism that reuses answers stays within its error budget, and stops it where
// it does not.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <random>

namespace llmcache {

/// Some of the requests whose answer could be reused are audited: computed in full as well, and the loss of the reused
/// answer taken, in [0, 1]. What is held below epsilon is the mean loss over all served requests (0 where nothing was
/// reused).
///
/// Open: each request t is audited with a probability q_t that is chosen before it is seen. X_t = loss / q_t if
/// audited, else 0, so that E[X_t] is the error. The test of "the error is at most epsilon" bets on X_t (Waudby-Smith &
/// Ramdas, arXiv 2010.09686): a stake on an error of r * epsilon multiplies its capital by 1 + lambda_t (X_t - epsilon)
/// with lambda_t = q_t (r - 1) / (1 - q_t epsilon), which is the likelihood ratio for losses of 0 and 1. Capital is put
/// in bit by bit, so that some of it is fresh whenever the drift begins (the mixture over starting times of
/// e-detectors: Shin, Ramdas & Rinaldo, arXiv 2203.03532), and never more than 1 in all. So by Ville's inequality the
/// probability that it ever reaches 1/a is at most a, as long as the error stays at or below epsilon. At 1/a the gate
/// closes.
///
/// q_t is audit_rate times the cube of the largest CUSUM statistic of those likelihood ratios (Page, Biometrika 41,
/// 1954), at most max_audit_rate: after one audited error nearly everything is audited, and after about 1 / epsilon
/// audits without another q_t is back at audit_rate, where it begins: what was certified is under no suspicion. Opening
/// again counts as an error just seen. Where an audited request is answered in full, a raised q_t lowers the error that
/// is served long before anything is proven. What it cannot lower is what comes before the first audited error: on
/// average 1 / audit_rate wrong answers after a sudden drift.
///
/// Closed: nothing is reused; a share closed_audit_rate of requests is audited. The gate opens when the like test
/// rejects "the error is at least epsilon" on what was seen since it closed.
///
/// An audit that could not be made is no evidence: open, its request is left out of the test; closed, it counts as the
/// worst loss. Where audits cannot be made at all, close() stops reuse without a test; nothing then counts towards
/// opening before the first audit that is recorded.
///
/// The n-th closing by the test is tested at close_level / 2^n, the n-th opening at reopen_level / 2^n. So a mechanism
/// that stays within its budget is ever closed with a probability of at most close_level, and one that stays out of it
/// is ever opened again with at most reopen_level.
class RiskGate {
 public:
  struct Settings {
    double epsilon = 0.01;      ///< error budget, above 0 and at most 0.5
    double audit_rate = 0.1;    ///< least q_t, above 0 and at most max_audit_rate; what audits cost while all is well
    double max_audit_rate = 1;  ///< at most 1
    double closed_audit_rate = 1;  ///< above 0, at most 1
    double close_level = 0.01;     ///< above 0, below 1
    double reopen_level = 0.1;     ///< above 0, below 1
    std::uint64_t seed = 0;        ///< of the choice of audits

    /// Throws Error(kInvalidOptions) that names the field at fault.
    void validate() const;
  };

  /// What to do with one request.
  struct Decision {
    bool reuse = false;  ///< the reused answer may be served
    /// Compute in full as well, serve that, and call record() with the loss of the reused answer.
    bool audit = false;

   private:
    friend class RiskGate;
    double rate = 0;           // q_t
    std::uint64_t period = 0;  // closings and openings before it
  };

  struct Counters {
    bool open = true;
    std::uint64_t requests = 0;    ///< seen by next()
    std::uint64_t candidates = 0;  ///< of them, those whose answer could be reused
    std::uint64_t audits = 0;      ///< recorded
    std::uint64_t closings = 0;
    std::uint64_t reopenings = 0;
    double losses = 0;                  ///< sum over recorded audits
    double audit_rate = 0;              ///< q_t now
    std::uint64_t period_requests = 0;  ///< since the gate opened or closed last; what is below is of these
    double error_estimate = 0;          ///< unbiased estimate of the mean loss over all of them
    double capital = 0;                 ///< of the present test; it ends at 1 / level
    double level = 0;                   ///< of the present test
  };

  explicit RiskGate(Settings settings);

  /// Each request that is served, once; `could_reuse`: a reused answer is at hand. Where the request fails, or is
  /// answered in another way after all, nothing more is told of it, and it has no part in the test. Thread-safe.
  Decision next(bool could_reuse);
  /// The loss of an audited decision, in [0, 1]; NaN and anything else counts as 1. Those of before the last closing or
  /// opening are counted and no more. Thread-safe.
  void record(const Decision& decision, double loss);
  /// The audit of a decision whose answer was or could have been served could not be made. Thread-safe.
  void fail(const Decision& decision);
  /// Audits cannot be made: closes, whatever was seen. Thread-safe.
  void close();

  [[nodiscard]] bool open() const;
  [[nodiscard]] Counters counters() const;

 private:
  static constexpr std::size_t kStakes = 4;

  // All with the lock held.
  void start(bool open);
  /// One step of the present test, by a request that was to be observed with probability `rate`.
  void take(double rate, double loss);
  [[nodiscard]] double factor(std::size_t stake, double rate, double loss) const;
  [[nodiscard]] double level() const;
  [[nodiscard]] double audit_rate() const;

  const Settings settings_;
  std::array<double, kStakes> ratios_{};  ///< r of each stake while open
  mutable std::mutex mutex_;              ///< guards all below
  std::mt19937_64 generator_;
  Counters counters_;
  std::array<double, kStakes> stakes_{};  ///< capital at stake
  std::array<double, kStakes> cusums_{};
  bool blind_ = false;        ///< closed by close(), and nothing was recorded since
  std::uint64_t forced_ = 0;  ///< closings by close()
  double information_ = 0;    ///< expected audits of this period, times epsilon
  double reserve_ = 1;        ///< capital not at stake yet
  double weighted_losses_ = 0;
};

}  // namespace llmcache
