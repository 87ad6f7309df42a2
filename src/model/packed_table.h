// The table of an embedding, packed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "llmcache/options.h"
#include "model/packed_linear.h"

namespace llmcache {

/// Rows that are looked up by ids. In 16 bits each value is rounded to the format; in 8 bits to 1/127 of the largest of
/// 64 neighbours in its row, so that it is off by at most half of that. Const and thread-safe. While it lives it can be
/// found by its number, which is what a graph holds.
class PackedTable {
 public:
  PackedTable(const PackedTable&) = delete;
  PackedTable& operator=(const PackedTable&) = delete;
  ~PackedTable();

  /// Packs `table`, `[rows, width]`. `tied`: the packed weight of a layer that is the same tensor, which then is what
  /// is looked up in where it can be (PackedLinear::has_rows()); null: there is none. Null where the table is to be
  /// held as it is: not on a CPU, no shorter in this format, narrower than 64, or with a value that the format cannot
  /// hold.
  static std::shared_ptr<const PackedTable> pack(Weights kind, const at::Tensor& table,
                                                 std::shared_ptr<const PackedLinear> tied);

  /// The one of this number. Throws Error(kModelFailed) if it is gone.
  static const PackedTable& find(std::int64_t number);
  [[nodiscard]] std::int64_t number() const noexcept { return number_; }

  /// at::embedding(table, ids): `ids` of any shape, int64 or int32; of the table's type. Each row is what it is by
  /// itself, bit for bit.
  [[nodiscard]] at::Tensor look_up(const at::Tensor& ids) const;

  /// What it takes beside a tied weight.
  [[nodiscard]] std::size_t bytes() const;

 private:
  explicit PackedTable(const at::Tensor& table);
  bool fill(Weights kind, const at::Tensor& table);
  [[nodiscard]] at::Tensor rows(const at::Tensor& ids) const;

  std::int64_t count_;
  std::int64_t width_;
  std::int64_t number_;
  at::ScalarType type_;
  std::shared_ptr<const PackedLinear> tied_;
  at::Tensor values_;  ///< in 8 bits `[rows, groups, 64]`, filled up with zeros
  at::Tensor scales_;  ///< float32 `[rows, groups, 1]`; undefined: values are what they are
};

}  // namespace llmcache
