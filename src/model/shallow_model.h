// A model cut down to one layer of each kind: what probing asks of it depends on its graph, not on its depth.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "llmcache/model/layered_model.h"
#include "model/graph_findings.h"

namespace llmcache {

/// `model` with some of its layers, whose result is the hidden state behind the last of them: for a model whose head
/// works token by token, and whose layers hand on nothing but the hidden state (GraphFindings::layers).
class ShallowModel final : public Model {
 public:
  /// Null if the model has no layers that could be left out.
  static std::shared_ptr<ShallowModel> of(const std::shared_ptr<Model>& model);

  ShallowModel(std::shared_ptr<Model> model, LayerKinds layers);

  /// The layer of this model that is like layer `l` of the whole one.
  [[nodiscard]] std::int64_t like(std::int64_t l) const {
    return static_cast<std::int64_t>(kinds_.like.at(static_cast<std::size_t>(l)));
  }

  Activations embed(const Inputs& inputs) const override { return model_->embed(inputs); }
  std::int64_t layers() const override { return static_cast<std::int64_t>(kinds_.distinct.size()); }
  void layer(std::int64_t i, Activations& activations) const override { model_->layer(at(i), activations); }
  c10::IValue head(Activations& activations) const override { return activations.hidden; }
  at::Device device() const override { return model_->device(); }
  at::ScalarType dtype() const override { return model_->dtype(); }
  at::ScalarType rounding() const override { return model_->rounding(); }
  std::string digest() const override { return model_->digest(); }
  InputSpec input_spec() const override { return model_->input_spec(); }
  const TokenLevelModel* token_level() const override { return token_level_.get(); }

 private:
  [[nodiscard]] std::int64_t at(std::int64_t i) const { return kinds_.distinct.at(static_cast<std::size_t>(i)); }

  std::shared_ptr<Model> model_;
  LayerKinds kinds_;  ///< the distinct layers are kept
  std::unique_ptr<TokenLevelModel> token_level_;
};

}  // namespace llmcache
