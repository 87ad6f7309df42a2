#include "model/packed_table.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "llmcache/error.h"
#include "model/numbered.h"

namespace llmcache {
namespace {

/// Values of a row with a scale of their own: some rows have a few that are very large. What is narrower, such as the
/// biases of attention, takes next to nothing and stays as it is.
constexpr std::int64_t kScaledTogether = 64;

at::ScalarType type_in(Weights kind) {
  if (kind == Weights::kPackedInt8) return at::kChar;
  return kind == Weights::kPackedFp16 ? at::kHalf : at::kBFloat16;
}

bool is_worth_packing(Weights kind, const at::Tensor& table) {
  return PackedLinear::finishes(kind) && table.size(1) >= kScaledTogether &&
         c10::elementSize(type_in(kind)) < c10::elementSize(table.scalar_type());
}

struct QuantisedGroups {
  at::Tensor values;
  at::Tensor scales;
};

QuantisedGroups quantise_groups(const at::Tensor& rows) {
  constexpr double kSteps = 127;
  constexpr double kSmallestScaled = 1e-30;  // a group of zeros has a scale too
  const auto groups = (rows.size(1) + kScaledTogether - 1) / kScaledTogether;
  const auto wide = at::constant_pad_nd(rows.to(at::kFloat), {0, groups * kScaledTogether - rows.size(1)})
                        .view({rows.size(0), groups, kScaledTogether});
  auto scales = wide.abs().amax(2, /*keepdim=*/true).clamp_min_(kSmallestScaled).div_(kSteps);
  return {(wide / scales).round_(), std::move(scales)};
}

}  // namespace

PackedTable::PackedTable(const at::Tensor& table)
    : count_(table.size(0)),
      width_(table.size(1)),
      number_(Numbered<PackedTable>::all().add(this)),
      type_(table.scalar_type()) {}

PackedTable::~PackedTable() { Numbered<PackedTable>::all().remove(number_); }

const PackedTable& PackedTable::find(std::int64_t number) {
  const PackedTable* found = Numbered<PackedTable>::all().find(number);
  if (found == nullptr) {
    throw Error(ErrorCode::kModelFailed, fmt::format("there is no packed table of the number {}", number));
  }
  return *found;
}

std::shared_ptr<const PackedTable> PackedTable::pack(Weights kind, const at::Tensor& table,
                                                     std::shared_ptr<const PackedLinear> tied) {
  TORCH_INTERNAL_ASSERT(table.dim() == 2);
  const bool strided = table.device().is_cpu() && table.layout() == at::kStrided;
  if (!strided || table.numel() == 0 || !c10::isFloatingType(table.scalar_type())) return nullptr;
  const std::shared_ptr<PackedTable> made(new PackedTable(table));
  if (tied != nullptr && tied->has_rows()) {
    made->tied_ = std::move(tied);
    return made;
  }
  return is_worth_packing(kind, table) && made->fill(kind, table) ? made : nullptr;
}

/// Some rows after the other: what is not packed yet is not copied as a whole. False: it holds a value that the format
/// cannot hold.
bool PackedTable::fill(Weights kind, const at::Tensor& table) {
  constexpr std::int64_t kRowsAtOnce = 512;
  const bool int8 = kind == Weights::kPackedInt8;
  for (std::int64_t first = 0; first < count_; first += kRowsAtOnce) {
    const auto rows = table.narrow(0, first, std::min(kRowsAtOnce, count_ - first));
    const auto part = int8 ? quantise_groups(rows) : QuantisedGroups{rows.to(type_in(kind)), {}};
    const bool held =
        int8 ? part.scales.isfinite().all().item<bool>() : at::equal(part.values.isfinite(), rows.isfinite());
    if (!held) return false;
    const auto put = [&](at::Tensor& all, const at::Tensor& made, at::ScalarType type) {
      if (!made.defined()) return;
      auto sizes = made.sizes().vec();
      sizes[0] = count_;
      if (!all.defined()) all = at::empty(sizes, made.options().dtype(type));
      all.narrow(0, first, made.size(0)).copy_(made);
    };
    put(values_, part.values, type_in(kind));
    put(scales_, part.scales, at::kFloat);
  }
  return true;
}

at::Tensor PackedTable::rows(const at::Tensor& ids) const {
  if (tied_ != nullptr) return tied_->rows(ids);
  auto values = values_.index_select(0, ids);
  if (!scales_.defined()) return values;
  return values.to(at::kFloat).mul_(scales_.index_select(0, ids)).flatten(1).narrow(1, 0, width_);
}

at::Tensor PackedTable::look_up(const at::Tensor& ids) const {
  TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
              "an embedding is asked for whole numbers of 64 or 32 bits, got ", ids.toString());
  auto shape = ids.sizes().vec();
  shape.push_back(width_);
  if (ids.numel() == 0) return at::empty(shape, at::TensorOptions().dtype(type_));
  const auto flat = ids.reshape(-1).to(at::kLong);
  const auto [least, most] = at::aminmax(flat);
  TORCH_CHECK_INDEX(least.item<std::int64_t>() >= 0 && most.item<std::int64_t>() < count_,
                    "index out of range: an embedding of ", count_, " rows is asked for ", least.item<std::int64_t>(),
                    " to ", most.item<std::int64_t>());
  return rows(flat).to(type_).reshape(shape);
}

std::size_t PackedTable::bytes() const {
  return (values_.defined() ? values_.nbytes() : 0) + (scales_.defined() ? scales_.nbytes() : 0);
}

}  // namespace llmcache
