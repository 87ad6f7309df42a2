// The weight of a linear layer, packed for the CPU's matrix product.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "llmcache/options.h"
#include "model/int8_recipe.h"
#include "model/row_kernels.h"

namespace llmcache {

/// A packed weight. Const and thread-safe. While it lives it can be found by its number, which is what a graph holds.
class PackedLinear {
 public:
  PackedLinear(const PackedLinear&) = delete;
  PackedLinear& operator=(const PackedLinear&) = delete;
  virtual ~PackedLinear();

  /// Packs `weight`, `[out, in]` of any strides. `name` stands in errors. Throws Error(kNotAvailable): not on a CPU,
  /// not of a type that `kind` takes, a value that the format cannot hold, a LibTorch without the engine. `recipe`: for
  /// kPackedInt8; null: none.
  static std::shared_ptr<const PackedLinear> pack(Weights kind, const at::Tensor& weight, const std::string& name,
                                                  const Int8Recipe* recipe = nullptr);

  /// The one of this number. Throws Error(kModelFailed) if it is gone.
  static const PackedLinear& find(std::int64_t number);
  [[nodiscard]] std::int64_t number() const noexcept { return number_; }

  /// True if apply() of this kind takes more than a bias, at no other pass over its result.
  static bool finishes(Weights kind) noexcept {
    return kind == Weights::kPackedFp16 || kind == Weights::kPackedBFloat16 || kind == Weights::kPackedInt8;
  }

  /// at::linear(x, weight, bias) for `x`, `[..., in]`, of any strides and of the weight's type. What a row becomes
  /// depends on the number of rows in its rounding only; with kPackedInt8 it does not at all.
  [[nodiscard]] at::Tensor apply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const;

  /// The same with an activation behind it, and then `residual` added, which has as many elements as the result and its
  /// type. For kinds that finishes() names.
  [[nodiscard]] at::Tensor apply(const at::Tensor& x, const std::optional<at::Tensor>& bias, Activation activation,
                                 const std::optional<at::Tensor>& residual) const;

  [[nodiscard]] std::int64_t inputs() const noexcept { return in_; }
  [[nodiscard]] std::int64_t outputs() const noexcept { return out_; }
  /// What the packed weight takes, with all that the engine adds.
  [[nodiscard]] virtual std::size_t bytes() const = 0;

 protected:
  explicit PackedLinear(const at::Tensor& weight);
  /// The same for a contiguous `[rows, in]` of at least one row, of the weight's type, float32 for half precision, and
  /// as that type. `finish` has no scales of rows, and more than a bias for kinds that finishes() names only.
  [[nodiscard]] virtual at::Tensor multiply(const at::Tensor& rows, const Finish& finish) const = 0;

 private:
  std::int64_t in_;
  std::int64_t out_;
  std::int64_t number_;
  at::ScalarType type_;
};

}  // namespace llmcache
