// Packing the real tokens of a padded batch into rows, and back.
#pragma once

#include <ATen/core/Tensor.h>

#include "llmcache/model/token_level.h"

namespace llmcache {

/// Which dimensions of a tensor run over batch, tokens, or both merged; -1: none does.
struct TokenDims {
  int batch = -1;
  int tokens = -1;
  int merged = -1;
};

/// The rows that `layout` lists: batch becomes 1, tokens (or the merged dimension) the packed rows.
at::Tensor pack_rows(const at::Tensor& tensor, const TokenDims& dims, const PackedLayout& layout);

/// The inverse: a tensor over batch and tokens with zeros wherever `layout` lists nothing. A view of the packed rows
/// where these are in place already.
at::Tensor unpack_rows(const at::Tensor& packed, const TokenDims& dims, const PackedLayout& layout);

/// Equal up to the rounding of their type: |a - b| <= tolerance * max(|b|, 1e-3), element by element
/// against the largest magnitude. NaN equals NaN at the same place.
bool nearly_equal(const at::Tensor& a, const at::Tensor& b);
/// The same for results that carry the rounding of `rounding` (Model::rounding()), whatever their type.
bool nearly_equal(const at::Tensor& a, const at::Tensor& b, at::ScalarType rounding);

/// The tolerance of nearly_equal for a type.
double rounding_tolerance(at::ScalarType dtype);

}  // namespace llmcache
