#include "model/packed_linear.h"

#include <ATen/ATen.h>
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
#include <unordered_map>
#include <vector>

#include "execute/clock.h"
#include "llmcache/error.h"
#include "model/weight_panels.h"

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

std::size_t bytes_of(const at::Tensor& packed, Weights kind) {
  return static_cast<std::size_t>(engine<std::int64_t(const at::Tensor&)>("mkldnn::_nbytes", kind).call(packed));
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

/// The number of rows that oneDNN is given for `rows`. It makes a kernel for each number at its first use, which takes
/// about a millisecond, several times as long as a small product: with texts of all lengths, most products would wait
/// for one.
std::int64_t rows_to_run(std::int64_t rows) {
  constexpr std::int64_t kOwnKernel = 16;  // as in decoding
  const std::int64_t step = rows <= 1024 ? 16 : 128;
  return rows <= kOwnKernel ? rows : (rows + step - 1) / step * step;
}

/// `rows` as `type`, with as many further rows of zeros as oneDNN is given.
at::Tensor with_room(const at::Tensor& rows, at::ScalarType type) {
  const auto room = rows_to_run(rows.size(0));
  if (room == rows.size(0)) return rows.to(type);
  auto made = at::empty({room, rows.size(1)}, rows.options().dtype(type));
  made.narrow(0, 0, rows.size(0)).copy_(rows);
  made.narrow(0, rows.size(0), room - rows.size(0)).zero_();
  return made;
}

/// oneDNN's layout of a float32 or bfloat16 matrix, and its products with rows of the same type.
class OneDnnMatrix {
 public:
  OneDnnMatrix(const at::Tensor& weight, Weights kind)
      : linear_(engine<Linear>("mkldnn::_linear_pointwise", kind)),
        packed_(engine<Reorder>("mkldnn::_reorder_linear_weight", kind).call(weight.contiguous(), kRowsPackedFor)),
        bytes_(bytes_of(packed_, kind)),
        type_(weight.scalar_type()) {}

  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  /// `rows` of any type.
  [[nodiscard]] at::Tensor multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias) const {
    return linear_.call(with_room(rows, type_), packed_, bias, "none", no_scalars_, std::nullopt)
        .narrow(0, 0, rows.size(0));
  }

 private:
  using Reorder = at::Tensor(const at::Tensor&, std::optional<std::int64_t>);
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static constexpr std::int64_t kRowsPackedFor = 32;

  c10::TypedOperatorHandle<Linear> linear_;
  c10::List<std::optional<at::Scalar>> no_scalars_;
  at::Tensor packed_;
  std::size_t bytes_;
  at::ScalarType type_;
};

class PackedFp32 final : public PackedLinear {
 public:
  explicit PackedFp32(const at::Tensor& weight) : PackedLinear(weight), matrix_(weight, Weights::kPackedFp32) {}

  std::size_t bytes() const override { return matrix_.bytes(); }

 private:
  at::Tensor multiply(const at::Tensor& rows, const Finish& finish) const override {
    return matrix_.multiply(rows, if_defined(finish.bias));
  }

  OneDnnMatrix matrix_;
};

/// The type of the module stands around the products. These are oneDNN's where it makes them in bfloat16; CPUs that
/// cannot do so read the weights from panels, and what they multiply stays float32.
class PackedBFloat16 final : public PackedLinear {
 public:
  PackedBFloat16(const at::Tensor& weight, const std::string& name) : PackedLinear(weight) {
    const auto matrix = rounded(weight, name);
    if (!pack_by_one_dnn(matrix)) panels_.emplace(matrix);
  }

  std::size_t bytes() const override { return panels_ ? panels_->bytes() : matrix_->bytes(); }

 private:
  static at::Tensor rounded(const at::Tensor& weight, const std::string& name) {
    auto made = weight.to(at::kBFloat16);
    if (weight.scalar_type() == at::kFloat && made.isinf().logical_and_(weight.isfinite()).any().item<bool>()) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("Options.weights is packed-bf16, but '{}' holds a value that rounds to no bfloat16; use "
                              "packed-fp32",
                              name));
    }
    return made;
  }

  /// False on a CPU for which LibTorch refuses products in bfloat16.
  bool pack_by_one_dnn(const at::Tensor& weight) {
    try {
      matrix_.emplace(weight, Weights::kPackedBFloat16);
      (void)matrix_->multiply(at::zeros({1, weight.size(1)}, weight.options()), std::nullopt);
      return true;
    } catch (const c10::Error&) {
      matrix_.reset();
      return false;
    }
  }

  at::Tensor multiply(const at::Tensor& rows, const Finish& finish) const override {
    const auto product = panels_ ? panels_->multiply(rows.to(at::kFloat)) : matrix_->multiply(rows, std::nullopt);
    return finish_rows(product, finish, rows.scalar_type());
  }

  std::optional<OneDnnMatrix> matrix_;
  std::optional<WeightPanels> panels_;
};

