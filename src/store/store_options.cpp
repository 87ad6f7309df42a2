#include "llmcache/store/store_options.h"

#include <fmt/core.h>

#include "refusal.h"

namespace llmcache {

void StoreOptions::validate() const {
  constexpr std::int64_t kMostBlockTokens = 4096;
  constexpr std::size_t kLeastSecret = 16;
  constexpr std::size_t kMostSecret = 64;
  if (!(deadline_ms > 0)) {
    refuse_options(fmt::format("StoreOptions.deadline_ms is {}; more than 0 is expected", deadline_ms));
  }
  if (!(write_deadline_ms > 0)) {
    refuse_options(fmt::format("StoreOptions.write_deadline_ms is {}; more than 0 is expected", write_deadline_ms));
  }
  if (block_tokens < 1 || block_tokens > kMostBlockTokens) {
    refuse_options(fmt::format("StoreOptions.block_tokens is {}; 1 to {} is expected", block_tokens, kMostBlockTokens));
  }
  for (const auto& [tenant, secret] : tenant_secrets) {
    if (secret.size() >= kLeastSecret && secret.size() <= kMostSecret) continue;
    refuse_options(fmt::format("StoreOptions.tenant_secrets has a secret of {} bytes; {} to {} are expected",
                               secret.size(), kLeastSecret, kMostSecret));
  }
}

}  // namespace llmcache
