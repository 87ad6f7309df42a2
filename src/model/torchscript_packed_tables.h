// Embeddings of an analysed TorchScript model on packed tables. Internal to model/torchscript*.
#pragma once

#include <optional>

#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// A look-up that can be replaced: aten::embedding in an attribute.
struct TableRead {
  Value* ids = nullptr;
  at::Tensor table;  ///< `[rows, width]`
};

/// Nothing: the node is no such look-up.
std::optional<TableRead> table_read_of(Node* node, const Analysis& analysis);

/// llmcache::packed_embedding(ids, number), which register_packed_embedding() registers once a process.
const c10::Symbol& packed_embedding_symbol();
void register_packed_embedding();

}  // namespace llmcache::ts
