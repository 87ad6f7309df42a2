#include "reuse/computed/computed.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "caller_failed.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "execute/run_model.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

/// The caller's hooks on one pass.
class HookCalls final : public EngineHook {
 public:
  HookCalls(const std::vector<std::shared_ptr<LayerHook>>& hooks, const Plan& plan)
      : hooks_(hooks), rows_(plan), stopped_(plan.sequences.size()) {}

  bool watches(std::int32_t layer) const override {
    return std::any_of(hooks_.begin(), hooks_.end(), [&](const auto& hook) { return watches(*hook, layer); });
  }
  bool writes_states() const override {
    return call_the_callers("LayerHook", [&] {
      return std::any_of(hooks_.begin(), hooks_.end(), [](const auto& hook) { return hook->writes(); });
    });
  }
  std::vector<std::size_t> at_layer(std::int32_t layer, const std::vector<at::Tensor>& states) override {
    std::vector<std::size_t> stopping;
    for (std::size_t i = 0; i < states.size(); ++i) {
      for (const auto& hook : hooks_) {
        if (!states[i].defined() || stopped_[i] || !watches(*hook, layer)) continue;
        if (call(*hook, layer, rows_.sequences[i].row, states[i]) == HookAction::kGoOn) continue;
        stopped_[i] = 1;
        stopping.push_back(i);
      }
    }
    return stopping;
  }

 private:
  static bool watches(const LayerHook& hook, std::int32_t layer) {
    return call_the_callers("LayerHook", [&] { return hook.watches(layer); });
  }
  /// `states`: `[1, tokens, hidden]`.
  static HookAction call(LayerHook& hook, std::int32_t layer, std::int64_t row, const at::Tensor& states) {
    const at::Tensor own = states[0];
    LayerStates at{row, layer, own};
    const auto action = call_the_callers("LayerHook", [&] { return hook.at_layer(at); });
    if (at.states.is_same(own)) return action;
    if (!call_the_callers("LayerHook", [&] { return hook.writes(); })) {
      throw Error(
          ErrorCode::kInvalidInput,
          fmt::format("a LayerHook replaced the states of row {} in front of layer {}, but its writes() says that "
                      "it changes none",
                      row, layer));
    }
    if (!at.states.defined() || at.states.sizes() != own.sizes() || at.states.scalar_type() != own.scalar_type()) {
      throw Error(ErrorCode::kInvalidInput,
                  fmt::format("a LayerHook replaced the states of row {} in front of layer {} by {}; a tensor of type "
                              "{} and sizes [{}] is expected",
                              row, layer,
                              at.states.defined()
                                  ? fmt::format("one of type {} and sizes [{}]", c10::toString(at.states.scalar_type()),
                                                fmt::join(at.states.sizes().vec(), ", "))
                                  : std::string("an undefined one"),
                              c10::toString(own.scalar_type()), fmt::join(own.sizes().vec(), ", ")));
    }
    own.copy_(at.states);
    return action;
  }

  const std::vector<std::shared_ptr<LayerHook>>& hooks_;
  const Plan& rows_;
  std::vector<char> stopped_;
};

}  // namespace

bool Packed::pays(const Batch& batch) const {
  constexpr std::int64_t kShare = 20;
  const std::int64_t all = batch.rows * batch.padded_length;
  const std::int64_t cost = cost_tokens_ == 0 ? 0 : cost_tokens_ + all / kShare;
  return batch.padded && all - batch.tokens >= cost;
}

void Packed::serve(const Call& /*call*/, Answers& answers) {
  const Batch& batch = answers.open();
  if (!pays(batch)) return;
  PassResult pass;
  pass.value = execute_packed(*wrapped_.model, batch, batch.full_plan(wrapped_.layers()), {}, nullptr, pass.report);
  answers.put(std::move(pass));
}

void Hooked::serve(const Call& call, Answers& answers) {
  if (!call.batch.plain_only.empty()) {
    throw Error(ErrorCode::kNotAvailable, "a call with a LayerHook cannot be run by itself: " + call.batch.plain_only);
  }
  check_packable(call.batch, *wrapped_.model, wrapped_.profile);
  if (call.batch.tokens == 0) {
    throw Error(ErrorCode::kInvalidInput, "a call with a LayerHook has no real token");
  }
  if (!call.packable) {
    throw Error(
        ErrorCode::kNotAvailable,
        "a call with a LayerHook runs packed, and an answer of this model that was computed so was another than "
        "the plain model's");
  }
  const Plan plan = call.batch.full_plan(wrapped_.layers());
  HookCalls hooks(call.hooks, plan);
  PassResult pass;
  pass.storable = false;
  pass.verified = false;
  pass.cut = call.request.output == Output::kLastToken && wrapped_.profile.head_tokenwise;
  Selection selection = select_all(plan);
  if (pass.cut) {
    selection.padded_length = 1;
    for (auto& span : selection.spans) span = {span.tokens - 1, 1, 0};
  }
  pass.value =
      run_model([&] { return execute_packed(*wrapped_.model, call.batch, plan, hooks, selection, pass.report); });
  if (pass.value.isNone()) pass.value = nothing(call.batch, selection.padded_length);
  answers.put(std::move(pass));
}

/// A result for a batch of which every sequence was stopped.
c10::IValue Hooked::nothing(const Batch& batch, std::int64_t padded_length) const {
  std::size_t leaf = 0;
  return map_tensors(wrapped_.result_form, [&](const at::Tensor& form) {
    const TokenDims& dims = wrapped_.output.leaves[leaf++];
    auto sizes = form.sizes().vec();
    sizes[static_cast<std::size_t>(dims.batch)] = batch.rows;
    if (dims.tokens >= 0) sizes[static_cast<std::size_t>(dims.tokens)] = padded_length;
    return at::zeros(sizes, form.options().device(wrapped_.model->device()));
  });
}

void Dense::serve(const Call& /*call*/, Answers& answers) {
  const Batch& batch = answers.open();
  PassResult pass;
  pass.value = execute_dense(*wrapped_.model, batch.model_inputs(), pass.report);
  pass.report.sequences = count_tokens(batch.full_plan(wrapped_.layers()));
  answers.put(std::move(pass));
}

}  // namespace llmcache
