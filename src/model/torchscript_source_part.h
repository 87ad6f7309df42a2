// The part of an encoder-decoder that follows from its source alone, cut out of the graph. Internal to
// model/torchscript*.
#pragma once

#include <memory>
#include <vector>

#include "model/torchscript_model.h"

namespace llmcache::ts {

/// By data flow, over the nodes in front of the layers: no names, and nothing of how an encoder looks like.
SourcePart find_source_part(const Analysis& analysis);

/// Puts the inputs of the model into their slots.
void put_inputs(const Analysis& analysis, const Program& program, const Inputs& inputs, Env& env);

/// The values of the source part, into their slots: from behind the inputs, or computed from them, which put_inputs()
/// has put there.
void put_source(const Analysis& analysis, const Program& program, const c10::IValue& self, const Inputs& inputs,
                Env& env);

class SourceSubgraph final : public SourceModel {
 public:
  /// `program` must outlive it.
  SourceSubgraph(std::shared_ptr<const Analysis> analysis, const Program& program);

  std::vector<at::Tensor> run(const Inputs& inputs) const override;
  const std::vector<int>& token_dims() const override { return token_dims_; }
  bool shareable() const override { return shareable_; }

 private:
  std::shared_ptr<const Analysis> analysis_;
  const Program& program_;
  std::vector<int> token_dims_;
  bool shareable_ = false;
};

}  // namespace llmcache::ts
