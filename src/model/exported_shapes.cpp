#include "model/exported_shapes.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <utility>

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
  const std::string& expression = JsonObject(content, fmt::format("a size of '{}'", input)).text("expr_str");
  const std::string symbol = symbol_of(expression);
  if (!symbol.empty()) return symbol;
  throw Refused(fmt::format("its input '{}' has the size {} in dimension {} ({}), which not every number is: {}", input,
                            shown(expression), dimension, kDimensions[dimension], kRecipe));
}

/// Throws Refused, with what guard stands in the way.
[[noreturn]] void refuse_guard(const std::string& text, const std::string& why) {
  throw Refused(
      fmt::format("it holds only where {}, which is a guard that {}: change forward() so that it does not "
                  "depend on this, or {}",
                  shown(text), why, kRecipe));
}

/// How much work all guards of a program may be: a second, and some hundred times what those of a model are.
class GuardBudget {
 public:
  void spend(const ShapeGuard& guard, const std::string& text) {
    const std::size_t work = guard.steps() + kEach;
    if (work > left_) refuse_guard(text, "would take too long to look at, with those before it");
    left_ -= work;
  }

 private:
  static constexpr std::size_t kEach = 8;
  std::size_t left_ = std::size_t{1} << 23;
};

/// Numbers of rows or tokens at which a guard may begin to fail: small ones, and those around its constants.
std::set<std::int64_t> trials(const std::vector<std::int64_t>& constants, std::int64_t dense) {
  std::set<std::int64_t> numbers;
  for (std::int64_t n = 1; n <= dense; ++n) numbers.insert(n);
  for (std::int64_t n = dense; n <= std::int64_t{1} << 20; n *= 2) numbers.insert(n);
  for (const std::int64_t constant : constants) {
    if (constant < 0 || constant >= std::int64_t{1} << 31) continue;
    for (const std::int64_t n : {constant - 1, constant, constant + 1}) {
      if (n >= 1) numbers.insert(n);
    }
  }
  return numbers;
}

/// A guard while it is tried.
struct TriedGuard {
  const ShapeGuard& guard;
  const std::string& text;
  GuardBudget& budget;

  /// Numbers that only get too large for sizes which nobody asks for count as holding there.
  [[nodiscard]] bool holds(std::int64_t rows, std::int64_t tokens) const {
    constexpr std::int64_t kAsked = std::int64_t{1} << 14;
    budget.spend(guard, text);
    const auto verdict = guard.verdict(rows, tokens);
    return verdict == ShapeGuard::Verdict::kHolds ||
           (verdict == ShapeGuard::Verdict::kTooLarge && std::max(rows, tokens) > kAsked);
  }
};

/// The largest number of tokens up to which the guard holds for all batches. Between two numbers that are tried and at
/// which it holds, it is taken to hold.
std::int64_t limit_of_guard(const TriedGuard& tried) {
  const auto& constants = tried.guard.constants();
  std::int64_t most = kAny;
  for (const std::int64_t rows : trials(constants, 5)) {
    std::int64_t last = 0;
    for (const std::int64_t tokens : trials(constants, 24)) {
      if (tokens > most) break;
      if (tried.holds(rows, tokens)) {
        last = tokens;
        continue;
      }
      if (last < 2) {
        throw Refused(fmt::format("it does not hold for {} rows of {} tokens, by its guard {}: {}", rows, tokens,
                                  shown(tried.text), kRecipe));
      }
      std::int64_t fails = tokens;
      while (fails - last > 1) {
        const std::int64_t middle = last + (fails - last) / 2;
        (tried.holds(rows, middle) ? last : fails) = middle;
      }
      most = last;
    }
  }
  return most;
}

/// Finds for which sizes a program holds, input by input.
class RangeFinder {
 public:
  RangeFinder(const Json& program, const Json& graph, const std::vector<std::string>& inputs)
      : program_(program), inputs_(inputs), found_(inputs.size()) {
    read_symbols(JsonObject(graph, "the graph").at("tensor_values"));
  }

  std::vector<TokenRange> find() {
    read_guards();
    for (const ReadGuard& read : guards_) {
      for (const std::string& name : read.guard.token_inputs()) {
        merge(place_of_input(read.guard.token_inputs()[0], read.text), place_of_input(name, read.text));
      }
    }
    for (const std::string& symbol : rows_) (void)largest_of(symbol, true);
    std::vector<std::int64_t> most(inputs_.size(), kAny);  // by group
    const auto bound = [&](std::size_t input, std::int64_t limit) {
      most[found_[input].group] = std::min(most[found_[input].group], limit);
    };
    for (std::size_t i = 0; i < inputs_.size(); ++i) bound(i, largest_of(tokens_[i], false));
    for (const ReadGuard& read : guards_) {
      const std::int64_t limit = limit_of_guard({read.guard, read.text, budget_});
      const auto& names = read.guard.token_inputs();
      if (!names.empty()) bound(place_of_input(names[0], read.text), limit);
    }
    for (TokenRange& range : found_) range.most = most[range.group] == kAny ? 0 : most[range.group];
    return std::move(found_);
  }

