// Keys and values in stores below the memory, without LibTorch. docs/store-format.md has every byte.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "store/digest.h"

namespace llmcache {

/// What a value holds. Numbers and letters are part of the format.
enum class TierDomain : std::uint32_t {
  kOutput = 1,       ///< the whole output of a row
  kPrefixBlock = 2,  ///< keys and values of a block of tokens, and what goes before it decides its key
  kSource = 3,       ///< what follows from the source of an encoder-decoder's row
};

/// Makes the keys of one tenant's entries of one domain. Not thread-safe; cheap to copy.
class TierKeys {
 public:
  /// `model`: digest of a ModelIdentity. `layout`: what entries hold. `secret`: of the tenant; empty: it has none.
  TierKeys(TierDomain domain, std::string_view model, std::string_view layout, std::string_view tenant,
           std::string_view secret);

  /// The key of an entry that is told from others of its kind by these bytes, with those of all calls before.
  std::string next(std::string_view partition);
  std::string next(const std::int64_t* tokens, std::size_t count);
  /// Begins anew, with what all entries of a sequence have in common.
  void begin(std::string_view partition);

  /// All keys of this model's entries of this tenant begin like this.
  [[nodiscard]] const std::string& prefix() const noexcept { return prefix_; }

 private:
  [[nodiscard]] std::string key() const;

  const Digest start_;
  Digest digest_;
  std::string prefix_;
  char letter_;
};

/// What stands in front of an entry in its value. To write one: the header's bytes, the entry behind them, then
/// finish_tier_value().
std::string begin_tier_value(std::string_view key);
void finish_tier_value(std::string& value, TierDomain domain, std::string_view key);
/// The entry in a value, which refers to it. Throws DamagedData unless it is that of this key, whole and undamaged.
std::string_view entry_of_tier_value(std::string_view value, TierDomain domain, std::string_view key);

}  // namespace llmcache
