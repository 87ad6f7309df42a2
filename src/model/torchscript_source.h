// Encoder-decoders: which inputs are the source's. Internal to model/torchscript*.
#pragma once

#include <vector>

#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// Which inputs may be those of a source, by running the graph: the model takes them with another length than the
/// others, and each side has ids. Each division of the inputs comes twice, as either side may be the source; none:
/// all inputs have one length, or the model takes several divisions. Needs the graph and the vocabulary.
std::vector<std::vector<bool>> source_candidates(const Analysis& analysis);

/// An input of the source that selects from an embedding; -1: there is none.
int source_argument(const Analysis& analysis);

/// Do the layers work on what follows from the ids of the source, and on what follows from the others? An encoder's do
/// not.
bool layers_read_both_sides(const Analysis& analysis);

}  // namespace llmcache::ts
