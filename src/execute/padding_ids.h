// Ids at the padding of batches that are made to try a model.
#pragma once

#include <vector>

#include "execute/batch.h"
#include "llmcache/model/layered_model.h"

namespace llmcache {

/// False if the output of some row is read at padding (Model::read_positions), of which packed batches know nothing.
bool reads_real_tokens(const Model& model, const Inputs& inputs, const std::vector<RowSpan>& spans);

/// Puts ids that the model looks for outside of `spans`: all of them in turn if nothing is read there, else the first
/// for which that is so; if there is none, one of two others. The ids are the caller's to write to; one span a row.
void fill_padding(const Model& model, const InputSpec& spec, int ids_argument, const Inputs& inputs,
                  const std::vector<RowSpan>& spans);

}  // namespace llmcache
