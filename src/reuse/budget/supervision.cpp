#include "reuse/budget/supervision.h"

#include <c10/util/Exception.h>
#include <fmt/core.h>

#include <algorithm>

#include "model/probe.h"

namespace llmcache {
namespace {

std::string told(const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::exception& error) {
    return reason_of(error);
  } catch (...) {
    return "what was thrown is no std::exception";
  }
}

std::size_t number(AuditPlace place) { return static_cast<std::size_t>(place); }

}  // namespace

void AuditFailures::failed(AuditPlace place, const std::exception_ptr& thrown) noexcept {
  std::string reason;
  try {
    reason = told(thrown);
    const std::lock_guard lock(mutex_);
    ++count_;
    last_reason_ = reason;
  } catch (const std::exception&) {
    // No memory for the reason: the count tells.
  }
  warn(told_failed_[number(place)], [&] {
    return fmt::format("llmcache: an audit {} failed: {}; once {} in a row have, nothing is reused any more",
                       place == AuditPlace::kWithinCall ? "within a call" : "in the background", reason,
                       Supervision::kMostFailed);
  });
}

void AuditFailures::dropped() noexcept {
  warn(told_dropped_, [] {
    return fmt::format(
        "llmcache: there is no time for all audits in the background, and one was dropped; once {} in a "
        "row are, nothing is reused any more",
        Supervision::kMostDropped);
  });
}

void AuditFailures::stopped(std::uint64_t many, const char* what) noexcept {
  warn(told_stopped_, [&] {
    return fmt::format("llmcache: {} audits in a row {}: reuse cannot be supervised, and stops until audits succeed",
                       many, what);
  });
}

std::uint64_t AuditFailures::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

std::string AuditFailures::last_reason() const {
  const std::lock_guard lock(mutex_);
  return last_reason_;
}

void AuditFailures::warn(std::once_flag& once, const std::function<std::string()>& text) noexcept {
  try {
    std::call_once(once, [&] { TORCH_WARN(text()); });
  } catch (...) {
    // Handlers may throw; a warning must not end a request.
  }
}

Supervision::Supervision(AuditFailures& failures, const std::vector<RiskGate::Settings>& gates) : failures_(failures) {
  for (const RiskGate::Settings& settings : gates) gates_.push_back(std::make_unique<RiskGate>(settings));
}

std::size_t Supervision::threshold_index() const {
  const auto open = std::find_if(gates_.begin(), gates_.end(), [](const auto& gate) { return gate->open(); });
  return static_cast<std::size_t>(open - gates_.begin());
}

void Supervision::pass_over() {
  const std::size_t watched = std::min(threshold_index() + 1, gates_.size());
  for (std::size_t k = 0; k < watched; ++k) gates_[k]->next(false);
}

void Supervision::record(const AskedAudit& audit, double loss, AuditPlace place) {
  failed_in_row_[number(place)] = 0;
  gates_[audit.threshold_index]->record(audit.decision, loss);
}

void Supervision::fail(const std::vector<AskedAudit>& audits, AuditPlace place,
                       const std::exception_ptr& thrown) noexcept {
  for (const AskedAudit& audit : audits) gates_[audit.threshold_index]->fail(audit.decision);
  failures_.failed(place, thrown);
  const std::uint64_t many = ++failed_in_row_[number(place)];
  if (many >= kMostFailed) stop(many, "failed");
}

void Supervision::drop(const std::vector<AskedAudit>& audits) noexcept {
  for (const AskedAudit& audit : audits) gates_[audit.threshold_index]->fail(audit.decision);
  failures_.dropped();
  const std::uint64_t many = ++dropped_in_row_;
  if (many >= kMostDropped) stop(many, "were dropped");
}

void Supervision::stop(std::uint64_t many, const char* what) noexcept {
  for (const auto& gate : gates_) gate->close();
  failures_.stopped(many, what);
}

RiskGate::Counters Supervision::counters() const {
  RiskGate::Counters sum;
  sum.open = threshold_index() < thresholds();
  for (const auto& gate : gates_) {
    const auto own = gate->counters();
    sum.audits += own.audits;
    sum.losses += own.losses;
    sum.closings += own.closings;
    sum.reopenings += own.reopenings;
  }
  return sum;
}

}  // namespace llmcache
