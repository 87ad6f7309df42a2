#include "store/tier_value.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <cstring>

#include "store/byte_io.h"

namespace llmcache {
namespace {

constexpr std::string_view kTierMark = "LLMCTIER";
constexpr std::uint32_t kTierVersion = 1;
constexpr std::size_t kNameDigits = 16;  // of model and tenant in a key
/// Mark, version, domain, bytes of key and of entry, check; the key stands behind it.
constexpr std::size_t kTierHeadBytes = 40;

char letter_of(TierDomain domain) {
  switch (domain) {
    case TierDomain::kOutput:
      return 'o';
    case TierDomain::kPrefixBlock:
      return 'p';
    case TierDomain::kSource:
      return 's';
  }
  return '?';
}

/// Of all but itself.
std::uint64_t tier_check(TierDomain domain, std::string_view key, std::string_view entry) {
  const std::uint64_t seed = XXH3_64bits_withSeed(key.data(), key.size(), static_cast<std::uint64_t>(domain));
  return XXH3_64bits_withSeed(entry.data(), entry.size(), seed);
}

Digest start_of(TierDomain domain, std::string_view model, std::string_view layout, std::string_view tenant,
                std::string_view secret) {
  Digest digest(secret);
  digest.add("llmcache entry");
  const auto number = static_cast<std::uint32_t>(domain);
  digest.add(&number, sizeof(number));
  digest.add(model);
  digest.add(layout);
  digest.add(tenant);
  return digest;
}

}  // namespace

TierKeys::TierKeys(TierDomain domain, std::string_view model, std::string_view layout, std::string_view tenant,
                   std::string_view secret)
    : start_(start_of(domain, model, layout, tenant, secret)), digest_(start_), letter_(letter_of(domain)) {
  Digest name(secret);
  name.add("llmcache tenant");
  name.add(tenant);
  prefix_ = fmt::format("llmcache1:{}:{}:", model.substr(0, kNameDigits), name.hex().substr(0, kNameDigits));
}

void TierKeys::begin(std::string_view partition) {
  digest_ = start_;
  digest_.add(partition);
}

std::string TierKeys::next(std::string_view partition) {
  digest_.add(partition);
  return key();
}

std::string TierKeys::next(const std::int64_t* tokens, std::size_t count) {
  digest_.add({reinterpret_cast<const char*>(tokens), count * sizeof(std::int64_t)});
  return key();
}

std::string TierKeys::key() const { return fmt::format("{}{}:{}", prefix_, letter_, digest_.hex()); }

std::string begin_tier_value(std::string_view key) { return std::string(kTierHeadBytes, '\0').append(key); }

void finish_tier_value(std::string& value, TierDomain domain, std::string_view key) {
  const std::string_view entry = std::string_view(value).substr(kTierHeadBytes + key.size());
  ByteWriter head;
  for (const char c : kTierMark) head.number(c);
  head.number(kTierVersion);
  head.number(static_cast<std::uint32_t>(domain));
  head.number<std::uint64_t>(key.size());
  head.number<std::uint64_t>(entry.size());
  head.number(tier_check(domain, key, entry));
  std::memcpy(value.data(), head.bytes().data(), kTierHeadBytes);
}

std::string_view entry_of_tier_value(std::string_view value, TierDomain domain, std::string_view key) {
  ByteReader reader(value);
  if (reader.take(kTierMark.size()) != kTierMark) throw DamagedData("it is no value of a cache");
  if (reader.number<std::uint32_t>() != kTierVersion) throw DamagedData("it is of another version");
  if (reader.number<std::uint32_t>() != static_cast<std::uint32_t>(domain)) throw DamagedData("it is of another kind");
  const auto key_bytes = reader.number<std::uint64_t>();
  const auto entry_bytes = reader.number<std::uint64_t>();
  const auto check = reader.number<std::uint64_t>();
  if (reader.take(key_bytes) != key) throw DamagedData("it belongs to another key");
  const std::string_view entry = reader.take(entry_bytes);
  reader.finish();
  if (tier_check(domain, key, entry) != check) throw DamagedData("its checksum is wrong");
  return entry;
}

}  // namespace llmcache
