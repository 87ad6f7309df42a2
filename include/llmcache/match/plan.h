// A Plan says, for each sequence of a batch, where each token's state comes from and through which
// layers it runs. `match` makes plans, `execute` obeys them; a test can write one by hand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llmcache {

/// A run of neighbouring tokens that share their fate.
///
/// Layers are numbered 0 .. L-1 and a token is *active* in layer l if first_layer <= l < last_layer.
/// An active token's hidden state is computed there. Where it is not active, its key and value come
/// from the donor. Its state before first_layer (if that is not 0) and its final state (if
/// last_layer < L) come from the donor too.
struct TokenRange {
  std::int64_t begin = 0;        ///< first token, counted from the sequence's first real token
  std::int64_t end = 0;          ///< one past the last token
  std::int32_t first_layer = 0;  ///< first layer that computes them
  std::int32_t last_layer = 0;   ///< one past the last layer that computes them
  std::int64_t donor_begin = 0;  ///< position in the donor of the token at `begin`
};

/// One sequence. `ranges` cover [0, tokens) without gap or overlap, in order.
struct SequencePlan {
  std::int64_t row = 0;     ///< row of the batch
  std::int64_t first = 0;   ///< position of its first real token in the row
  std::int64_t tokens = 0;  ///< number of real tokens
  std::int32_t donor = -1;  ///< index into the donors given beside the plan; -1: none
  std::vector<TokenRange> ranges;

  [[nodiscard]] bool active(std::int64_t token, std::int32_t layer) const noexcept;
  /// True if every token runs through all of `layers` layers.
  [[nodiscard]] bool computes_all(std::int32_t layers) const noexcept;
};

/// A batch. Plain data, safe to copy; rows that no sequence names are all padding.
struct Plan {
  std::int64_t rows = 0;           ///< of the batch
  std::int64_t padded_length = 0;  ///< tokens a row, padding included
  std::int32_t layers = 0;         ///< L
  std::vector<SequencePlan> sequences;

  /// Throws Error(kInvalidOptions) that names the sequence and what is wrong with it; `donors` is
  /// the number of donors that will be given beside the plan.
  void validate(std::size_t donors) const;
  [[nodiscard]] std::string to_string() const;
};

/// Every token of a sequence through every layer.
SequencePlan compute_all(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers);

/// Only `active` tokens (ascending, unique, counted from the first real token) run, through all
/// layers; all others come from the same positions of donor number `donor`.
SequencePlan compute_some(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers,
                          const std::vector<std::int64_t>& active, std::int32_t donor);

}  // namespace llmcache
