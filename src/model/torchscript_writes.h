// Models that write to what they hold while they run. Internal to model/torchscript*.
#pragma once

#include "model/torchscript_graph.h"

namespace llmcache::ts {

/// Takes writes to attributes out of the library's own copy of a graph (inlined, attributes by prim::GetAttr on self),
/// where that is shown to be safe: an attribute that is overwritten as a whole before anything reads it is replaced by
/// what was written; one that nobody reads (a counter of calls) is not written to. Throws Error(kUnsupportedModel) for
/// other writes, that says to what, by which operator, and where.
Writes remove_writes(Graph& graph, const Module& module);

}  // namespace llmcache::ts
