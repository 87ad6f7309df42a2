#include "bank/stored_states.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "bank/group_kernels.h"
#include "bank/tensor_bytes.h"
#include "llmcache/error.h"
#include "refusal.h"

namespace llmcache {
namespace {

std::int64_t groups_of(std::int64_t width, std::int64_t group) { return (width + group - 1) / group; }

at::ScalarType stored_type(BankFormat format, at::ScalarType computed) {
  switch (format) {
    case BankFormat::kBFloat16:
      return at::kBFloat16;
    case BankFormat::kFloat16:
      return at::kHalf;
    case BankFormat::kInt8:
      return at::kChar;
    case BankFormat::kAsComputed:
      break;
  }
  return computed;
}

void check_token_dim(at::IntArrayRef sizes, std::int64_t token_dim, std::int64_t group) {
  const auto dims = static_cast<std::int64_t>(sizes.size());
  if (token_dim < 0 || token_dim >= dims - 1) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("token_dim is {} of states of sizes [{}]; 0 to {} is expected, the last dimension excluded",
                            token_dim, fmt::join(sizes, ", "), dims - 2));
  }
  if (group < 1) throw Error(ErrorCode::kInvalidOptions, fmt::format("group is {}; 1 or more is expected", group));
}

/// A tensor as loops over rows see it: its first element, and how far the next one is in each dimension but the last.
template <typename T>
struct StridedRows {
  T* data = nullptr;
  std::vector<std::int64_t> strides;
};

template <typename T>
StridedRows<T> strided_rows(const at::Tensor& tensor) {
  StridedRows<T> rows;
  if (!tensor.defined()) return rows;
  if constexpr (std::is_const_v<T>) {
    rows.data = tensor.const_data_ptr<std::remove_const_t<T>>();
  } else {
    rows.data = tensor.mutable_data_ptr<T>();
  }
  rows.strides.assign(tensor.strides().begin(), tensor.strides().end() - 1);
  return rows;
}

/// Calls row(width, a, b, c, d) for each row of up to four tensors of one shape; what is null stays null. Dimensions in
/// which all tensors go on without a gap become one long row. `widths`: of a row of each tensor.
template <typename A, typename B, typename C, typename D, typename Row>
void for_rows(at::IntArrayRef sizes, std::array<std::int64_t, 4> widths, const StridedRows<A>& a,
              const StridedRows<B>& b, const StridedRows<C>& c, const StridedRows<D>& d, const Row& row) {
  const std::array<const std::vector<std::int64_t>*, 4> strides = {&a.strides, &b.strides, &c.strides, &d.strides};
  std::size_t outer = sizes.size() - 1;
  for (; outer > 0; --outer) {
    const std::int64_t size = sizes[outer - 1];
    bool joined = true;
    for (std::size_t i = 0; i < 4 && size != 1; ++i) {
      if (!strides[i]->empty()) joined = joined && (*strides[i])[outer - 1] == widths[i];
    }
    if (!joined) break;
    for (auto& width : widths) width *= size;
  }
  std::int64_t count = 1;
  for (std::size_t i = 0; i < outer; ++i) count *= sizes[i];
  std::array<std::int64_t, 4> at{};
  std::vector<std::int64_t> index(outer);
  for (std::int64_t n = 0; n < count; ++n) {
    row(widths[0], a.data + at[0], b.data == nullptr ? nullptr : b.data + at[1],
        c.data == nullptr ? nullptr : c.data + at[2], d.data == nullptr ? nullptr : d.data + at[3]);
    for (std::size_t i = outer; i-- > 0;) {
      const bool wraps = ++index[i] == sizes[i];
      const std::int64_t steps = wraps ? 1 - sizes[i] : 1;
      for (std::size_t j = 0; j < 4; ++j) {
        if (!strides[j]->empty()) at[j] += steps * (*strides[j])[i];
      }
      if (!wraps) break;
      index[i] = 0;
    }
  }
}

}  // namespace

std::pair<at::Tensor, at::Tensor> detail::quantise(const at::Tensor& states, std::int64_t group) {
  const std::int64_t width = states.size(-1);
  const std::int64_t groups = groups_of(width, group);
  const at::Tensor padded = at::constant_pad_nd(states.detach().to(at::kFloat), {0, groups * group - width});
  const at::Tensor grouped = padded.unflatten(-1, {groups, group});
  const at::Tensor step = grouped.abs().amax(-1) / 127;
  const at::Tensor scales = step.masked_fill(step.isfinite().logical_not(), std::numeric_limits<double>::quiet_NaN());
  const at::Tensor steps = grouped * scales.reciprocal().unsqueeze(-1);
  const at::Tensor values = at::nan_to_num(steps, 0, 0, 0).round().to(at::kChar).flatten(-2).narrow(-1, 0, width);
  return {values, scales};
}

at::Tensor detail::dequantise(const at::Tensor& values, const at::Tensor& scales, std::int64_t group) {
  const std::int64_t width = values.size(-1);
  return values.to(at::kFloat) * scales.repeat_interleave(group, -1).narrow(-1, 0, width);
}

