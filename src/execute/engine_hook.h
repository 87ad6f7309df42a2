// What a packed pass asks and tells while it runs: states that it does not compute, and what is to happen between its
// layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "llmcache/match/plan.h"
#include "llmcache/model/token_level.h"

namespace llmcache {

/// What a sequence of a pass does from some layer on.
enum class LayerAction {
  kGoOn,
  kComputeAll,  ///< all its tokens run
  kStop,        ///< no further layer, and not the head, is run for it
};

/// Belongs to one pass; called by the thread that runs it. Sequences are numbered as the plan's. What it throws ends
/// the pass. As it is it serves a plan in which every token is computed, and does nothing else.
class EngineHook {
 public:
  virtual ~EngineHook() = default;

  /// Called once, before anything else. Both outlive the pass; the plan changes as the pass goes on.
  virtual void begin(const TokenLevelModel& model, const Plan& plan);

  // --- Watching the pass between its layers.

  /// True if at_layer() wants to see the states that enter layer l; l = L: the final states.
  [[nodiscard]] virtual bool watches(std::int32_t /*layer*/) const { return false; }
  /// True if at_layer() writes to the states that it is shown.
  [[nodiscard]] virtual bool writes_states() const { return false; }
  /// `states[i]` is the hidden state `[1, tokens, hidden]` of sequence i of the plan, undefined if the sequence has
  /// stopped or not all its tokens are computed. A view: copy what is kept. Returns the sequences that stop here: no
  /// further layer, and not the head, is run for them.
  virtual std::vector<std::size_t> at_layer(std::int32_t /*layer*/, const std::vector<at::Tensor>& /*states*/) {
    return {};
  }
  /// True if attended() wants to see the tensors that meet at the attention of a layer.
  [[nodiscard]] virtual bool watches_attention(std::int32_t /*layer*/) const { return false; }
  virtual void attended(std::int32_t /*layer*/, std::int64_t /*attention_op*/, std::size_t /*sequence*/,
                        const AttentionTensors& /*tensors*/) {}

  // --- Supplying states that the pass does not compute.

  /// The keys of all tokens of a sequence at an attention operator, in order. `fresh`: those of its active tokens,
  /// one tensor a key-side input, valid for this call and until the attention operator has been attended. Called for
  /// all sequences with active tokens before the first of them is attended: what one writes another may read.
  virtual std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                                       std::vector<at::Tensor> fresh);
  /// The hidden state that enters `layer` of tokens that first run there, from other layers than the pass computed:
  /// `[1, end - begin, hidden]`.
  virtual at::Tensor entering(std::size_t /*sequence*/, std::int32_t /*layer*/, std::int64_t /*begin*/,
                              std::int64_t /*end*/) {
    return {};
  }
  /// Told the final states of the tokens that ran through the last layer, `[1, active, hidden]`. Not called for
  /// sequences that stopped.
  virtual void finished(std::size_t sequence, const at::Tensor& fresh);
  /// The final states of tokens [begin, end), `[1, end - begin, hidden]`, active or not. Asked after all finished().
  virtual at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end);

  // --- Changing what runs.

  /// True if embedded() and before_layer() are to be called.
  [[nodiscard]] virtual bool wants_hooks() const { return false; }
  /// The embedded states of the sequence's tokens that run from layer 0 on, `[1, active, hidden]`, to be changed in
  /// place.
  virtual void embedded(std::size_t /*sequence*/, at::Tensor /*rows*/) {}
  /// Asked before layer l > 0; `active`: the states of the tokens that ran through the layer before, `[1, active,
  /// hidden]`. After kComputeAll, and where the plan has tokens that first run in l, entering() is asked for the
  /// others.
  virtual LayerAction before_layer(std::size_t /*sequence*/, std::int32_t /*layer*/, const at::Tensor& /*active*/) {
    return LayerAction::kGoOn;
  }
  /// The layer, above 0 and with an attention operator, by whose keys the hook chooses which tokens go on; -1:
  /// none. The model must be self-contained.
  [[nodiscard]] virtual std::int32_t choosing_layer() const { return -1; }
  /// Shown the keys that a sequence's active tokens have at the first attention operator of that layer, before any
  /// token runs through it. Returns the ranges by which the sequence goes on, which must say the same as the plan's
  /// about the layers before.
  virtual std::vector<TokenRange> choose(std::size_t /*sequence*/, const std::vector<at::Tensor>& /*fresh*/) {
    return {};
  }

 protected:
  const TokenLevelModel* model_ = nullptr;
  const Plan* plan_ = nullptr;
  std::vector<at::Tensor> finished_;  ///< by sequence
};

/// States from one hook, watched by another.
class WatchedStates final : public EngineHook {
 public:
  /// Both must outlive it.
  WatchedStates(EngineHook& states, EngineHook& watcher) : states_(states), watcher_(watcher) {}

  void begin(const TokenLevelModel& model, const Plan& plan) override {
    states_.begin(model, plan);
    watcher_.begin(model, plan);
  }
  bool watches(std::int32_t layer) const override { return watcher_.watches(layer); }
  bool writes_states() const override { return watcher_.writes_states(); }
  std::vector<std::size_t> at_layer(std::int32_t layer, const std::vector<at::Tensor>& states) override {
    return watcher_.at_layer(layer, states);
  }
  bool watches_attention(std::int32_t layer) const override { return watcher_.watches_attention(layer); }
  void attended(std::int32_t layer, std::int64_t attention_op, std::size_t sequence,
                const AttentionTensors& tensors) override {
    watcher_.attended(layer, attention_op, sequence, tensors);
  }
  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override {
    return states_.keys(sequence, layer, attention_op, std::move(fresh));
  }
  at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) override {
    return states_.entering(sequence, layer, begin, end);
  }
  void finished(std::size_t sequence, const at::Tensor& fresh) override { states_.finished(sequence, fresh); }
  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override {
    return states_.final_states(sequence, begin, end);
  }
  bool wants_hooks() const override { return states_.wants_hooks(); }
  void embedded(std::size_t sequence, at::Tensor rows) override { states_.embedded(sequence, std::move(rows)); }
  LayerAction before_layer(std::size_t sequence, std::int32_t layer, const at::Tensor& active) override {
    return states_.before_layer(sequence, layer, active);
  }
  std::int32_t choosing_layer() const override { return states_.choosing_layer(); }
  std::vector<TokenRange> choose(std::size_t sequence, const std::vector<at::Tensor>& fresh) override {
    return states_.choose(sequence, fresh);
  }

 private:
  EngineHook& states_;
  EngineHook& watcher_;
};

}  // namespace llmcache
