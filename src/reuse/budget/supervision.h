// The supervision of one calibration: gates that audits close and open, and what is done where audits cannot be made.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "refresh/sequential_test.h"

namespace llmcache {

/// Where an audit is made.
enum class AuditPlace { kWithinCall, kInBackground };

/// Audits that could not be made, over the life of a cache. Warns (TORCH_WARN) of each kind of failure once.
/// Thread-safe.
class AuditFailures {
 public:
  /// Counts an audit that `thrown` ended.
  void failed(AuditPlace place, const std::exception_ptr& thrown) noexcept;
  /// One was left out of the queue. Warns only: the queue counts.
  void dropped() noexcept;
  /// Reuse was stopped because of `many` of them in a row, which "failed" or "were dropped".
  void stopped(std::uint64_t many, const char* what) noexcept;

  [[nodiscard]] std::uint64_t count() const;
  [[nodiscard]] std::string last_reason() const;  ///< empty: none failed

 private:
  static void warn(std::once_flag& once, const std::function<std::string()>& text) noexcept;

  mutable std::mutex mutex_;
  std::uint64_t count_ = 0;  ///< guarded by mutex_, as is last_reason_
  std::string last_reason_;
  std::array<std::once_flag, 2> told_failed_;  ///< by AuditPlace
  std::once_flag told_dropped_, told_stopped_;
};

/// An audit that a gate has asked for.
struct AskedAudit {
  std::size_t threshold_index = 0;
  RiskGate::Decision decision;
};

/// One gate for each of a calibration's thresholds; without gates nothing is supervised.
///
/// An audit that fails is no evidence that the answer was right. Once kMostFailed of them have failed in a row in one
/// place, or kMostDropped were dropped in a row because too many were waiting, supervision sees nothing: all gates
/// close. Audits go on for requests that run in full anyway, and gates open as they always do, on audits that succeed;
/// as long as none has succeeded in that place, one more failure closes them again. Thread-safe.
class Supervision {
 public:
  static constexpr std::uint64_t kMostFailed = 8;
  static constexpr std::uint64_t kMostDropped = 64;

  /// `failures` must outlive it.
  Supervision(AuditFailures& failures, const std::vector<RiskGate::Settings>& gates);

  [[nodiscard]] std::size_t thresholds() const noexcept { return gates_.size(); }
  /// What to do with a request for which a threshold gives an answer to reuse, or gives none.
  RiskGate::Decision next(std::size_t threshold_index, bool could_reuse) {
    return gates_[threshold_index]->next(could_reuse);
  }
  /// A request that this mechanism leaves to another, or to the full computation. It costs no error here, and budgets
  /// are for the mean over all requests.
  void pass_over();
  /// The most liberal threshold whose gate is open; the number of thresholds if all are closed.
  [[nodiscard]] std::size_t threshold_index() const;

  /// An audit was made; `loss` as RiskGate::record() takes it.
  void record(const AskedAudit& audit, double loss, AuditPlace place);
  /// The audits of one sequence could not be made.
  void fail(const std::vector<AskedAudit>& audits, AuditPlace place, const std::exception_ptr& thrown) noexcept;
  /// They were left out of the queue, which has no room for them.
  void drop(const std::vector<AskedAudit>& audits) noexcept;
  /// They found room in the queue.
  void queued() noexcept { dropped_in_row_ = 0; }

  /// Sums over the gates; open if one of them is.
  [[nodiscard]] RiskGate::Counters counters() const;

 private:
  void stop(std::uint64_t many, const char* what) noexcept;

  AuditFailures& failures_;
  std::vector<std::unique_ptr<RiskGate>> gates_;
  std::array<std::atomic<std::uint64_t>, 2> failed_in_row_{};  ///< by AuditPlace
  std::atomic<std::uint64_t> dropped_in_row_{0};
};

}  // namespace llmcache
