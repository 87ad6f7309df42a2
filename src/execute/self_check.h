// Before the first real call: does the wrapped model do what the plain one does?
#pragma once

#include "llmcache/model/layered_model.h"
#include "model/probe.h"

namespace llmcache {

/// Compares whole-layer, packed and partial execution with the plain model on tiny batches, fills
/// granularity, head_tokenwise, left_padding and verified of `profile` with what agrees, and says in its notes
/// what does not. Throws Error(kUnsupportedModel) if not even whole layers agree bit by bit.
void self_check(const Model& model, const InputSpec& inputs, const OutputSpec& spec, ModelProfile& profile);

}  // namespace llmcache