 private:
  struct ReadGuard {
    ShapeGuard guard;
    std::string text;
  };

  void read_symbols(const Json& tensors) {
    constexpr std::size_t kMostInputs = 64;
    if (inputs_.size() > kMostInputs) {
      throw Refused(fmt::format("it takes {} inputs; the library takes at most {}", inputs_.size(), kMostInputs));
    }
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const std::string& input = inputs_[i];
      const Json& tensor = JsonObject(tensors, "'tensor_values'").at(input.c_str());
      check_type(tensor, input);
      const Json& sizes = JsonObject(tensor, input).list("sizes");
      if (sizes.size() != 2) {
        throw Refused(fmt::format("its input '{}' has {} dimensions; the library takes tensors [batch, tokens] only",
                                  input, sizes.size()));
      }
      rows_.insert(dimension_symbol(sizes[0], input, 0));
      tokens_.push_back(dimension_symbol(sizes[1], input, 1));
      found_[i].group =
          static_cast<std::size_t>(std::find(tokens_.begin(), tokens_.end(), tokens_[i]) - tokens_.begin());
    }
    for (const std::string& symbol : tokens_) {
      if (rows_.count(symbol) > 0) throw Refused(fmt::format("it takes as many rows as tokens only: {}", kRecipe));
    }
  }

  /// What depends on the type was settled when the program was exported.
  static void check_type(const Json& tensor, const std::string& input) {
    constexpr std::int64_t kLong = 5;
    const std::int64_t type = JsonObject(tensor, input).whole("dtype");
    if (type == kLong) return;
    throw Refused(
        fmt::format("its input '{}' has numbers of the type {} of torch's ScalarType; the library takes "
                    "int64 ({}) only: export from an example of such tensors, and convert them in forward()",
                    input, type, kLong));
  }

  void read_guards() {
    if (program_.find("guards_code") == program_.end()) return;  // earlier minor versions have none
    for (const Json& code : JsonObject(program_, "the program").list("guards_code")) {
      const std::string& text = text_of(code, "'guards_code'");
      auto guard = ShapeGuard::parse(text);
      constexpr std::size_t kMostConstants = 64;
      if (!guard || guard->constants().size() > kMostConstants) refuse_guard(text, "the library does not understand");
      for (const std::string& input : guard->batch_inputs()) (void)place_of_input(input, text);
      guards_.push_back({std::move(*guard), text});
    }
  }

  std::size_t place_of_input(const std::string& name, const std::string& guard) const {
    const auto found = std::find(inputs_.begin(), inputs_.end(), name);
    if (found == inputs_.end()) refuse_guard(guard, "is about something else than its inputs");
    return static_cast<std::size_t>(found - inputs_.begin());
  }

  /// A guard is about the tokens of both: whatever it says of them, it is looked at for equally many only.
  void merge(std::size_t a, std::size_t b) {
    const auto [kept, gone] = std::minmax({found_[a].group, found_[b].group});
    for (TokenRange& range : found_) {
      if (range.group == gone) range.group = kept;
    }
  }

  /// The largest size that a symbol stands for, by its range.
  std::int64_t largest_of(const std::string& symbol, bool of_rows) const {
    const JsonObject ranges = JsonObject(program_, "the program").object("range_constraints");
    if (!ranges.has(symbol.c_str())) return kAny;
    const JsonObject range = ranges.object(symbol.c_str());
    const Json& least = range.at("min_val");
    const Json& largest = range.at("max_val");
    const char* what = of_rows ? "rows" : "tokens";
    // 2 is what torch.export writes for any example of 2 or more.
    if (!least.is_null() && whole_of(least, "a range") > 2) {
      throw Refused(
          fmt::format("it was exported for {} {} or more only: {}", whole_of(least, "a range"), what, kRecipe));
    }
    if (largest.is_null()) return kAny;
    const std::int64_t most = whole_of(largest, "a range");
    if (of_rows) throw Refused(fmt::format("it was exported for batches of at most {} rows: {}", most, kRecipe));
    if (most < 2) throw Refused(fmt::format("it was exported for {} token only: {}", most, kRecipe));
    return most;
  }

  const Json& program_;
  const std::vector<std::string>& inputs_;
  std::set<std::string> rows_;       ///< symbols of the batch
  std::vector<std::string> tokens_;  ///< symbol of the tokens, by input
  std::vector<ReadGuard> guards_;
  std::vector<TokenRange> found_;
  GuardBudget budget_;
};

}  // namespace

std::vector<TokenRange> token_ranges(const Json& program, const Json& graph, const std::vector<std::string>& inputs) {
  if (inputs.empty()) throw Refused("it takes no input");
  return RangeFinder(program, graph, inputs).find();
}

}  // namespace llmcache::exported
