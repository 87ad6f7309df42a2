// Comparing answers with the plain model's: which, and what follows. No model is run here.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "llmcache/report.h"

namespace llmcache {

/// What an answer may have come from, in the order in which they are closed: with one all before it are closed too, but
/// for kExactMatch, which stands alone.
enum class Mechanism : std::uint8_t {
  kExactMatch,  ///< whole rows of earlier batches
  kSource,      ///< what follows from a source alone, of an encoder-decoder
  kPrefix,      ///< tokens of a longer or shorter sequence
  kPacked,      ///< real tokens only, without the padding between them
  kDense,       ///< layer by layer
};
inline constexpr std::size_t kMechanisms = 5;

/// "exact match", "source", "prefix", "packed", "dense".
const char* to_string(Mechanism mechanism) noexcept;

/// Sizes of an answer that matter for one mechanism. A code is covered once an answer with it was compared.
class SizeCode {
 public:
  enum class Kind : std::uint8_t {
    kDenseLength,   ///< growing: the largest that was compared covers all below
    kDenseRows,     ///< growing
    kPackedLength,  ///< growing
    kPackedRows,    ///< growing
    kPadding,       ///< growing: padding tokens of a row behind its real ones
    kLeftPadding,   ///< growing: in front of them
    kMarks,         ///< growing: the largest number in an input that is no id
    kPrefix,        ///< pair: length of the sequence that computed it, length of the one that takes it
    kMatchRows,     ///< pair: rows of the batch that computed it, rows of the one that takes it
    kMatchLength,   ///< pair: likewise the padded lengths
    kSource,        ///< pair: padded length that a source was computed in, and that it is taken in
  };
  /// `a`, `b`: size_class() of the sizes. `b`: of pairs.
  SizeCode(Kind kind, std::uint8_t a, std::uint8_t b = 0) noexcept
      : code_(static_cast<std::uint32_t>(kind) << 10U | std::min<std::uint32_t>(a, 31) << 5U |
              std::min<std::uint32_t>(b, 31)) {}
  explicit SizeCode(std::uint32_t code) noexcept : code_(code) {}
  [[nodiscard]] Kind kind() const noexcept { return static_cast<Kind>(code_ >> 10U); }
  [[nodiscard]] bool growing() const noexcept { return kind() <= Kind::kMarks; }
  [[nodiscard]] std::uint8_t a() const noexcept { return code_ >> 5U & 31U; }
  [[nodiscard]] std::uint32_t number() const noexcept { return code_; }

 private:
  std::uint32_t code_;
};
inline constexpr std::uint32_t kSizeCodes = 11U << 10U;

/// What was compared. Thread-safe, without locks.
class Envelope {
 public:
  [[nodiscard]] bool covers(SizeCode code) const noexcept;
  void add(SizeCode code) noexcept;
  void add_sizes(std::int64_t tokens, std::int64_t rows, std::int64_t padding) noexcept;
  [[nodiscard]] VerifiedEnvelope plain() const;
  /// Adds what another one has.
  void take(const VerifiedEnvelope& other) noexcept;
  void clear() noexcept;

 private:
  [[nodiscard]] bool has(std::uint32_t code) const noexcept {
    return (words_[code / 64].load(std::memory_order_relaxed) >> (code % 64) & 1U) != 0;
  }
  std::array<std::atomic<std::uint64_t>, kSizeCodes / 64> words_{};
  std::atomic<std::int64_t> tokens_{0}, rows_{0}, padding_{0};
};

/// Decides which answers are compared, and remembers what came of it. Thread-safe.
class Verification {
 public:
  enum class Due : std::uint8_t { kNo, kFirstUse, kSample };

  /// `rate`: Options::verify_rate; 0 switches it off.
  explicit Verification(double rate) : rate_(rate) {}

  /// Of an answer with these sizes. `reused`: something in it was not computed by the plain model for this batch.
  /// Sampling takes at most kTimeShare x rate of the time that calls take: comparing what was known costs a whole pass.
  [[nodiscard]] Due due(std::span<const SizeCode> sizes, bool reused) noexcept;
  /// Time of a call, comparing left out, and of comparing a sample.
  void add_time(double call_ms, double sample_ms) noexcept;

  void agreed(Due due, std::span<const SizeCode> sizes) noexcept;
  /// Closes what the answer came from, for good. Returns what it closed, each with the reason: to be warned of.
  [[nodiscard]] std::vector<std::string> differed(Due due, Mechanism mechanism, const std::string& reason);
  /// It could not be compared.
  void failed() noexcept { ++failed_; }

  [[nodiscard]] bool closed(Mechanism mechanism) const noexcept {
    return closed_[static_cast<std::size_t>(mechanism)].load(std::memory_order_acquire);
  }
  [[nodiscard]] Envelope& envelope() noexcept { return envelope_; }
  /// What another one found out about the same model: sizes that were compared, and what is closed.
  void take(const Verification& other);
  void fill(VerificationStats& stats) const;

  static constexpr double kTimeShare = 10;

 private:
  const double rate_;
  Envelope envelope_;
  std::array<std::atomic<bool>, kMechanisms> closed_{};
  std::atomic<std::uint64_t> answers_{0}, checks_{0}, first_uses_{0}, mismatches_{0}, failed_{0};
  std::atomic<double> call_ms_{0}, sample_ms_{0};
  mutable std::mutex mutex_;
  std::vector<std::string> reasons_;  ///< of what was closed; guarded by mutex_
};

}  // namespace llmcache