StoredStates StoredStates::empty(at::IntArrayRef sizes, std::int64_t token_dim, const at::TensorOptions& options,
                                 BankFormat format, std::int64_t group) {
  check_token_dim(sizes, token_dim, group);
  const at::ScalarType computed = c10::typeMetaToScalarType(options.dtype());
  if (!at::isFloatingType(computed)) {
    refuse_input(fmt::format("states are of type {}; floating point is expected", c10::toString(computed)));
  }
  StoredStates stored;
  stored.format_ = format;
  stored.computed_ = computed;
  stored.token_dim_ = token_dim;
  stored.group_ = group;
  const at::TensorOptions plain = at::TensorOptions().device(options.device());
  stored.values_ = at::empty(sizes, plain.dtype(stored_type(format, computed)));
  if (format == BankFormat::kInt8) {
    std::vector<std::int64_t> scale_sizes = sizes.vec();
    scale_sizes.back() = groups_of(sizes.back(), group);
    stored.scales_ = at::empty(scale_sizes, plain.dtype(at::kFloat));
  }
  return stored;
}

StoredStates StoredStates::encode(const at::Tensor& states, std::int64_t token_dim, BankFormat format,
                                  std::int64_t group) {
  StoredStates stored = empty(states.sizes(), token_dim, states.options(), format, group);
  stored.write(0, states);
  return stored;
}

std::optional<StoredStates> StoredStates::of(at::IntArrayRef sizes, std::int64_t token_dim,
                                             const at::TensorOptions& options, BankFormat format, at::Tensor values,
                                             at::Tensor scales, std::int64_t group) {
  StoredStates stored = empty(sizes, token_dim, options.device(at::kMeta), format, group);
  const auto fits = [](const at::Tensor& form, const at::Tensor& given) {
    return form.defined() == given.defined() &&
           (!form.defined() || (form.sizes() == given.sizes() && form.scalar_type() == given.scalar_type()));
  };
  if (!fits(stored.values_, values) || !fits(stored.scales_, scales)) return std::nullopt;
  stored.values_ = std::move(values);
  stored.scales_ = std::move(scales);
  return stored;
}

bool StoredStates::lossless(at::ScalarType computed, BankFormat format) noexcept {
  return stored_type(format, computed) == computed;
}

std::size_t StoredStates::bytes_for(at::IntArrayRef sizes, const at::TensorOptions& options, BankFormat format,
                                    std::int64_t group) {
  const auto values = static_cast<std::size_t>(c10::multiply_integers(sizes));
  const at::ScalarType type = stored_type(format, c10::typeMetaToScalarType(options.dtype()));
  std::size_t bytes = taken_bytes(values * c10::elementSize(type), options.device());
  if (format == BankFormat::kInt8 && values > 0) {
    const std::size_t rows = values / static_cast<std::size_t>(sizes.back());
    bytes +=
        taken_bytes(rows * static_cast<std::size_t>(groups_of(sizes.back(), group)) * sizeof(float), options.device());
  }
  return bytes;
}

void StoredStates::check_range(std::int64_t begin, const at::Tensor& other) const {
  bool fits = values_.defined() && other.dim() == values_.dim() && begin >= 0;
  for (std::int64_t i = 0; fits && i < values_.dim(); ++i) {
    fits = i == token_dim_ ? other.size(i) <= values_.size(i) - begin : other.size(i) == values_.size(i);
  }
  if (!fits) {
    refuse_input(
        fmt::format("a tensor of sizes [{}] from token {} on does not fit stored states of sizes [{}], tokens in "
                    "dimension {}",
                    fmt::join(other.sizes(), ", "), begin,
                    fmt::join(values_.defined() ? values_.sizes() : at::IntArrayRef(), ", "), token_dim_));
  }
  if (!other.is_floating_point() || other.device() != values_.device()) {
    refuse_input(
        fmt::format("a tensor of type {} on {} meets stored states on {}; floating point on the same device is "
                    "expected",
                    c10::toString(other.scalar_type()), other.device().str(), values_.device().str()));
  }
}

void StoredStates::write(std::int64_t begin, const at::Tensor& states) {
  check_range(begin, states);
  if (states.numel() == 0) return;
  const std::int64_t count = states.size(token_dim_);
  const at::Tensor values = values_.narrow(token_dim_, begin, count);
  if (format_ != BankFormat::kInt8) {
    values.copy_(states.detach());
    return;
  }
  const at::Tensor scales = scales_.narrow(token_dim_, begin, count);
  if (!states.is_cpu()) {
    const auto [fresh, fresh_scales] = detail::quantise(states, group_);
    values.copy_(fresh);
    scales.copy_(fresh_scales);
    return;
  }
  at::Tensor source = states.detach().to(at::kFloat);
  if (source.stride(-1) != 1) source = source.contiguous();
  const std::int64_t width = states.size(-1);
  // Rows join only where no group would reach over their ends.
  const bool whole = width % group_ == 0;
  for_rows(states.sizes(), {width, whole ? width : -1, groups_of(width, group_), 0}, strided_rows<const float>(source),
           strided_rows<std::int8_t>(values), strided_rows<float>(scales), StridedRows<float>(),
           [&](std::int64_t size, const float* row, std::int8_t* to, float* to_scales, const float*) {
             detail::quantise_row(row, to, to_scales, size, group_);
           });
}

