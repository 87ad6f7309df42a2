#include <algorithm>
#include <numeric>

#include "check.h"
#include "failure.h"
#include "token_file.h"

namespace llmcache::fuzz {
namespace {

using bench::TokenFile;

/// Looks at every token by way of its request.
void walk(const TokenFile& file) {
  std::size_t tokens = 0;
  for (std::int64_t r = 0; r < file.requests(); ++r) {
    for (const auto row : file.request(r, 1 << 30)) {
      tokens += row.size();
      require(std::all_of(row.begin(), row.end(), [](auto id) { return id >= 0; }), "negative id");
    }
    for (const auto& row : file.marks(r, 8)) {
      const auto mark = [](auto value) { return value == 0 || value == 1; };
      require(std::all_of(row.pool.begin(), row.pool.end(), mark), "mark not 0 or 1");
      require(row.second_text < static_cast<std::int64_t>(1 << 30), "a second text that begins nowhere");
    }
    if (!file.passage.empty()) {
      const auto range = file.passage[static_cast<std::size_t>(file.first_sequence(r))];
      require(file.text(file.first_sequence(r), range).size() <= file.token_text.size(), "text outside of all texts");
      require(file.gold_answers(r).empty() || file.gold_answers(r).back() == '\n', "a gold answer without its end");
    }
    require(file.first_request_from(file.first_sequence(r)) == r, "a request is not where it begins");
  }
  require(tokens == file.tokens.size(), "tokens outside all requests");
  require(file.fill_requests >= 0 && file.fill_requests < std::max<std::int64_t>(1, file.requests()),
          "nothing is asked");
  for (std::size_t s = 0; s < file.scored.size(); ++s) {
    require(file.scored[s].end <= static_cast<std::int64_t>(file.sequence(static_cast<std::int64_t>(s)).size()),
            "scored tokens behind the end");
  }
}

}  // namespace

void check_token_file(std::string_view bytes) {
  try {
    const TokenFile file = bench::parse_token_file(bytes, "file");
    walk(file);
    bench::check_vocabulary(file, std::int64_t{1} << 31, "file");
    walk(bench::in_batches_of(file, 2));
  } catch (const bench::Failure&) {
  }
}

}  // namespace llmcache::fuzz