using Int8Linear = at::Tensor(at::Tensor, double, std::int64_t, at::Tensor, at::Tensor, at::Tensor,
                              std::optional<at::Tensor>, double, std::int64_t, std::optional<at::ScalarType>,
                              std::string_view, c10::List<std::optional<at::Scalar>>, std::string_view);

/// Products of rows and weights of 8 bits.
class Int8Engine {
 public:
  /// Of the CPU at hand, for as long as the process runs. Those with AMX multiply signed rows. For others oneDNN has a
  /// reference kernel only, which takes thousands of times as long, and a fast one for unsigned rows. Sums are the
  /// same.
  static const Int8Engine& get() {
    static const Int8Engine kEngine;
    return kEngine;
  }

  [[nodiscard]] RowBytes row_bytes() const { return row_bytes_; }

  static at::Tensor pack(const at::Tensor& values) {
    torch::jit::Stack arguments{values, c10::IValue()};
    engine<at::Tensor(at::Tensor, std::optional<c10::List<std::int64_t>>)>("onednn::qlinear_prepack",
                                                                           Weights::kPackedInt8)
        .callBoxed(&arguments);
    return arguments.at(0).toTensor();
  }

  /// `rows` of row_bytes().
  [[nodiscard]] at::Tensor multiply(const at::Tensor& rows, const at::Tensor& packed, const at::Tensor& scales,
                                    const at::Tensor& zeros) const {
    constexpr std::int64_t kShift = 128;
    return linear_.call(rows, 1.0, rows.scalar_type() == at::kByte ? kShift : 0, packed, scales, zeros, std::nullopt,
                        1.0, 0, at::kFloat, "none", no_scalars_, "");
  }

 private:
  Int8Engine() : linear_(engine<Int8Linear>("onednn::qlinear_pointwise", Weights::kPackedInt8)) {
    constexpr std::int64_t kSize = 128;
    constexpr double kMuchFaster = 8;
    const auto packed = pack(at::ones({kSize, kSize}, at::kChar));
    const auto time_of = [&](const at::Tensor& rows) {
      double best = std::numeric_limits<double>::infinity();
      for (int turn = 0; turn < 3; ++turn) {
        Stopwatch watch;
        (void)multiply(rows, packed, at::ones({kSize}), at::zeros({kSize}, at::kLong));
        best = std::min(best, watch.lap());
      }
      return best;
    };
    const auto rows = at::ones({4, kSize}, at::kChar);
    const bool shifted = time_of(rows.to(at::kByte)) * kMuchFaster < time_of(rows);
    row_bytes_ = shifted ? RowBytes::kShifted : RowBytes::kSigned;
  }

  c10::TypedOperatorHandle<Int8Linear> linear_;
  c10::List<std::optional<at::Scalar>> no_scalars_;
  RowBytes row_bytes_ = RowBytes::kSigned;
};

