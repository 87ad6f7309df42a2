// Mean hidden states: what fingerprints are made of.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "execute/batch.h"
#include "llmcache/model/layered_model.h"

namespace llmcache {

/// Mean over its tokens of a hidden state `[1, tokens, hidden]`.
std::vector<float> mean_state(const at::Tensor& hidden);

/// Mean over the real tokens of each row's state that enters layer `layer` (L: the final state), one
/// vector a row, empty without real tokens. The batch can be packed.
std::vector<std::vector<float>> pooled_states(const Model& model, const Batch& batch, std::int32_t layer);

}  // namespace llmcache
