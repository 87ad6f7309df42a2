// The inputs of one call, checked, and where the real tokens of each row are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"

namespace llmcache {

struct RowSpan {
  std::int64_t first = 0;   ///< position of the first real token
  std::int64_t tokens = 0;  ///< real tokens
};

struct Batch {
  Inputs inputs;  ///< one entry for every input the model declares
  std::int64_t rows = 0;
  std::int64_t width = 0;  ///< tokens a row, padding included
  std::vector<RowSpan> spans;
  bool padded = false;       ///< some row has fewer real tokens than the width
  bool right_padded = true;  ///< every row begins with a real token
  bool contiguous = true;    ///< the real tokens of every row stand side by side
  std::int64_t tokens = 0;   ///< real tokens of all rows
  std::string plain_only;    ///< why only the plain model can be trusted with it; empty: nothing speaks against reuse
  std::int64_t largest_mark = 0;  ///< largest magnitude in inputs that select from no embedding, the mask aside

  /// Every real token through every layer.
  [[nodiscard]] Plan full_plan(std::int32_t layers) const;
  /// Bytes that its inputs take.
  [[nodiscard]] std::size_t input_bytes() const;
  /// The batch made of some of the rows, in that order.
  [[nodiscard]] Batch select(const std::vector<std::int64_t>& chosen) const;
};

/// Throws Error(kInvalidInput) that says what was found and what is expected. Fills all of it; values that no probe
/// holds (a mask of other numbers than 0 and 1, ids outside the vocabulary, in padding too) make it `plain_only`.
Batch check_batch(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device);

}  // namespace llmcache