/// 8 bits with a scale for each output channel, times rows of 8 bits with a scale for each. Sums are whole numbers, so
/// that they are the same in any order. Where oneDNN's overflow, the weights are read from panels. With a recipe some
/// inputs are multiplied in float32 beside that.
class PackedInt8 final : public PackedLinear {
 public:
  PackedInt8(const at::Tensor& weight, const std::string& name, const Int8Recipe* recipe) : PackedLinear(weight) {
    auto wide = weight.to(at::kFloat);
    if (!wide.isfinite().all().item<bool>()) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("Options.weights is packed-int8, but '{}' holds a value that is not finite; use "
                              "packed-fp32",
                              name));
    }
    if (recipe != nullptr) wide = take(*recipe, wide);
    scales_ = wide.abs().amax(1).clamp_min_(kSmallestScaled).div_(kSteps);
    const auto values = wide.div(scales_.unsqueeze(1)).round_().to(at::kChar).contiguous();
    wide.reset();
    bytes_ = scales_.nbytes() + (pack_by_one_dnn(values) ? bytes_of(packed_, Weights::kPackedInt8) + zeros_.nbytes()
                                                         : pack_panels(values, name));
    for (const at::Tensor* own : {&factors_, &outliers_, &outlier_weights_})
      bytes_ += own->defined() ? own->nbytes() : 0;
  }

  std::size_t bytes() const override { return bytes_; }

 private:
  static constexpr double kSteps = 127;
  static constexpr double kSmallestScaled = 1e-30;  // a channel of zeros has a scale too

  /// The weight that is left to be rounded.
  at::Tensor take(const Int8Recipe& recipe, const at::Tensor& weight) {
    factors_ = recipe.smoothing.reciprocal();
    auto smoothed = weight * recipe.smoothing;
    if (recipe.outliers.numel() > 0) {
      outliers_ = recipe.outliers;
      outlier_weights_ = weight.index_select(1, outliers_).t().contiguous();
      factors_.index_fill_(0, outliers_, 0);
      smoothed.index_fill_(1, outliers_, 0);
    }
    return smoothed;
  }

  at::Tensor product_of(const at::Tensor& rows) const {
    return Int8Engine::get().multiply(rows, packed_, scales_, zeros_);
  }

  /// False where sums are wrong: CPUs without products of 8 bits that add to 32 add pairs of them in 16 bits, which
  /// overflow. Rows with the largest sums tell.
  bool pack_by_one_dnn(const at::Tensor& values) {
    zeros_ = at::zeros({outputs()}, at::kLong);
    packed_ = Int8Engine::pack(values);
    const auto rows = at::stack({values[0].sign(), values[0].sign().neg(), at::ones_like(values[0])}).mul_(127);
    const auto want = at::linear(rows.to(at::kFloat), values.to(at::kFloat)).mul_(scales_);
    const bool shifted = Int8Engine::get().row_bytes() == RowBytes::kShifted;
    const auto given = shifted ? rows.to(at::kShort).add_(128).to(at::kByte) : rows;
    const double off = (product_of(given) - want).abs().max().item<double>();
    return off <= 1e-4 * want.abs().max().item<double>();
  }

  std::size_t pack_panels(const at::Tensor& values, const std::string& name) {
    packed_.reset();
    zeros_.reset();
    if (inputs() > WeightPanels::kMostInt8Inputs) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("Options.weights is packed-int8, but sums of the {} inputs of '{}' overflow 32 bits; use "
                              "another format",
                              inputs(), name));
    }
    panels_.emplace(values);
    return panels_->bytes();
  }

  at::Tensor multiply(const at::Tensor& rows, const Finish& finish) const override {
    const auto count = rows.size(0);
    const auto room = panels_ ? count : rows_to_run(count);
    const auto bytes = panels_ ? RowBytes::kSigned : Int8Engine::get().row_bytes();
    const QuantisedRows quantised = quantise_rows(rows, room, bytes, factors_);
    Finish scaled = finish;
    scaled.row_scales = quantised.scales;
    const auto product =
        panels_ ? panels_->multiply(quantised.values, scales_) : product_of(quantised.values).narrow(0, 0, count);
    if (outliers_.defined()) add_columns(product, rows, quantised.scales, outliers_, outlier_weights_);
    return finish_rows(product, scaled, rows.scalar_type());
  }

  at::Tensor scales_;
  at::Tensor zeros_;   ///< oneDNN's only
  at::Tensor packed_;  ///< likewise
  std::optional<WeightPanels> panels_;
  at::Tensor factors_;          ///< of the inputs, 0 for outliers; undefined: no recipe
  at::Tensor outliers_;         ///< undefined: none
  at::Tensor outlier_weights_;  ///< [outliers, out]
  std::size_t bytes_ = 0;
};

/// Half precision, read from panels where the CPU has nothing wider than what these use; elsewhere in FBGEMM's layout.
/// Sums are float32.
class PackedFp16 final : public PackedLinear {
 public:
  PackedFp16(const at::Tensor& weight, const std::string& name) : PackedLinear(weight) {
    check_range(weight, name);
    if (weight.scalar_type() == at::kHalf || WeightPanels::suit_the_cpu()) {
      panels_.emplace(weight.to(at::kHalf));
      return;
    }
    using Pack = c10::intrusive_ptr<LinearPackedParamsBase>(at::Tensor, std::optional<at::Tensor>);
    const auto pack = engine<Pack>("quantized::linear_prepack_fp16", Weights::kPackedFp16);
    // Boxed: GCC 12 falsely warns of the empty optional, if it looks for races.
    torch::jit::Stack arguments{weight.contiguous(), c10::IValue()};
    pack.callBoxed(&arguments);
    packed_ = arguments.at(0).toCustomClass<LinearPackedParamsBase>();
  }

  std::size_t bytes() const override {
    if (panels_) return panels_->bytes();
    // FBGEMM fills up blocks of 512 rows and 32 columns (16 without AVX-512).
    const auto filled = [](std::int64_t size, std::int64_t block) { return (size + block - 1) / block * block; };
    return static_cast<std::size_t>(filled(inputs(), 512) * filled(outputs(), 32)) * sizeof(at::Half);
  }

