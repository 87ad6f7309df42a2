#include "refresh/verification.h"

#include <fmt/core.h>

#include <algorithm>

namespace llmcache {
namespace {

void raise(std::atomic<std::int64_t>& most, std::int64_t value) noexcept {
  std::int64_t now = most.load(std::memory_order_relaxed);
  while (now < value && !most.compare_exchange_weak(now, value, std::memory_order_relaxed)) {
  }
}

/// Spreads numbers evenly over 64 bits (splitmix64, Steele et al., OOPSLA 2014).
std::uint64_t spread(std::uint64_t x) noexcept {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31U);
}

}  // namespace

const char* to_string(Mechanism mechanism) noexcept {
  switch (mechanism) {
    case Mechanism::kExactMatch:
      return "exact match";
    case Mechanism::kSource:
      return "source";
    case Mechanism::kPrefix:
      return "prefix";
    case Mechanism::kPacked:
      return "packed";
    case Mechanism::kDense:
      return "dense";
  }
  return "unknown";
}

bool Envelope::covers(SizeCode code) const noexcept {
  if (!code.growing()) return has(code.number());
  // What was compared at a larger size covers the smaller ones.
  const std::uint32_t last = static_cast<std::uint32_t>(code.kind()) << 10U | 31U << 5U;
  for (std::uint32_t larger = code.number(); larger <= last; larger += 32) {
    if (has(larger)) return true;
  }
  return false;
}

void Envelope::add(SizeCode code) noexcept {
  if (code.number() >= kSizeCodes) return;
  words_[code.number() / 64].fetch_or(std::uint64_t{1} << (code.number() % 64), std::memory_order_relaxed);
}

void Envelope::add_sizes(std::int64_t tokens, std::int64_t rows, std::int64_t padding) noexcept {
  raise(tokens_, tokens);
  raise(rows_, rows);
  raise(padding_, padding);
}

VerifiedEnvelope Envelope::plain() const {
  VerifiedEnvelope envelope{tokens_, rows_, padding_, {}};
  for (std::uint32_t code = 0; code < kSizeCodes; ++code) {
    if (has(code)) envelope.codes.push_back(code);
  }
  return envelope;
}

void Envelope::take(const VerifiedEnvelope& other) noexcept {
  for (const std::uint32_t code : other.codes) add(SizeCode(code));
  add_sizes(other.tokens, other.rows, other.padding);
}

void Envelope::clear() noexcept {
  for (auto& word : words_) word.store(0, std::memory_order_relaxed);
  tokens_ = rows_ = padding_ = 0;
}

Verification::Due Verification::due(std::span<const SizeCode> sizes, bool reused) noexcept {
  if (!(rate_ > 0)) return Due::kNo;
  if (!std::ranges::all_of(sizes, [&](SizeCode code) { return envelope_.covers(code); })) return Due::kFirstUse;
  if (!reused) return Due::kNo;
  const std::uint64_t number = answers_.fetch_add(1, std::memory_order_relaxed);
  constexpr double kAll = 18446744073709551616.0;  // 2^64
  if (rate_ < 1 && static_cast<double>(spread(number)) >= rate_ * kAll) return Due::kNo;
  const double share = kTimeShare * rate_;
  if (share < 1 && sample_ms_.load(std::memory_order_relaxed) > share * call_ms_.load(std::memory_order_relaxed)) {
    return Due::kNo;
  }
  return Due::kSample;
}

void Verification::add_time(double call_ms, double sample_ms) noexcept {
  call_ms_.fetch_add(call_ms, std::memory_order_relaxed);
  if (sample_ms > 0) sample_ms_.fetch_add(sample_ms, std::memory_order_relaxed);
}

void Verification::agreed(Due due, std::span<const SizeCode> sizes) noexcept {
  ++checks_;
  first_uses_ += due == Due::kFirstUse ? 1 : 0;
  for (const SizeCode code : sizes) envelope_.add(code);
}

std::vector<std::string> Verification::differed(Due due, Mechanism mechanism, const std::string& reason) {
  ++checks_;
  first_uses_ += due == Due::kFirstUse ? 1 : 0;
  ++mismatches_;
  std::vector<std::string> closed;
  const auto close = [&](Mechanism one) {
    if (closed_[static_cast<std::size_t>(one)].exchange(true)) return;
    closed.push_back(fmt::format("{}: {}", to_string(one), reason));
    const std::lock_guard lock(mutex_);
    reasons_.push_back(closed.back());
  };
  if (mechanism == Mechanism::kExactMatch) {
    close(mechanism);
    return closed;
  }
  for (std::size_t one = 0; one <= static_cast<std::size_t>(mechanism); ++one) {
    if (mechanism <= Mechanism::kPrefix && one == 0) continue;
    close(static_cast<Mechanism>(one));
  }
  return closed;
}

void Verification::take(const Verification& other) {
  envelope_.take(other.envelope_.plain());
  const std::scoped_lock lock(mutex_, other.mutex_);
  for (std::size_t i = 0; i < closed_.size(); ++i) {
    if (other.closed_[i].load(std::memory_order_acquire)) closed_[i].store(true, std::memory_order_release);
  }
  reasons_ = other.reasons_;
}

void Verification::fill(VerificationStats& stats) const {
  stats.checks = checks_;
  stats.first_uses = first_uses_;
  stats.mismatches = mismatches_;
  stats.failed = failed_;
  stats.envelope = envelope_.plain();
  const std::lock_guard lock(mutex_);
  stats.closed = reasons_;
}

}  // namespace llmcache
