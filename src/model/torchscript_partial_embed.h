// The work in front of the layers (embeddings, positions, masks), done for some positions only. Internal to
// model/torchscript*.
#pragma once

#include <optional>
#include <vector>

#include "model/torchscript_analysis.h"
#include "model/torchscript_subgraph.h"

namespace llmcache::ts {

/// A graph made from the one in front of the layers. Where that computes a value for all tokens and then only some are
/// needed, the selection is moved in front of the operators, as far as these treat tokens alike: pointwise operators,
/// look-ups, norms, and those that only change the shape. Whatever is of another kind is computed for all tokens and
/// selected from; the result is the same in any case. Const and thread-safe.
class PartialEmbed {
 public:
  struct Output {
    const Value* value = nullptr;
    int slot = -1;
    int dim = -1;  ///< that runs over tokens and is cut to the positions; -1: the whole value
  };

  /// Empty if the graph has effects, or if the result is not what the whole graph gives (tried on tiny inputs).
  static std::optional<PartialEmbed> build(const Analysis& analysis, const std::vector<Output>& outputs);

  /// `positions`: int64 `[n]`, ascending. `source`: what the source part gave. Whole values go into `whole`, the others
  /// into `cut`, by slot.
  void run(const c10::IValue& self, const Inputs& inputs, const std::vector<c10::IValue>& source,
           const at::Tensor& positions, Env& whole, Env& cut) const;

 private:
  [[nodiscard]] std::vector<c10::IValue> call(const c10::IValue& self, const Inputs& inputs,
                                              const std::vector<c10::IValue>& source,
                                              const at::Tensor& positions) const;
  [[nodiscard]] bool agrees(const Analysis& analysis) const;

  std::shared_ptr<torch::jit::GraphFunction> function_;
  std::size_t inputs_ = 0;  ///< of the model
  std::vector<Output> outputs_;
};

}  // namespace llmcache::ts
