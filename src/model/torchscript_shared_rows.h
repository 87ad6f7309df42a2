// Values that are repeated for each row of a batch. Internal to model/torchscript*.
#pragma once

#include "model/torchscript_graph.h"

namespace llmcache::ts {

struct Analysis;

/// Has a tensor the same entries for all rows of a batch, repeated row by row from what knows of no rows? Embeddings of
/// relative positions are. It has a dimension over rows, and none over tokens.
bool same_for_all_rows(const Analysis& analysis, const Value* value);

}  // namespace llmcache::ts
