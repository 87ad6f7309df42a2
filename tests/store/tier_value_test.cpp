// Keys and values of stores: whose they are, and that nothing else passes for them.
#include "store/tier_value.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/error.h>
#include <llmcache/store/state_store.h>
#include <llmcache/store/store_options.h>

#include <array>
#include <set>

#include "store/damaged_data.h"

namespace llmcache::test {
namespace {

const std::string kModel(64, 'a');
constexpr std::array<std::int64_t, 3> kTokens = {1, 2, 3};

std::string key_of(TierDomain domain, const std::string& model, const std::string& layout, const std::string& tenant,
                   const std::string& secret, const std::string& partition = "p", std::size_t tokens = 3) {
  TierKeys keys(domain, model, layout, tenant, secret);
  keys.begin(partition);
  return keys.next(kTokens.data(), tokens);
}

TEST(TierKeys, AreOthersForWhateverIsOther) {
  const std::string secret(16, 's');
  std::string other_model = kModel;
  other_model.back() = 'b';
  const std::set<std::string> keys = {
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "tenant", ""),
      key_of(TierDomain::kOutput, kModel, "layout", "tenant", ""),
      key_of(TierDomain::kPrefixBlock, other_model, "layout", "tenant", ""),
      key_of(TierDomain::kPrefixBlock, kModel, "other", "tenant", ""),
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "other", ""),
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "tenant", secret),
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "tenant", secret + "t"),
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "tenant", "", "q"),
      key_of(TierDomain::kPrefixBlock, kModel, "layout", "tenant", "", "p", 2),
  };
  EXPECT_EQ(keys.size(), 9U);
  for (const std::string& key : keys) EXPECT_NO_THROW(check_store_key(key));
  EXPECT_EQ(key_of(TierDomain::kOutput, kModel, "layout", "tenant", secret),
            key_of(TierDomain::kOutput, kModel, "layout", "tenant", secret));
}

TEST(TierKeys, OfABlockDependOnAllBeforeIt) {
  const auto second_of = [](std::int64_t first) {
    TierKeys keys(TierDomain::kPrefixBlock, kModel, "layout", "", "");
    keys.begin("p");
    const std::int64_t second = 7;
    static_cast<void>(keys.next(&first, 1));
    return keys.next(&second, 1);
  };
  EXPECT_EQ(second_of(1), second_of(1));
  EXPECT_NE(second_of(1), second_of(2));
}

TEST(TierKeys, HaveTheTenantsPrefix) {
  TierKeys keys(TierDomain::kOutput, kModel, "layout", "tenant", "");
  keys.begin("p");
  EXPECT_TRUE(keys.next("row").starts_with(keys.prefix()));
  const TierKeys other(TierDomain::kOutput, kModel, "layout", "other", "");
  EXPECT_NE(keys.prefix(), other.prefix());
  const TierKeys secret(TierDomain::kOutput, kModel, "layout", "tenant", std::string(16, 's'));
  EXPECT_NE(keys.prefix(), secret.prefix()) << "who does not know the secret cannot tell whose entries these are";
}

TEST(TierValue, GivesTheEntry) {
  std::string value = begin_tier_value("key");
  value += "entry";
  finish_tier_value(value, TierDomain::kOutput, "key");
  EXPECT_EQ(entry_of_tier_value(value, TierDomain::kOutput, "key"), "entry");
  EXPECT_THROW(entry_of_tier_value(value, TierDomain::kPrefixBlock, "key"), DamagedData);
  EXPECT_THROW(entry_of_tier_value(value, TierDomain::kOutput, "kez"), DamagedData);
}

TEST(TierValue, FindsDamageAtEveryByte) {
  std::string value = begin_tier_value("key");
  value += "an entry";
  finish_tier_value(value, TierDomain::kPrefixBlock, "key");
  for (std::size_t at = 0; at < value.size(); ++at) {
    for (const int flip : {1, 0x80}) {
      std::string damaged = value;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      EXPECT_THROW(entry_of_tier_value(damaged, TierDomain::kPrefixBlock, "key"), DamagedData) << at;
    }
  }
  for (std::size_t size = 0; size < value.size(); ++size) {
    EXPECT_THROW(entry_of_tier_value(value.substr(0, size), TierDomain::kPrefixBlock, "key"), DamagedData) << size;
  }
  EXPECT_THROW(entry_of_tier_value(value + "x", TierDomain::kPrefixBlock, "key"), DamagedData);
}

TEST(StoreOptions, SayWhatIsWrong) {
  const auto refused = [](const StoreOptions& options, const std::string& field) {
    try {
      options.validate();
      FAIL() << field;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidOptions);
      EXPECT_THAT(error.what(), ::testing::HasSubstr(field));
    }
  };
  refused({.deadline_ms = 0}, "deadline_ms");
  refused({.block_tokens = 0}, "block_tokens");
  refused({.block_tokens = 5000}, "block_tokens");
  refused({.write_deadline_ms = -1}, "write_deadline_ms");
  refused({.tenant_secrets = {{"a", "short"}}}, "tenant_secrets");
  refused({.tenant_secrets = {{"a", std::string(65, 's')}}}, "tenant_secrets");
  EXPECT_NO_THROW(StoreOptions{}.validate());
}

}  // namespace
}  // namespace llmcache::test
