#include "model/numeric_state.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DefaultDtype.h>
#include <fmt/core.h>

namespace llmcache {

NumericState numeric_state(at::Device device) {
  NumericState state;
  state.autocast = at::autocast::is_autocast_enabled(device.type());
  if (state.autocast) state.autocast_type = at::autocast::get_autocast_dtype(device.type());
  state.default_type = c10::get_default_dtype_as_scalartype();
  const auto& context = at::globalContext();
  state.deterministic = context.deterministicAlgorithms();
  state.matmul_precision = static_cast<int>(context.float32MatmulPrecision());
  state.onednn = context.userEnabledMkldnn();
  return state;
}

std::string to_string(const NumericState& state) {
  return fmt::format("autocast {}, default type {}, deterministic {}, float32 products {}, oneDNN {}",
                     state.autocast ? c10::toString(state.autocast_type) : "off", c10::toString(state.default_type),
                     state.deterministic ? "on" : "off", state.matmul_precision, state.onednn ? "on" : "off");
}

std::string what_changed(const NumericState& then, const NumericState& now) {
  const auto autocast = [](const NumericState& state) {
    return state.autocast ? fmt::format("autocast to {}", c10::toString(state.autocast_type)) : "no autocast";
  };
  const auto on = [](bool value) { return value ? "on" : "off"; };
  if (then.autocast != now.autocast || then.autocast_type != now.autocast_type) {
    return fmt::format("{}; the model was wrapped under {}", autocast(now), autocast(then));
  }
  if (then.default_type != now.default_type) {
    return fmt::format("the default dtype is {}; it was {} when the model was wrapped", c10::toString(now.default_type),
                       c10::toString(then.default_type));
  }
  if (then.deterministic != now.deterministic) {
    return fmt::format("deterministic algorithms are {}; they were {} when the model was wrapped",
                       on(now.deterministic), on(then.deterministic));
  }
  if (then.matmul_precision != now.matmul_precision) {
    return "the precision of float32 matrix products is another one than when the model was wrapped";
  }
  return fmt::format("oneDNN is {}; it was {} when the model was wrapped", on(now.onednn), on(then.onednn));
}

}  // namespace llmcache
