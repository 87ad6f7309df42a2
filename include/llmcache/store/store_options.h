// Which store a cache looks into beyond its own memory, and how patiently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace llmcache {

class StateStore;

/// Settings of the tiers below a cache's memory. Kept there: keys and values of prefixes of causal models, in blocks,
/// whole outputs, and what follows from sources of encoder-decoders. docs/operations.md says what that costs and what
/// happens where a store fails.
struct StoreOptions {
  /// Where to look, and to write; several in order: TieredStore. Caches may share one. Null (default): nowhere.
  std::shared_ptr<StateStore> store = {};

  /// The longest that one call of the store may keep a request waiting, milliseconds. A store that does not answer by
  /// then is left alone for a while (its circuit breaker), so that a failure costs this once. Above 0. Default 20.
  double deadline_ms = 20;

  /// True: a request asks the store only where fetching is expected to be faster than computing, by how long both took
  /// before, and how often the store had what it was asked for. False: always, which spares the processor work though
  /// it may take longer. Default: true.
  bool only_if_faster = true;

  /// Tokens of a prefix under one key: all of them are fetched and written together, and the rest of a sequence that
  /// fills no block is not kept. 1 to 4096; caches that are to find each other's blocks need the same number. Default
  /// 64: for GPT-2 values of 4.9 MB.
  std::int64_t block_tokens = 64;

  /// Bytes of values that may wait for being written. Writing is done behind the answers by a thread of the cache; what
  /// is more is dropped, and counted. Default 256 MiB.
  std::size_t max_pending_write_bytes = std::size_t{256} << 20;

  /// The longest that writing one value may take, milliseconds; nobody waits for it. Above 0. Default 1,000.
  double write_deadline_ms = 1'000;

  /// By tenant (RequestOptions::tenant), 16 to 64 bytes that nobody else knows. The keys of such a tenant cannot be
  /// told without them: equal texts of two tenants have unrelated keys. Tenants that are not named have keys that
  /// whoever knows text and model can compute.
  std::map<std::string, std::string> tenant_secrets = {};

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

}  // namespace llmcache
