#include "model/packed_linear.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/native/quantized/PackedParams.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <string_view>

#include "llmcache/error.h"

namespace llmcache {
namespace {

constexpr double kLargestHalf = 65504;

/// The packed weights that live, by number.
class Registry {
 public:
  std::int64_t add(const PackedLinear* packed) {
    const std::unique_lock lock(mutex_);
    packed_.emplace(++last_, packed);
    return last_;
  }
  void remove(std::int64_t number) {
    const std::unique_lock lock(mutex_);
    packed_.erase(number);
  }
  const PackedLinear* find(std::int64_t number) {
    const std::shared_lock lock(mutex_);
    const auto found = packed_.find(number);
    return found == packed_.end() ? nullptr : found->second;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<std::int64_t, const PackedLinear*> packed_;
  std::int64_t last_ = 0;
};

Registry& registry() {
  static auto* const made = new Registry;  // outlives every model, static ones included
  return *made;
}

/// An operator of LibTorch, which not every build has.
template <class Signature>
c10::TypedOperatorHandle<Signature> engine(const char* name, Weights kind) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!found) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("Options.weights is {}, but this LibTorch was built without {}; use as-loaded",
                            to_string(kind), name));
  }
  return found->typed<Signature>();
}

/// oneDNN's layout of a float32 matrix.
class PackedFp32 final : public PackedLinear {
 public:
  explicit PackedFp32(const at::Tensor& weight) : PackedLinear(weight) {
    using Reorder = at::Tensor(const at::Tensor&, std::optional<std::int64_t>);
    packed_ = engine<Reorder>("mkldnn::_reorder_linear_weight", Weights::kPackedFp32)
                  .call(weight.contiguous(), kRowsPackedFor);
    bytes_ = static_cast<std::size_t>(
        engine<std::int64_t(const at::Tensor&)>("mkldnn::_nbytes", Weights::kPackedFp32).call(packed_));
  }

  std::size_t bytes() const override { return bytes_; }

 private:
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static constexpr std::int64_t kRowsPackedFor = 32;

  at::Tensor multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias) const override {
    return linear_.call(rows, packed_, bias, "none", no_scalars_, std::nullopt);
  }

  c10::TypedOperatorHandle<Linear> linear_ = engine<Linear>("mkldnn::_linear_pointwise", Weights::kPackedFp32);
  c10::List<std::optional<at::Scalar>> no_scalars_;
  at::Tensor packed_;
  std::size_t bytes_ = 0;
};

/// FBGEMM's layout of a half-precision matrix.
class PackedFp16 final : public PackedLinear {
 public:
  PackedFp16(const at::Tensor& weight, const std::string& name) : PackedLinear(weight) {
    const auto largest = weight.abs().max().item<double>();  // NaN if there is one
    if (!(largest <= kLargestHalf)) {
      const auto found = std::isfinite(largest) ? fmt::format("{}", largest) : "a value that is not finite";
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("Options.weights is packed-fp16, but '{}' holds {}, and half precision ends at {}; use "
                              "packed-fp32",
                              name, found, kLargestHalf));
    }
    using Pack = c10::intrusive_ptr<LinearPackedParamsBase>(at::Tensor, std::optional<at::Tensor>);
    const auto pack = engine<Pack>("quantized::linear_prepack_fp16", Weights::kPackedFp16);
    // Boxed: GCC 12 falsely warns of the empty optional, if it looks for races.
    torch::jit::Stack arguments{weight.contiguous(), c10::IValue()};
    pack.callBoxed(&arguments);
    packed_ = arguments.at(0).toCustomClass<LinearPackedParamsBase>();
  }

  std::size_t bytes() const override {
    // FBGEMM fills up blocks of 512 rows and 32 columns (16 without AVX-512).
    const auto filled = [](std::int64_t size, std::int64_t block) { return (size + block - 1) / block * block; };
    return static_cast<std::size_t>(filled(inputs(), 512) * filled(outputs(), 32)) * sizeof(at::Half);
  }

 private:
  at::Tensor multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias) const override {
    auto result = packed_->apply_dynamic(rows);
    return bias ? result.add_(*bias) : result;
  }

  c10::intrusive_ptr<LinearPackedParamsBase> packed_;
};

}  // namespace

PackedLinear::PackedLinear(const at::Tensor& weight)
    : in_(weight.size(1)), out_(weight.size(0)), number_(registry().add(this)) {}

PackedLinear::~PackedLinear() { registry().remove(number_); }

const PackedLinear& PackedLinear::find(std::int64_t number) {
  const PackedLinear* found = registry().find(number);
  if (found == nullptr) {
    throw Error(ErrorCode::kModelFailed, fmt::format("there is no packed weight of the number {}", number));
  }
  return *found;
}

std::shared_ptr<const PackedLinear> PackedLinear::pack(Weights kind, const at::Tensor& weight,
                                                       const std::string& name) {
  if (!weight.device().is_cpu() || weight.layout() != at::kStrided || weight.scalar_type() != at::kFloat) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("Options.weights is {}, which takes float32 weights on a CPU, but '{}' is {} on {}; use "
                            "as-loaded, or convert the module",
                            to_string(kind), name, c10::toString(weight.scalar_type()), weight.device().str()));
  }
  TORCH_INTERNAL_ASSERT(kind != Weights::kAsLoaded && weight.dim() == 2 && weight.numel() > 0);
  if (kind == Weights::kPackedFp32) return std::make_shared<const PackedFp32>(weight);
  return std::make_shared<const PackedFp16>(weight, name);
}

at::Tensor PackedLinear::apply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.device().is_cpu() && x.dim() > 0 && x.size(-1) == in_,
              "a packed linear layer expects float32 [..., ", in_, "] on the CPU, got ", x.toString(), " ", x.sizes());
  auto shape = x.sizes().vec();
  shape.back() = out_;
  if (x.numel() == 0) return at::empty(shape, x.options());
  return multiply(x.reshape({-1, in_}).contiguous(), bias).view(shape);
}

}  // namespace llmcache
