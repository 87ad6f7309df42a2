#include "model/wrapped_model.h"

#include <fmt/core.h>
#include <torch/version.h>

#include <algorithm>

namespace llmcache {
namespace {

std::string text_of_attention(const std::vector<AttentionOp>& attention_ops) {
  std::string text;
  for (const AttentionOp& attention_op : attention_ops) {
    text += fmt::format("{} {} {} {}; ", attention_op.layer, attention_op.kind, attention_op.query_inputs,
                        attention_op.key_inputs);
  }
  return text;
}

}  // namespace

bool WrappedModel::all_per_token() const noexcept {
  return std::all_of(output.leaves.begin(), output.leaves.end(),
                     [](const TokenDims& dims) { return dims.tokens >= 0; });
}

ModelIdentity WrappedModel::identity() const {
  ModelIdentity identity;
  identity.contents = model->identity();
  identity.weights = profile.weights;
  identity.attention = text_of_attention(profile.attention);
  identity.numerics = fmt::format("{} in {}, {}", c10::DeviceTypeName(model->device().type(), /*lower_case=*/true),
                                  c10::toString(model->dtype()), to_string(wrapped_under));
  identity.torch = TORCH_VERSION;
  return identity;
}

}  // namespace llmcache
