// Scaled dot-product attention over keys that lie in several tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "llmcache/model/token_level.h"

namespace llmcache {

/// The arguments of the operator that are not tensors of the request.
struct AttentionSettings {
  bool causal = false;
  std::optional<double> scale;
};

/// Attention of `queries` `[1, heads, active, d]`. Each segment holds keys and values `[1, key heads, tokens, d]`;
/// heads must be a multiple of key heads, and query heads that follow each other share a key head (grouped-query
/// attention, arXiv 2305.13245). `mask`, if given, is what the operator takes: bool or additive, broadcast to
/// `[1, heads, active, tokens of all segments]`. `active`: positions of the queries among the keys, int64 `[active]`;
/// undefined: all of them. Several segments are attended one by one and merged by their log-sum-exp, as in
/// FlashAttention (arXiv 2205.14135), so that no key is copied; where the operator for that is missing (other devices,
/// keys and values of different width) they are put together first.
at::Tensor attend(const AttentionSettings& settings, const at::Tensor& queries, const std::vector<KeySegment>& segments,
                  const std::optional<at::Tensor>& mask, const at::Tensor& active);

}  // namespace llmcache