at::Tensor StoredStates::plain(std::int64_t begin, std::int64_t count) const {
  const at::Tensor values = values_.narrow(token_dim_, begin, count);
  if (format_ != BankFormat::kInt8) return values;
  return detail::dequantise(values, scales_.narrow(token_dim_, begin, count), group_);
}

bool StoredStates::copy_by_rows(const at::Tensor& target, std::int64_t begin, const at::Tensor& shift) const {
  if (!target.is_cpu() || target.scalar_type() != at::kFloat) return false;
  const std::int64_t count = target.size(token_dim_);
  const std::int64_t width = target.size(-1);
  const at::Tensor values = values_.narrow(token_dim_, begin, count);
  const StridedRows<float> to = strided_rows<float>(target);
  const StridedRows<const float> by = strided_rows<const float>(shift);
  switch (values.scalar_type()) {
    case at::kChar: {
      const at::Tensor scales = scales_.narrow(token_dim_, begin, count);
      const bool whole = width % group_ == 0;
      for_rows(target.sizes(), {width, whole ? width : -1, groups_of(width, group_), width}, to,
               strided_rows<const std::int8_t>(values), strided_rows<const float>(scales), by,
               [&](std::int64_t size, float* row, const std::int8_t* from, const float* steps, const float* add) {
                 detail::dequantise_row(from, steps, add, row, size, group_);
               });
      return true;
    }
    case at::kBFloat16: {
      for_rows(target.sizes(), {width, width, width, 0}, to, strided_rows<const at::BFloat16>(values), by,
               StridedRows<float>(),
               [](std::int64_t size, float* row, const at::BFloat16* from, const float* add, const float*) {
                 detail::widen_row(reinterpret_cast<const std::uint16_t*>(from), add, row, size);
               });
      return true;
    }
    case at::kFloat: {
      if (by.data == nullptr) return false;  // ATen's copy is as fast
      for_rows(target.sizes(), {width, width, width, 0}, to, strided_rows<const float>(values), by,
               StridedRows<float>(),
               [](std::int64_t size, float* row, const float* from, const float* add, const float*) {
                 detail::add_row(from, add, row, size);
               });
      return true;
    }
    default:
      return false;
  }
}

void StoredStates::copy_to(const at::Tensor& target, std::int64_t begin, const at::Tensor& shift) const {
  check_range(begin, target);
  if (target.numel() == 0) return;
  if (target.size(-1) > 1 && target.stride(-1) != 1) {
    refuse_input(fmt::format("the last dimension of the target has stride {}; 1 is expected", target.stride(-1)));
  }
  at::Tensor added;
  if (shift.defined()) {
    std::vector<std::int64_t> sizes = target.sizes().vec();
    sizes[static_cast<std::size_t>(token_dim_)] = 1;
    if (shift.scalar_type() != at::kFloat || shift.device() != target.device() ||
        !at::is_expandable_to(shift.sizes(), sizes)) {
      refuse_input(
          fmt::format("the shift has sizes [{}], type {}, device {}; float32 on the target's device that broadcasts "
                      "to [{}] is expected",
                      fmt::join(shift.sizes(), ", "), c10::toString(shift.scalar_type()), shift.device().str(),
                      fmt::join(sizes, ", ")));
    }
    added = shift.detach().expand(sizes).contiguous().expand(target.sizes());
  }
  const at::Tensor written = target.detach();
  if (copy_by_rows(written, begin, added)) return;
  const at::Tensor states = plain(begin, target.size(token_dim_));
  written.copy_(added.defined() ? states + added : states);
}

at::Tensor StoredStates::decode() const {
  at::Tensor states = at::empty(values_.sizes(), values_.options().dtype(computed_));
  copy_to(states, 0);
  return states;
}

at::Tensor StoredStates::rows(std::int64_t begin, std::int64_t count) const {
  const at::Tensor held = values_.narrow(token_dim_, begin, count);
  if (format_ == BankFormat::kAsComputed) return held;
  at::Tensor states = at::empty(held.sizes(), held.options().dtype(computed_));
  copy_to(states, begin);
  return states;
}

std::size_t StoredStates::bytes() const {
  return (values_.defined() ? taken_bytes(values_) : 0) + (scales_.defined() ? taken_bytes(scales_) : 0);
}

double StoredStates::relative_error(const at::Tensor& original) const {
  const at::Tensor full = original.to(at::kDouble);
  const double error = (decode().to(at::kDouble) - full).norm().item<double>();
  return error == 0 ? 0 : error / full.norm().item<double>();
}

}  // namespace llmcache
