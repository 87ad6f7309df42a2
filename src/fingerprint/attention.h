// Attention statistics as a part of a fingerprint (LLMCache, arXiv 2512.16843: Input Fingerprint Generator).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace llmcache {

/// Values that attention_statistics() gives for a model of `heads` heads.
std::int64_t attention_statistics_size(std::int64_t heads) noexcept;

/// Statistics of one sequence's attention: `queries` `[1, heads, tokens, d]`, `keys` `[1, key heads,
/// tokens, d]` (key heads divide heads: grouped queries), with the usual scale 1 / sqrt(d).
///  - per head: entropy of a query's attention, averaged over the queries, as a share of the largest
///    possible (ln tokens; 0 for one token);
///  - eight quantiles (0, 1/7, ... 1) of the attention that a token receives, averaged over heads
///    and queries, times the number of tokens (so 1 is an even share).
std::vector<float> attention_statistics(const at::Tensor& queries, const at::Tensor& keys, bool causal);

}  // namespace llmcache
