// Reuse of the states of a sequence's tokens in another sequence, corrected by what a sample of them shows.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "execute/cached_states.h"
#include "execute/engine_hook.h"
#include "match/active_set.h"

namespace llmcache {

/// What one sequence of a pass reuses.
struct ReusedSequence {
  std::shared_ptr<const CachedStates> donor;  ///< null: everything is computed
  std::vector<std::int64_t> donor_positions;  ///< by token; -1: the donor does not have it
  ActiveSet set;                              ///< tokens without a donor position are active; samples have one
  std::int32_t widened = 0;                   ///< first layer that runs on all tokens; number of layers: none
};

/// How far the cached states of the samples were off in one layer.
struct SampleShift {
  double relative = 0;  ///< length of the mean difference, relative to that of the cached keys; mean over the attention
                        ///< operator inputs
  double shrinkage = 0;  ///< what part of the mean difference was added; mean over these
};

/// Each sequence takes what it does not compute from its donor. At every attention operator, for keys and values
/// apart, the mean difference mu between fresh and cached rows of the samples is added to the cached rows, times the
/// shrinkage a = max(0, 1 - (trace cov / samples) / |mu|^2), as James and Stein shrink a mean (positive part); the
/// final states, and states that enter the layer from which on all tokens run, likewise. With fewer than two samples
/// nothing is added.
///
/// Tokens that the donor has are embedded as they were there (their place included), computed or not: a block that
/// moved keeps its places as a whole. So layers must not look at places themselves where blocks moved.
class CorrectedStates final : public EngineHook {
 public:
  /// What a sequence does from layer l on, by the shift in layer l - 1. kComputeAll counts where the donor has the
  /// states that enter l.
  using Monitor = std::function<LayerAction(std::size_t sequence, std::int32_t l, const SampleShift& shift)>;

  /// `sequences`: in the plan's order; they outlive the pass. `monitor` may be empty.
  CorrectedStates(const TokenLevelModel& model, std::int32_t layers, const std::vector<ReusedSequence>& sequences,
                  at::Device device, Monitor monitor);

  bool wants_hooks() const override { return true; }
  void embedded(std::size_t sequence, at::Tensor rows) override;
  LayerAction before_layer(std::size_t sequence, std::int32_t layer, const at::Tensor& active) override;
  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override;
  at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) override;
  void finished(std::size_t sequence, const at::Tensor& fresh) override { at(sequence).finished = fresh; }
  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override;

  /// By layer, of those that ran on a part of the tokens; zero in layer 0.
  [[nodiscard]] const std::vector<SampleShift>& shifts(std::size_t sequence) const { return state_[sequence].shifts; }
  /// True if before_layer() said so.
  [[nodiscard]] bool stopped(std::size_t sequence) const { return state_[sequence].stopped; }

 private:
  struct State {
    std::int32_t widened = 0;
    bool stopped = false;
    at::Tensor gather;        ///< donor position of each token, 0 where there is none
    at::Tensor active;        ///< tokens that are computed
    at::Tensor known_rows;    ///< rows of the active tokens that the donor has
    at::Tensor known_donor;   ///< their positions there
    at::Tensor sample_rows;   ///< rows of the samples among the active tokens
    at::Tensor sample_donor;  ///< their positions in the donor
    at::Tensor entering;      ///< corrected states of all tokens that enter layer `widened`
    at::Tensor finished;
    std::vector<SampleShift> shifts;
  };
  struct Shift {
    at::Tensor add;  ///< to every cached row; undefined: nothing
    SampleShift measured;
  };

  State& at(std::size_t sequence) { return state_[sequence]; }
  [[nodiscard]] static Shift measure(const State& state, const at::Tensor& fresh, const at::Tensor& cached);
  [[nodiscard]] static at::Tensor reused_rows(const State& state, const at::Tensor& cached, const Shift& shift);

  const TokenLevelModel& model_;
  const std::int32_t layers_;
  const std::vector<ReusedSequence>& sequences_;
  Monitor monitor_;
  std::vector<State> state_;
};

}  // namespace llmcache
