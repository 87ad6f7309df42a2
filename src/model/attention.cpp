#include "model/attention.h"

#include <ATen/ATen.h>

#include <limits>

namespace llmcache {
namespace {

/// Of a mask over all keys those of one segment; a mask that is the same for all keys stays.
at::Tensor cut_keys(const at::Tensor& mask, std::int64_t first, std::int64_t tokens) {
  return mask.size(-1) == 1 ? mask : mask.narrow(-1, first, tokens);
}

/// Queries of the heads that share a key head, one after another: [1, key heads, heads / key heads * active, d].
at::Tensor group(const at::Tensor& queries, std::int64_t key_heads) {
  const auto groups = queries.size(1) / key_heads;
  return queries.reshape({1, key_heads, groups * queries.size(2), queries.size(3)});
}

/// The mask for grouped queries.
at::Tensor group_mask(at::Tensor mask, std::int64_t heads, std::int64_t key_heads) {
  while (mask.dim() < 4) mask = mask.unsqueeze(0);
  if (mask.size(1) == 1 && mask.size(2) == 1) return mask;
  const auto groups = heads / key_heads;
  if (mask.size(1) == 1) {
    return mask.unsqueeze(2)
        .expand({1, 1, groups, mask.size(2), mask.size(3)})
        .reshape({1, 1, groups * mask.size(2), mask.size(3)});
  }
  return mask.reshape({1, key_heads, groups * mask.size(2), mask.size(3)});
}

at::Tensor repeat_heads(const at::Tensor& keys, std::int64_t heads) {
  const auto groups = heads / keys.size(1);
  return keys.unsqueeze(2)
      .expand({keys.size(0), keys.size(1), groups, keys.size(2), keys.size(3)})
      .reshape({keys.size(0), heads, keys.size(2), keys.size(3)});
}

at::Tensor attend_one(const AttentionSettings& settings, const at::Tensor& queries, const at::Tensor& keys,
                      const at::Tensor& values, std::optional<at::Tensor> mask, const at::Tensor& active) {
  const auto tokens = keys.size(2);
  bool causal = settings.causal;
  if (causal && active.defined()) {
    if (active.size(0) > 1 || active.size(0) < tokens) {
      mask = at::arange(tokens, active.options()).unsqueeze(0).le(active.unsqueeze(1));
    }
    causal = false;
  }
  const auto heads = queries.size(1);
  const auto key_heads = keys.size(1);
  if (heads == key_heads) {
    return at::scaled_dot_product_attention(queries, keys, values, mask, 0.0, causal, settings.scale);
  }
  // Few queries: the keys are what costs, so that they are read as they are. Many: as the model does it.
  if (!causal && 4 * queries.size(2) <= tokens) {
    if (mask) mask = group_mask(*mask, heads, key_heads);
    return at::scaled_dot_product_attention(group(queries, key_heads), keys, values, mask, 0.0, false, settings.scale)
        .reshape({1, heads, queries.size(2), values.size(3)});
  }
  return at::scaled_dot_product_attention(queries, repeat_heads(keys, heads), repeat_heads(values, heads), mask, 0.0,
                                          causal, settings.scale);
}

/// Can each segment be attended by itself?
bool separable(const at::Tensor& queries, const std::vector<KeySegment>& segments) {
  if (!queries.device().is_cpu() || queries.dim() != 4 || queries.size(2) == 0) return false;
  for (const KeySegment& segment : segments) {
    for (const at::Tensor& key : segment.keys) {
      if (key.dim() != 4 || key.size(3) != queries.size(3) || key.scalar_type() != queries.scalar_type()) return false;
      if (key.stride(3) != 1) return false;
    }
  }
  return true;
}

/// The mask that a segment needs for causality, none if all its keys are in front of all queries.
std::optional<at::Tensor> causal_mask(const at::Tensor& active, std::int64_t first, std::int64_t tokens) {
  if (first + tokens <= active[0].item<std::int64_t>() + 1) return std::nullopt;
  return at::arange(first, first + tokens, active.options()).unsqueeze(0).le(active.unsqueeze(1));
}

at::Tensor additive(const at::Tensor& mask, const at::Tensor& like) {
  if (mask.scalar_type() != at::kBool) return mask;
  return at::zeros(mask.sizes(), like.options())
      .masked_fill(mask.logical_not(), -std::numeric_limits<double>::infinity());
}

}  // namespace

at::Tensor attend(const AttentionSettings& settings, const at::Tensor& queries, const std::vector<KeySegment>& segments,
                  const std::optional<at::Tensor>& mask, const at::Tensor& active) {
  if (segments.size() == 1) {
    return attend_one(settings, queries, segments[0].keys[0], segments[0].keys[1], mask, active);
  }
  if (!separable(queries, segments)) {
    std::vector<at::Tensor> keys;
    std::vector<at::Tensor> values;
    for (const KeySegment& segment : segments) {
      keys.push_back(segment.keys[0]);
      values.push_back(segment.keys[1]);
    }
    return attend_one(settings, queries, at::cat(keys, 2), at::cat(values, 2), mask, active);
  }
  const auto heads = queries.size(1);
  const auto key_heads = segments[0].keys[0].size(1);
  const auto grouped = heads == key_heads ? queries : group(queries, key_heads);
  const bool causal = settings.causal && active.defined();
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> log_sums;
  std::int64_t first = 0;
  for (const KeySegment& segment : segments) {
    std::optional<at::Tensor> own;
    if (mask) own = cut_keys(*mask, first, segment.tokens);
    if (causal) own = causal_mask(active, first, segment.tokens);
    if (own) {
      if (heads != key_heads) own = group_mask(*own, heads, key_heads);
      while (own->dim() < 4) own = own->unsqueeze(0);
      own = additive(*own, queries);
    }
    auto [output, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(grouped, segment.keys[0], segment.keys[1],
                                                                             0.0, false, own, settings.scale);
    // Where a query sees nothing of the segment the operator's log-sum-exp means nothing.
    if (own) log_sum = log_sum.masked_fill(own->amax(-1).isneginf(), -std::numeric_limits<double>::infinity());
    outputs.push_back(std::move(output));
    log_sums.push_back(std::move(log_sum));
    first += segment.tokens;
  }
  const auto weights = at::softmax(at::stack(log_sums), 0)
                           .nan_to_num(0.0)  // a query that sees nothing at all
                           .to(queries.scalar_type())
                           .unsqueeze(-1);
  auto merged = (at::stack(outputs) * weights).sum(0);
  return heads == key_heads ? merged : merged.reshape({1, heads, queries.size(2), queries.size(3)});
}

}  // namespace llmcache
