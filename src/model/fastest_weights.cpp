#include "model/fastest_weights.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>

#include "llmcache/error.h"
#include "model/packed_linear.h"

namespace llmcache {
namespace {

constexpr std::array<std::int64_t, 5> kTimedRows{1, 4, 16, 64, 128};
constexpr std::size_t kFew = 3;  ///< of kTimedRows
constexpr int kTimedRuns = 5;

using Times = std::array<double, kTimedRows.size()>;  ///< milliseconds of one product for each layer, by number of rows
using Multiply = std::function<at::Tensor(const at::Tensor& rows)>;

struct Timed {
  Weights weights = Weights::kAsLoaded;
  Times ms{};
};

/// The shortest of some runs, as others only have to do with what else the CPU did.
double shortest_ms(const Multiply& product, const at::Tensor& rows) {
  (void)product(rows);
  double shortest = 1e9;
  for (int i = 0; i < kTimedRuns; ++i) {
    const auto start = std::chrono::steady_clock::now();
    (void)product(rows);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    shortest = std::min(shortest, taken.count());
  }
  return shortest;
}

Multiply multiply_by(Weights weights, const LayerShape& shape) {
  if (weights == Weights::kAsLoaded) {
    return [weight = shape.weight](const at::Tensor& rows) { return at::linear(rows, weight); };
  }
  const auto packed = PackedLinear::pack(weights, shape.weight, "a layer", shape.recipe);
  return [packed](const at::Tensor& rows) { return packed->apply(rows, std::nullopt); };
}

/// None if the format is not available.
std::optional<Timed> time_of(Weights weights, const std::vector<LayerShape>& shapes) {
  Timed timed{weights, {}};
  try {
    for (const LayerShape& shape : shapes) {
      const auto product = multiply_by(weights, shape);
      for (std::size_t i = 0; i < kTimedRows.size(); ++i) {
        const auto rows = at::ones({kTimedRows[i], shape.weight.size(1)}, shape.weight.options());
        timed.ms[i] += static_cast<double>(shape.layers) * shortest_ms(product, rows);
      }
    }
  } catch (const Error&) {
    return std::nullopt;
  }
  return timed;
}

/// The mean of how many times as long as `base` it takes with the rows from `begin` to `end` of kTimedRows.
double ratio(const Times& ms, const Times& base, std::size_t begin, std::size_t end) {
  double sum = 0;
  for (std::size_t i = begin; i < end; ++i) sum += std::log(ms[i] / base[i]);
  return std::exp(sum / static_cast<double>(end - begin));
}

std::string verdict_on(const Timed& timed, const Times& as_loaded, bool may_be_int8) {
  const char* left_out = may_be_int8 ? "" : "; packed-int8 may not be chosen (Options.fastest_may_be_int8)";
  if (timed.weights == Weights::kAsLoaded) {
    return fmt::format("no packed format is available, or faster for the shapes of the model's layers{}", left_out);
  }
  return fmt::format(
      "products of the model's layers take {:.2f} of the time as loaded with 1 to 16 rows, {:.2f} with "
      "64 and 128{}",
      ratio(timed.ms, as_loaded, 0, kFew), ratio(timed.ms, as_loaded, kFew, kTimedRows.size()), left_out);
}

}  // namespace

std::vector<RankedFormat> rank_formats(const std::vector<LayerShape>& shapes, bool may_be_int8) {
  std::vector<Timed> all;
  const bool on_cpu =
      std::all_of(shapes.begin(), shapes.end(), [](const LayerShape& shape) { return shape.weight.device().is_cpu(); });
  if (!on_cpu || shapes.empty()) {
    return {{Weights::kAsLoaded, "there are no linear layers on a CPU, for which formats differ"}};
  }
  for (const auto weights : {Weights::kAsLoaded, Weights::kPackedFp32, Weights::kPackedFp16, Weights::kPackedBFloat16,
                             Weights::kPackedInt8}) {
    if (weights == Weights::kPackedInt8 && !may_be_int8) continue;
    if (const auto timed = time_of(weights, shapes)) all.push_back(*timed);
  }
  const Times as_loaded = all.front().ms;
  const auto total = [&](const Timed& timed) {
    return ratio(timed.ms, as_loaded, 0, kFew) * ratio(timed.ms, as_loaded, kFew, kTimedRows.size());
  };
  std::stable_sort(all.begin(), all.end(), [&](const Timed& a, const Timed& b) { return total(a) < total(b); });
  std::vector<RankedFormat> ranked;
  for (const Timed& timed : all) ranked.push_back({timed.weights, verdict_on(timed, as_loaded, may_be_int8)});
  return ranked;
}

}  // namespace llmcache
