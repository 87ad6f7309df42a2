// Which formats of weights there are to test on this CPU, and how far they may be off.
#pragma once

#include <iostream>
#include <vector>

#include "model/packed_linear.h"
#include "support.h"

namespace llmcache::test {

/// Can this CPU multiply with the format? Not every one has products of bfloat16, or of 8 bits that do not overflow.
inline bool has(Weights weights) {
  try {
    PackedLinear::pack(weights, at::ones({8, 8}), "w");
    return true;
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotAvailable) throw;
    std::cerr << "not tested: " << error.what() << '\n';
    return false;
  }
}

/// The formats that finish products: those of them that this CPU has.
inline std::vector<Weights> finishing() {
  std::vector<Weights> formats{Weights::kPackedBFloat16, Weights::kPackedInt8};
  std::erase_if(formats, [](Weights weights) { return !has(weights); });
  return formats;
}

/// All packed formats: of those, too.
inline std::vector<Weights> packings() {
  auto formats = finishing();
  formats.insert(formats.begin(), {Weights::kPackedFp32, Weights::kPackedFp16});
  return formats;
}

/// How far a whole model may be off its plain module. Half precision has 11 bits and rounds weights alone; bfloat16 has
/// 8 and rounds what is multiplied too, as in a module of that type (tolerance_of(ModelInfo)); 8-bit integers are
/// rounded to 1/254 of the largest of a row or channel, which is some times the typical value. Of tiny models with
/// random weights the worst was .095 and .21 in these two; a bias, an activation or a layer too few moves results by
/// their scale.
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
