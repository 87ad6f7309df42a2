// From token ids to the tensors that a model takes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "llmcache/model/layered_model.h"

namespace llmcache {

/// Sequences of different lengths as one batch.
struct PaddedBatch {
  at::Tensor ids;   ///< int64 `[batch, tokens]` on the CPU, padded on the right to the longest sequence
  at::Tensor mask;  ///< the same shape: 1 at real tokens, 0 at padding

  /// For a model that takes (input_ids, attention_mask).
  [[nodiscard]] Inputs inputs() const { return {ids, mask}; }
  /// For a wrapped model, on its device: ids where `profile` says; the mask there, and for inputs that have "mask" or
  /// "pool" in their names; zeros for those that have "type" or "segment" in them. Throws Error(kInvalidInput) for a
  /// model with other inputs (positions, say), and where rows are padded and the model takes no mask.
  [[nodiscard]] Inputs inputs(const ModelProfile& profile) const;
  /// For an encoder-decoder: these are the targets, `source` has their sources, row by row. The first input that is of
  /// the source takes its ids. Throws as above, and inputs(profile) alone throws for such a model.
  [[nodiscard]] Inputs inputs(const ModelProfile& profile, const PaddedBatch& source) const;
};

/// One row for each sequence of token ids, in their order. `pad_id` stands at padding: any id that the model knows.
/// A sequence may be empty; where the output of a row is
/// more than that of its tokens, such a batch runs as the plain module runs it. Throws Error(kInvalidInput) where there
/// is no sequence, or all are empty.
[[nodiscard]] PaddedBatch pad(const std::vector<std::vector<std::int64_t>>& sequences, std::int64_t pad_id = 0);

}  // namespace llmcache
