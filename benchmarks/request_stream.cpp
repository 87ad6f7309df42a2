#include "request_stream.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

namespace llmcache::bench {
namespace {

using Generator = std::mt19937_64;  // its sequence is fixed by the standard, unlike the distributions

/// Uniform in [0, bound).
std::uint64_t below(Generator& generator, std::uint64_t bound) {
  const std::uint64_t limit = std::numeric_limits<std::uint64_t>::max() / bound * bound;
  std::uint64_t value = generator();
  while (value >= limit) value = generator();
  return value % bound;
}

}  // namespace

std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  Generator generator(seed);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[below(generator, i)]);
  return order;
}

Stream make_stream(const TokenFile& file, const StreamOptions& options) {
  Stream stream{.requests = {}, .shuffle = options.shuffle};
  if (!stream.shuffle && file.grouped_by_label()) stream.shuffle = 0;

  std::int64_t asking = file.requests() - file.fill_requests;
  // The same requests in the order of the file and in another one, unless the file's order would choose among labels.
  if (options.limit && !file.grouped_by_label()) asking = std::min(asking, *options.limit);
  std::vector<std::int64_t> order(static_cast<std::size_t>(asking));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  if (stream.shuffle) order = shuffled(asking, *stream.shuffle);
  for (std::int64_t& request : order) request += file.fill_requests;

  if (options.limit && *options.limit < asking) order.resize(static_cast<std::size_t>(*options.limit));
  stream.requests = std::move(order);
  return stream;
}

}  // namespace llmcache::bench
