// Which token comes out on top: greedy decoding, and whether two sets of logits agree on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "records.h"

namespace llmcache::bench {

/// What comes out on top in each row of `logits` [rows, vocabulary].
std::vector<std::int64_t> best_tokens(const at::Tensor& logits);

/// Counts tokens that were compared with a reference's.
class GreedyCount {
 public:
  /// Row i of both, [rows, vocabulary], predicts token `first` + i of the sequence.
  void compare(std::int64_t sequence, std::int64_t first, const at::Tensor& reference, const at::Tensor& logits);
  /// The same for a token that was chosen; `reference`: [vocabulary]. True if the reference chooses it too.
  bool compare(std::int64_t sequence, std::int64_t token, const at::Tensor& reference, std::int64_t chosen);

  [[nodiscard]] const GreedyResult& result() const { return result_; }

 private:
  GreedyResult result_;
};

}  // namespace llmcache::bench
