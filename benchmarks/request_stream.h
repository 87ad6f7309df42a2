// In which order the requests of a token file are sent.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "token_file.h"

namespace llmcache::bench {

struct StreamOptions {
  std::optional<std::uint64_t> shuffle = {};  ///< seed; unset: the order of the file
  std::optional<std::int64_t> limit = {};     ///< number of requests; unset: as many as the file has that ask
};

struct Stream {
  std::vector<std::int64_t> requests;    ///< numbers of requests of the file, in sending order
  std::optional<std::uint64_t> shuffle;  ///< seed that was used; set also where the file demanded it
};

/// Only requests that ask are sent: those behind the file's fill part. With `limit` and `shuffle` it is the first
/// requests of the file that are shuffled. A file that is grouped by label is shuffled even if nobody asked, with seed
/// 0, and as a whole.
Stream make_stream(const TokenFile& file, const StreamOptions& options);

/// 0 .. count-1 in an order that depends on the seed only.
std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed);

}  // namespace llmcache::bench
