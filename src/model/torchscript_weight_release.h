// Weights that are let go of while others are packed. Internal to model/torchscript*.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// Where a tensor's storage lies; null if it has none.
const void* memory_of(const at::Tensor& tensor);

/// A node that reads a weight, as its input of this number, and is going to be replaced.
struct WeightRead {
  Node* node = nullptr;
  std::size_t input = 0;
  const void* memory = nullptr;  ///< of the weight
};

/// Takes weights out of the object that a graph reads its attributes from (Analysis::module), each once all that reads
/// it was replaced. Where that object is a whole module, which is the caller's, it does nothing.
class WeightRelease {
 public:
  /// The weights that nothing reads but `reads`.
  WeightRelease(const Analysis& analysis, const std::vector<WeightRead>& reads);
  void replaced(const WeightRead& read);

 private:
  struct Weight {
    std::size_t reads = 0;           ///< that are left
    std::vector<std::size_t> slots;  ///< of the object
  };
  c10::intrusive_ptr<c10::ivalue::Object> object_;
  std::map<const void*, Weight> weights_;
};

}  // namespace llmcache::ts
