#include "model/packing.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace llmcache {
namespace {

/// Zeros. On the CPU a large block comes from calloc: pages that nobody writes to are then neither
/// cleared nor even made present, and the padding of a language model's logits costs nothing.
at::Tensor zeros_to_fill(const std::vector<std::int64_t>& shape, const at::TensorOptions& options) {
  constexpr std::size_t kLarge = std::size_t{1} << 20;
  constexpr std::size_t kAlignment = 64;
  std::size_t bytes = options.dtype().itemsize();
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  if (!options.device().is_cpu() || bytes < kLarge) return at::zeros(shape, options);
  void* block = std::calloc(bytes + kAlignment, 1);
  if (block == nullptr) return at::zeros(shape, options);  // raises LibTorch's own out-of-memory error
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  auto* data = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  return at::from_blob(
      data, shape, [block](void*) { std::free(block); }, options);
}

}  // namespace

at::Tensor pack_rows(const at::Tensor& tensor, const TokenDims& dims, const PackedLayout& layout) {
  if (dims.merged >= 0) return tensor.index_select(dims.merged, layout.flat_index);
  if (dims.batch < 0) {
    // The same for all rows of the batch: one entry a position.
    return tensor.index_select(dims.tokens, layout.position);
  }
  const auto moved = tensor.movedim({dims.batch, dims.tokens}, {0, 1});
  // A dimension of one row is shared by the whole batch only if the label said so; here it is real.
  const auto rows = moved.flatten(0, 1).index_select(0, layout.flat_index);
  return rows.unsqueeze(0).movedim({0, 1}, {dims.batch, dims.tokens});
}

namespace {

/// Do the packed rows stand where they belong already: every position of every row of the batch, in order?
bool in_place(const PackedLayout& layout) {
  std::int64_t row = 0;
  for (const PackedSequence& sequence : layout.sequences) {
    if (sequence.row != row || sequence.first != 0 || sequence.tokens != layout.padded_length) return false;
    if (sequence.offset != row * layout.padded_length) return false;
    ++row;
  }
  return row == layout.batch;
}

}  // namespace

at::Tensor unpack_rows(const at::Tensor& packed, const TokenDims& dims, const PackedLayout& layout) {
  const auto rows = dims.merged >= 0 ? packed.movedim(dims.merged, 0)
                                     : packed.movedim({dims.batch, dims.tokens}, {0, 1}).select(0, 0);
  auto shape = rows.sizes().vec();
  shape[0] = layout.batch * layout.padded_length;
  at::Tensor all;
  if (in_place(layout) && rows.is_contiguous()) {
    all = rows.narrow(0, 0, shape[0]);  // logits are large: not copied
  } else {
    all = zeros_to_fill(shape, rows.options());
    for (const PackedSequence& sequence : layout.sequences) {
      all.narrow(0, sequence.row * layout.padded_length + sequence.first, sequence.tokens)
          .copy_(rows.narrow(0, sequence.offset, sequence.tokens));
    }
  }
  if (dims.merged >= 0) return all.movedim(0, dims.merged);
  shape.erase(shape.begin());
  shape.insert(shape.begin(), {layout.batch, layout.padded_length});
  return all.view(shape).movedim({0, 1}, {dims.batch, dims.tokens});
}

double rounding_tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-10;
    case at::kBFloat16:
      return 6e-2;
    case at::kHalf:
      return 1e-2;
    default:
      return 5e-5;
  }
}

bool nearly_equal(const at::Tensor& a, const at::Tensor& b) { return nearly_equal(a, b, b.scalar_type()); }

bool nearly_equal(const at::Tensor& a, const at::Tensor& b, at::ScalarType rounding) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  if (a.numel() == 0 || at::equal(a, b)) return true;
  if (!at::isFloatingType(b.scalar_type())) return at::equal(a, b);
  const auto nan = b.isnan();
  if (!at::equal(a.isnan(), nan)) return false;
  const auto x = a.to(at::kDouble).masked_fill(nan, 0.0);
  const auto y = b.to(at::kDouble).masked_fill(nan, 0.0);
  if (x.isinf().any().item<bool>() || y.isinf().any().item<bool>()) return at::equal(x, y);
  const double scale = std::max(y.abs().max().item<double>(), 1e-3);
  const double tolerance = std::max(rounding_tolerance(b.scalar_type()), rounding_tolerance(rounding));
  return (x - y).abs().max().item<double>() <= tolerance * scale;
}

}  // namespace llmcache