 private:
  static void check_range(const at::Tensor& weight, const std::string& name) {
    const auto [least, most] = at::aminmax(weight);  // NaN if there is one
    const double largest = at::maximum(most, least.neg()).item<double>();
    if (largest <= kLargestHalf) return;
    const auto found = std::isfinite(largest) ? fmt::format("{}", largest) : "a value that is not finite";
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("Options.weights is packed-fp16, but '{}' holds {}, and half precision ends at {}; use "
                            "packed-fp32",
                            name, found, kLargestHalf));
  }

  at::Tensor multiply(const at::Tensor& rows, const Finish& finish) const override {
    return finish_rows(panels_ ? panels_->multiply(rows) : packed_->apply_dynamic(rows), finish, at::kFloat);
  }

  c10::intrusive_ptr<LinearPackedParamsBase> packed_;
  std::optional<WeightPanels> panels_;
};

/// Which types of modules a format takes.
std::vector<at::ScalarType> types_of(Weights kind) {
  switch (kind) {
    case Weights::kPackedFp32:
      return {at::kFloat};
    case Weights::kPackedFp16:
      return {at::kFloat, at::kHalf};
    default:
      return {at::kFloat, at::kBFloat16, at::kHalf};
  }
}

std::string names_of(const std::vector<at::ScalarType>& types) {
  std::string names;
  for (const auto type : types) {
    if (!names.empty()) names += type == types.back() ? " or " : ", ";
    names += type == at::kFloat ? "float32" : (type == at::kHalf ? "float16" : "bfloat16");
  }
  return names;
}

}  // namespace

PackedLinear::PackedLinear(const at::Tensor& weight)
    : in_(weight.size(1)), out_(weight.size(0)), number_(registry().add(this)), type_(weight.scalar_type()) {}

PackedLinear::~PackedLinear() { registry().remove(number_); }

const PackedLinear& PackedLinear::find(std::int64_t number) {
  const PackedLinear* found = registry().find(number);
  if (found == nullptr) {
    throw Error(ErrorCode::kModelFailed, fmt::format("there is no packed weight of the number {}", number));
  }
  return *found;
}

std::shared_ptr<const PackedLinear> PackedLinear::pack(Weights kind, const at::Tensor& weight, const std::string& name,
                                                       const Int8Recipe* recipe) {
  const auto types = types_of(kind);
  const bool takes = std::find(types.begin(), types.end(), weight.scalar_type()) != types.end();
  if (!weight.device().is_cpu() || weight.layout() != at::kStrided || !takes) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("Options.weights is {}, which takes {} weights on a CPU, but '{}' is {} on {}; use "
                            "as-loaded, or convert the module",
                            to_string(kind), names_of(types), name, c10::toString(weight.scalar_type()),
                            weight.device().str()));
  }
  TORCH_INTERNAL_ASSERT(weight.dim() == 2 && weight.numel() > 0);
  if (kind == Weights::kPackedFp32) return std::make_shared<const PackedFp32>(weight);
  if (kind == Weights::kPackedFp16) return std::make_shared<const PackedFp16>(weight, name);
  if (kind == Weights::kPackedBFloat16) return std::make_shared<const PackedBFloat16>(weight, name);
  TORCH_INTERNAL_ASSERT(kind == Weights::kPackedInt8, to_string(kind), " is no packed format");
  return std::make_shared<const PackedInt8>(weight, name, recipe);
}

at::Tensor PackedLinear::apply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  return apply(x, bias, Activation::kNone, std::nullopt);
}

at::Tensor PackedLinear::apply(const at::Tensor& x, const std::optional<at::Tensor>& bias, Activation activation,
                               const std::optional<at::Tensor>& residual) const {
  TORCH_CHECK(x.scalar_type() == type_ && x.device().is_cpu() && x.dim() > 0 && x.size(-1) == in_,
              "a packed linear layer expects ", c10::toString(type_), " [..., ", in_, "] on the CPU, got ",
              x.toString(), " ", x.sizes());
  auto shape = x.sizes().vec();
  shape.back() = out_;
  TORCH_CHECK(!residual || (residual->scalar_type() == type_ && residual->numel() == c10::multiply_integers(shape)),
              "what a packed linear layer adds to its result must have its type and size, got ", residual->toString());
  if (x.numel() == 0) return at::empty(shape, x.options());
  const auto given = type_ == at::kHalf ? at::kFloat : type_;  // the kernels know no half precision
  const auto as_given = [&](const at::Tensor& tensor) { return tensor.to(given).contiguous(); };
  Finish finish;
  if (bias) finish.bias = as_given(*bias);
  finish.activation = activation;
  if (residual) finish.residual = as_given(*residual);
  return multiply(as_given(x.reshape({-1, in_})), finish).view(shape).to(type_);
}

}  // namespace llmcache
