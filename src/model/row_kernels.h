// What stands before and behind a product of packed weights: rows are quantised, and results are finished in one pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace llmcache {

/// What becomes of a product before it is stored.
enum class Activation : std::int8_t { kNone, kRelu, kSilu, kGelu, kGeluTanh };

/// How numbers from -127 to 127 are held.
enum class RowBytes : std::uint8_t {
  kSigned,   ///< int8
  kShifted,  ///< uint8, with 128 added
};

/// Rows of 8 bits, `[room, columns]`, and what each is to be multiplied with, float32 `[rows]`.
struct QuantisedRows {
  at::Tensor values;
  at::Tensor scales;
};

/// Rounds each row of a contiguous float32 or bfloat16 `[rows, columns]` to whole multiples of its largest magnitude
/// / 127. What becomes of a row depends on nothing but the row. One that holds a value that is not finite gets a scale
/// that is not a number. `room`: rows of the result, at least as many as there are; further ones are zeros. `factors`:
/// float32 `[columns]`, what each column is multiplied with first; undefined: nothing. With them no scale is below
/// 1e-12, so that what is left out by a factor of 0 can be divided by it.
QuantisedRows quantise_rows(const at::Tensor& rows, std::int64_t room, RowBytes bytes, const at::Tensor& factors = {});

/// Adds rows[:, columns] x weights, in units of the rows' scales, to the first rows of a contiguous float32
/// `[room, out]`. `columns`: int64, a multiple of 8 of them; `weights`: float32 `[columns, out]`, contiguous. Sums are
/// made in one order whatever the number of rows.
void add_columns(const at::Tensor& product, const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& columns,
                 const at::Tensor& weights);

/// How a product is finished: activation(product * row_scales[row] + bias) + residual. Undefined tensors are left out.
struct Finish {
  at::Tensor row_scales = {};  ///< float32 [rows]
  at::Tensor bias = {};        ///< float32 or bfloat16 [columns]
  Activation activation = Activation::kNone;
  at::Tensor residual = {};  ///< contiguous, of as many elements as the result and of its type
};

/// Finishes a contiguous `[rows, columns]` of float32 or bfloat16, as a tensor of `type`, float32 or bfloat16; that is
/// the product itself where it has the type. All is computed in float32.
at::Tensor finish_rows(const at::Tensor& product, const Finish& finish, at::ScalarType type);

}  // namespace llmcache
