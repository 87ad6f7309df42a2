// Which layers of a model do the same, with other weights. Internal to model/torchscript*.
#pragma once

#include <cstdint>
#include <vector>

#include "llmcache/model/profile.h"
#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// Layers of a kind have the same operators in the same order, with the same constants and weights of the same shapes,
/// on the same values from before the layers, and attention operators alike. For layers that hand on the hidden state
/// alone.
LayerKinds layer_kinds(const Analysis& analysis, const std::vector<AttentionOp>& attention_ops);

}  // namespace llmcache::ts
