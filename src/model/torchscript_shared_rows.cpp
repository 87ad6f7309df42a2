#include "model/torchscript_shared_rows.h"

#include <algorithm>

#include "model/torchscript_analysis.h"

namespace llmcache::ts {
namespace {

namespace aten = c10::aten;
using Kind = Label::Kind;

bool knows_rows(const ValueInfo& info) {
  return info.count(Kind::kBatch) + info.count(Kind::kBatchTokens) + info.count(Kind::kBatchSource) +
             info.count(Kind::kUnknown) >
         0;
}

}  // namespace

bool same_for_all_rows(const Analysis& analysis, const Value* value) {
  static const std::unordered_set<c10::Symbol> kRepeating{aten::repeat, aten::expand};
  static const std::unordered_set<c10::Symbol> kMerging{aten::view, aten::reshape};
  static const std::unordered_set<c10::Symbol> kKeeping{aten::transpose,  aten::permute, aten::unsqueeze,
                                                        aten::contiguous, aten::to,      aten::detach,
                                                        aten::alias,      aten::clone,   aten::dropout};
  static const std::unordered_set<c10::Symbol> kPointwise{aten::mul, aten::div, aten::add, aten::sub, aten::neg};
  const auto info = analysis.infos.find(value);
  if (info == analysis.infos.end() || !info->second.is_tensor()) {
    return !value->type()->isSubtypeOf(*c10::TensorType::get()) || is_rematerialised(value, analysis.flat.self());
  }
  if (!knows_rows(info->second)) return true;
  const Node* node = value->node();
  const auto kind = node->kind();
  if (node->inputs().empty()) return false;
  const Value* source = node->input(0);
  const auto of_source = analysis.infos.find(source);
  const bool known = of_source != analysis.infos.end() && of_source->second.is_tensor();
  if (kRepeating.count(kind)) return known && !knows_rows(of_source->second);
  if (kMerging.count(kind)) {
    // Rows stay in front of what is merged with them.
    const auto in_front = [](const ValueInfo& of) { return !of.dims.empty() && of.dims[0].kind == Kind::kBatch; };
    if (!known || !in_front(info->second) || !in_front(of_source->second)) return false;
  }
  if (kPointwise.count(kind)) {
    const auto inputs = node->inputs();
    return std::all_of(inputs.begin(), inputs.end(),
                       [&](const Value* input) { return same_for_all_rows(analysis, input); });
  }
  return (kMerging.count(kind) || kKeeping.count(kind)) && same_for_all_rows(analysis, source);
}

}  // namespace llmcache::ts
