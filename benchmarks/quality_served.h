// What can be said about single served sequences: was the cached request one that it may stand for?
#pragma once

#include <cstdint>

#include "statistics.h"
#include "token_file.h"

namespace llmcache::bench {

/// Counts served sequences of one mode on one workload.
///
/// Duplicates: a sequence that was served from its pair's other text is right where the pair is
/// labelled a duplicate and unsafe where it is labelled none; served from a text with equal ids it is
/// right; served from any other text nobody labelled the two, and it is neither.
/// Answers: a sequence that was served from a request with the same gold answer (or, like itself,
/// without one) has the same answer.
class ServedCounts {
 public:
  explicit ServedCounts(const TokenFile& file) : file_(file) {}

  static constexpr std::int64_t kNotServed = -1;
  static constexpr std::int64_t kUnknown = -2;  ///< served, the cache does not say from what

  /// Sequence `asking` of the file was computed (kNotServed) or served from sequence `entry` of the file.
  void add(std::int64_t request, std::int64_t asking, std::int64_t entry);

  /// Right / (right + unsafe). NaN without labelled pairs among the served.
  [[nodiscard]] double precision() const;
  /// Right among sequences whose pair is a duplicate / such sequences that asked.
  [[nodiscard]] double recall() const;
  /// Unsafe / all served, those served from a text that nobody labelled included.
  [[nodiscard]] Rate unsafe() const;
  [[nodiscard]] std::int64_t unlabelled() const { return served_ - right_ - unsafe_; }
  /// Served from a request with the same gold answer / all served.
  [[nodiscard]] Rate same_answer() const;

 private:
  [[nodiscard]] std::int64_t request_of(std::int64_t sequence) const;

  const TokenFile& file_;
  std::int64_t served_ = 0;
  std::int64_t right_ = 0;
  std::int64_t unsafe_ = 0;
  std::int64_t duplicates_ = 0;  // asked, labelled
  std::int64_t recalled_ = 0;
  std::int64_t same_answer_ = 0;
};

}  // namespace llmcache::bench
