// Token ids, as banks know them.
#pragma once

#include <cstdint>
#include <vector>

namespace llmcache::test {

using Tokens = std::vector<std::int64_t>;

inline Tokens iota(std::int64_t count, std::int64_t first = 0) {
  Tokens tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) token = first++;
  return tokens;
}

inline Tokens joined(Tokens tokens, const Tokens& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
  return tokens;
}

}  // namespace llmcache::test
