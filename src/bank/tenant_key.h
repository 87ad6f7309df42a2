// Whose an entry is: what every key and every partition of a bank begins with.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace llmcache {

/// Appends a tenant to a key, which is empty: its length and its bytes, so that no tenant's keys begin like another's.
inline void append_tenant(std::string& key, std::string_view tenant) {
  const std::uint64_t size = tenant.size();
  key.append(reinterpret_cast<const char*>(&size), sizeof size);
  key += tenant;
}

/// The tenant that a key begins with; without a name where it begins with none.
[[nodiscard]] inline std::string_view tenant_of(std::string_view key) noexcept {
  std::uint64_t size = 0;
  if (key.size() < sizeof size) return {};
  std::memcpy(&size, key.data(), sizeof size);
  key.remove_prefix(sizeof size);
  return size <= key.size() ? key.substr(0, size) : std::string_view{};
}

}  // namespace llmcache
