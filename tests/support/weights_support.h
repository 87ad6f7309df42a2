// Which formats of weights there are to test, and how far they may be off.
#pragma once

#include <algorithm>
#include <vector>

#include "model/packed_linear.h"
#include "support.h"

namespace llmcache::test {

/// The formats that finish products.
inline std::vector<Weights> finishing() {
  return {Weights::kPackedFp16, Weights::kPackedBFloat16, Weights::kPackedInt8};
}

/// The types of modules that a format takes.
inline std::vector<at::ScalarType> types_of(Weights weights) {
  if (weights == Weights::kPackedFp32) return {at::kFloat};
  if (weights == Weights::kPackedFp16) return {at::kFloat, at::kHalf};
  return {at::kFloat, at::kHalf, at::kBFloat16};
}

inline bool takes(Weights weights, at::ScalarType type) {
  const auto types = types_of(weights);
  return std::find(types.begin(), types.end(), type) != types.end();
}

/// All packed formats.
inline std::vector<Weights> packings() {
  return {Weights::kPackedFp32, Weights::kPackedFp16, Weights::kPackedBFloat16, Weights::kPackedInt8};
}

/// How far a whole model may be off its plain module. Half precision has 11 bits and rounds weights alone; bfloat16 has
/// 8 and, on some CPUs, rounds what is multiplied too, as in a module of that type (tolerance_of(ModelInfo)); 8-bit
/// integers are rounded to 1/254 of the largest of a row or channel, which is some times the typical value. Of tiny
/// models with random weights the worst was .095 and .21 in these two; a bias, an activation or a layer too few moves
/// results by their scale.
inline double tolerance_of(Weights weights) {
  switch (weights) {
    case Weights::kPackedFp16:
      return 2e-2;
    case Weights::kPackedBFloat16:
      return 0.15;
    case Weights::kPackedInt8:
      return 0.25;
    default:
      return 1e-4;
  }
}

}  // namespace llmcache::test
