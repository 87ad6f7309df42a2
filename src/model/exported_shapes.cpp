#include "model/exported_shapes.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <limits>
#include <set>

#include "model/exported_guard.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
constexpr const char* kRecipe =
    "export with dynamic_shapes {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for each input, from an example of at least 2 rows "
    "and 2 tokens, and of unlike many rows and tokens";
constexpr std::array<const char*, 2> kDimensions{"batch", "tokens"};

/// "s53" of "Symbol('s53', positive=True, integer=True)"; empty for any other expression.
std::string symbol_of(const std::string& expression) {
  const std::string begin = "Symbol('";
  if (expression.compare(0, begin.size(), begin) != 0) return "";
  const std::size_t end = expression.find('\'', begin.size());
  if (end == std::string::npos) return "";
  const std::string rest = expression.substr(end + 1);
  const bool alone = rest.find('(') == std::string::npos && rest.find(')') == rest.size() - 1;
  return alone ? expression.substr(begin.size(), end - begin.size()) : "";
}

/// The symbol of one dimension of an input.
std::string dimension_symbol(const Json& size, const std::string& input, std::size_t dimension) {
  const auto [kind, content] = only_member(size, fmt::format("a size of '{}'", input));
  if (kind == "as_int") {
    throw Refused(fmt::format("its input '{}' has the fixed size {} in dimension {} ({}): {}", input,
                              shown(content.dump()), dimension, kDimensions[dimension], kRecipe));
  }
  const std::string& expression = text_field(content, "expr_str", fmt::format("a size of '{}'", input));
  const std::string symbol = symbol_of(expression);
  if (!symbol.empty()) return symbol;
  throw Refused(fmt::format("its input '{}' has the size {} in dimension {} ({}), which not every number is: {}", input,
                            shown(expression), dimension, kDimensions[dimension], kRecipe));
}

struct Symbols {
  std::array<std::set<std::string>, 2> of;  ///< batch, tokens
};

Symbols symbols_of(const Json& graph, const std::vector<std::string>& inputs) {
  const Json& tensors = object_field(graph, "tensor_values", "the graph");
  Symbols symbols;
  for (const std::string& input : inputs) {
    const Json& sizes = list_field(field(tensors, input.c_str(), "'tensor_values'"), "sizes", input);
    if (sizes.size() != 2) {
      throw Refused(fmt::format("its input '{}' has {} dimensions; the library takes tensors [batch, tokens] only",
                                input, sizes.size()));
    }
    for (std::size_t d = 0; d < 2; ++d) symbols.of[d].insert(dimension_symbol(sizes[d], input, d));
  }
  for (const std::string& symbol : symbols.of[0]) {
    if (symbols.of[1].count(symbol) == 0) continue;
    throw Refused(fmt::format("it takes as many rows as tokens only: {}", kRecipe));
  }
  return symbols;
}

/// The largest number of tokens by the ranges of the symbols.
std::int64_t limit_of_ranges(const Json& program, const Symbols& symbols) {
  const Json& ranges = object_field(program, "range_constraints", "the program");
  std::int64_t most = kAny;
  for (std::size_t d = 0; d < 2; ++d) {
    for (const std::string& symbol : symbols.of[d]) {
      const auto found = ranges.find(symbol);
      if (found == ranges.end()) continue;
      const Json& least = field(*found, "min_val", "a range");
      const Json& largest = field(*found, "max_val", "a range");
      if (!least.is_null() && whole_of(least, "a range") > 2) {
        throw Refused(fmt::format("it was exported for {} {} or more only: {}", whole_of(least, "a range"),
                                  d == 0 ? "rows" : "tokens", kRecipe));
      }
      if (largest.is_null()) continue;
      if (d == 0) {
        throw Refused(
            fmt::format("it was exported for batches of at most {} rows: {}", whole_of(largest, "a range"), kRecipe));
      }
      most = std::min(most, whole_of(largest, "a range"));
    }
  }
  if (most < 2) throw Refused(fmt::format("it was exported for {} token only: {}", most, kRecipe));
  return most;
}

/// Numbers of rows or tokens at which a guard may begin to fail: small ones, and those around its constants.
std::set<std::int64_t> trials(const std::vector<std::int64_t>& constants, std::int64_t dense) {
  std::set<std::int64_t> numbers;
  for (std::int64_t n = 2; n <= dense; ++n) numbers.insert(n);
  for (std::int64_t n = dense; n <= std::int64_t{1} << 20; n *= 2) numbers.insert(n);
  for (const std::int64_t constant : constants) {
    for (const std::int64_t n : {constant - 1, constant, constant + 1}) {
      if (n >= 2 && n < std::int64_t{1} << 31) numbers.insert(n);
    }
  }
  return numbers;
}

/// Does it hold? What gets too large to say is far beyond what anybody asks for.
bool holds_at(const ShapeGuard& guard, std::int64_t rows, std::int64_t tokens) {
  return guard.holds(rows, tokens).value_or(true);
}

/// The largest number of tokens up to which the guard holds for all batches. Between two numbers that are tried and at
/// which it holds, it is taken to hold.
std::int64_t limit_of_guard(const std::string& text) {
  const auto guard = ShapeGuard::parse(text);
  constexpr std::size_t kMostConstants = 64;
  if (!guard || guard->constants().size() > kMostConstants) {
    throw Refused(
        fmt::format("it holds only where {}, which is a guard that the library does not understand: change "
                    "forward() so that it does not depend on this, or {}",
                    shown(text), kRecipe));
  }
  std::int64_t most = kAny;
  for (const std::int64_t rows : trials(guard->constants(), 5)) {
    std::int64_t last = 0;
    for (const std::int64_t tokens : trials(guard->constants(), 24)) {
      if (tokens > most) break;
      if (holds_at(*guard, rows, tokens)) {
        last = tokens;
        continue;
      }
      if (last == 0) {
        throw Refused(fmt::format("it does not hold for {} rows of {} tokens, by its guard {}: {}", rows, tokens,
                                  shown(text), kRecipe));
      }
      std::int64_t fails = tokens;
      while (fails - last > 1) {
        const std::int64_t middle = last + (fails - last) / 2;
        (holds_at(*guard, rows, middle) ? last : fails) = middle;
      }
      most = last;
    }
  }
  return most;
}

}  // namespace

std::int64_t token_range(const Json& program, const Json& graph, const std::vector<std::string>& inputs) {
  if (inputs.empty()) throw Refused("it takes no input");
  std::int64_t most = limit_of_ranges(program, symbols_of(graph, inputs));
  const auto guards = program.find("guards_code");  // earlier minor versions have none
  if (guards != program.end()) {
    for (const Json& guard : list_field(program, "guards_code", "the program")) {
      most = std::min(most, limit_of_guard(text_of(guard, "'guards_code'")));
    }
  }
  return most == kAny ? 0 : most;
}

}  // namespace llmcache::exported
