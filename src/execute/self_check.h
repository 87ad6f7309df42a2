// Before the first real call: does the wrapped model do what the plain one does?
#pragma once

#include "llmcache/model/layered_model.h"
#include "model/probe.h"

namespace llmcache {

/// Compares whole-layer, packed and partial execution with the plain model on tiny batches, fills
/// granularity, head_tokenwise, left_padding and verified of `profile` with what agrees, and says in its notes
/// what does not. What depends on the graph of the layers alone is asked of `shallow` (ShallowModel), unless that is
/// null. Throws Error(kUnsupportedModel) if not even whole layers agree bit by bit.
void self_check(const Model& model, const Model* shallow, const InputSpec& inputs, const Probed& probed,
                ModelProfile& profile);

/// Compares one packed batch (whole layers, where nothing is packed) with the plain model, whose result it returns:
/// what `profile` says is not checked otherwise. Throws DamagedData if they differ, and what the model throws.
c10::IValue check_once(const Model& model, const InputSpec& inputs, const OutputSpec& spec, ModelProfile& profile);

}  // namespace llmcache
