#include "model/torchscript_packed_tables.h"

#include <torch/csrc/jit/runtime/custom_operator.h>

#include <mutex>
#include <utility>

#include "model/packed_table.h"

namespace llmcache::ts {

const c10::Symbol& packed_embedding_symbol() {
  static const auto symbol = c10::Symbol::fromQualString("llmcache::packed_embedding");
  return symbol;
}

void register_packed_embedding() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::jit::registerOperator(torch::jit::Operator(
        "llmcache::packed_embedding(Tensor ids, int table) -> Tensor",
        [](torch::jit::Stack& stack) {
          const auto table = torch::jit::pop(stack).toInt();
          const auto ids = torch::jit::pop(stack).toTensor();
          torch::jit::push(stack, PackedTable::find(table).look_up(ids));
        },
        c10::AliasAnalysisKind::FROM_SCHEMA));
  });
}

std::optional<TableRead> table_read_of(Node* node, const Analysis& analysis) {
  if (node->kind() != c10::aten::embedding) return std::nullopt;
  auto table = attribute_tensor(node->input(0), analysis.flat.self(), analysis.module);
  if (!table.defined() || table.dim() != 2) return std::nullopt;
  return TableRead{node->input(1), std::move(table)};
}

}  // namespace llmcache::ts
