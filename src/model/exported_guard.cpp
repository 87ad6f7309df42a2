#include "model/exported_guard.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <initializer_list>
#include <utility>

namespace llmcache::exported {

/// Recursive descent along Python's precedences. Each rule tells whether what comes next is one.
class GuardParser {
 public:
  explicit GuardParser(std::string_view text) : text_(text) {}

  std::optional<ShapeGuard> parse() {
    if (text_.size() > kMostCharacters || !disjunction() || !at_end()) return std::nullopt;
    return std::move(guard_);
  }

 private:
  using Op = ShapeGuard::Op;
  using Rule = bool (GuardParser::*)();
  using Operators = std::initializer_list<std::pair<std::string_view, Op>>;
  static constexpr std::size_t kMostCharacters = 4096;
  static constexpr int kMostDepth = 64;

  bool disjunction() { return chain(&GuardParser::conjunction, {{"or ", Op::kOr}}); }
  bool conjunction() { return chain(&GuardParser::negation, {{"and ", Op::kAnd}}); }

  bool negation() {
    if (!take("not ")) return comparison();
    const Depth here(*this);
    return here.bearable() && negation() && emit(Op::kNot);
  }

  bool comparison() {
    if (!sum()) return false;
    const auto op = take_one({{"==", Op::kEqual},
                              {"!=", Op::kNotEqual},
                              {"<=", Op::kLessEqual},
                              {">=", Op::kGreaterEqual},
                              {"<", Op::kLess},
                              {">", Op::kGreater}});
    return !op || (sum() && emit(*op));
  }

  bool sum() { return chain(&GuardParser::product, {{"+", Op::kAdd}, {"-", Op::kSubtract}}); }

  bool product() {
    if (!unary()) return false;
    for (;;) {
      if (ahead("**")) return false;  // power() has taken those that bind
      const auto op = take_one({{"*", Op::kMultiply}, {"//", Op::kDivide}, {"%", Op::kModulo}});
      if (!op) return true;
      if (!unary() || !emit(*op)) return false;
    }
  }

  bool unary() {
    const Depth here(*this);
    if (!here.bearable()) return false;
    if (take("-")) return unary() && emit(Op::kNegate);
    if (!atom()) return false;
    return !take("**") || (unary() && emit(Op::kPower));
  }

  bool atom() {
    if (take("(")) return disjunction() && take(")");
    if (take("min(")) return two_arguments(Op::kMin);
    if (take("max(")) return two_arguments(Op::kMax);
    return take("L['") ? size() : number();
  }

  bool two_arguments(Op op) { return disjunction() && take(",") && disjunction() && take(")") && emit(op); }

  /// Behind "L['": input_ids'].size()[1]
  bool size() {
    const std::size_t end = text_.find('\'', at_);
    if (end == std::string_view::npos) return false;
    const std::string_view input = text_.substr(at_, end - at_);
    at_ = end;
    if (!take("'].size()[")) return false;
    if (take("0]")) return add_once(guard_.batch_inputs_, input) && emit(Op::kBatch);
    return take("1]") && add_once(guard_.token_inputs_, input) && emit(Op::kTokens);
  }

  static bool add_once(std::vector<std::string>& inputs, std::string_view input) {
    if (std::find(inputs.begin(), inputs.end(), input) == inputs.end()) inputs.emplace_back(input);
    return true;
  }

  bool number() {
    skip_spaces();
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (error != std::errc() || text_[at_] == '-') return false;
    at_ = static_cast<std::size_t>(end - text_.data());
    guard_.constants_.push_back(value);
    guard_.steps_.push_back({Op::kConstant, value});
    return true;
  }

  bool chain(Rule operand, Operators operators) {
    if (!(this->*operand)()) return false;
    while (const auto op = take_one(operators)) {
      if (!(this->*operand)() || !emit(*op)) return false;
    }
    return true;
  }

  std::optional<Op> take_one(Operators operators) {
    for (const auto& [sign, op] : operators) {
      if (take(sign)) return op;
    }
    return std::nullopt;
  }

  void skip_spaces() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool at_end() {
    skip_spaces();
    return at_ == text_.size();
  }
  bool ahead(std::string_view sign) {
    skip_spaces();
    return text_.substr(at_, sign.size()) == sign;
  }
  bool take(std::string_view sign) {
    if (!ahead(sign)) return false;
    at_ += sign.size();
    return true;
  }
  bool emit(Op op) {
    guard_.steps_.push_back({op, 0});
    return true;
  }

  struct Depth {
    explicit Depth(GuardParser& owner) : parser(owner) { ++parser.depth_; }
    ~Depth() { --parser.depth_; }
    Depth(const Depth&) = delete;
    Depth& operator=(const Depth&) = delete;
    [[nodiscard]] bool bearable() const { return parser.depth_ <= kMostDepth; }
    GuardParser& parser;
  };

  std::string_view text_;
  std::size_t at_ = 0;
  int depth_ = 0;
  ShapeGuard guard_;
};

std::optional<ShapeGuard> ShapeGuard::parse(std::string_view text) { return GuardParser(text).parse(); }

namespace {

using Verdict = ShapeGuard::Verdict;

/// Whether a calculation of sizes came to a number.
Verdict unless_overflown(bool overflown) { return overflown ? Verdict::kTooLarge : Verdict::kHolds; }

Verdict power(std::int64_t base, std::int64_t exponent, std::int64_t& result) {
  if (exponent < 0) return Verdict::kUndefined;
  constexpr std::int64_t kBits = 64;  // beyond, nothing but the signs of -1, 0 and 1 fits
  if (exponent > kBits) exponent = kBits + exponent % 2;
  result = 1;
  for (std::int64_t i = 0; i < exponent; ++i) {
    if (__builtin_mul_overflow(result, base, &result)) return Verdict::kTooLarge;
  }
  return Verdict::kHolds;
}

/// As Python rounds: down.
Verdict floor_divide(std::int64_t a, std::int64_t b, std::int64_t& result) {
  if (b == 0) return Verdict::kUndefined;
  if (b == -1) return unless_overflown(__builtin_sub_overflow(std::int64_t{0}, a, &result));
  result = a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
  return Verdict::kHolds;
}

/// As Python has it: what is left has the sign of `b`.
Verdict modulo(std::int64_t a, std::int64_t b, std::int64_t& result) {
  if (b == 0) return Verdict::kUndefined;
  result = b == -1 ? 0 : a % b;
  if (result != 0 && (result < 0) != (b < 0)) result += b;
  return Verdict::kHolds;
}

}  // namespace

ShapeGuard::Verdict ShapeGuard::apply(Op op, std::int64_t a, std::int64_t b, std::int64_t& result) {
  switch (op) {
    case Op::kAdd:
      return unless_overflown(__builtin_add_overflow(a, b, &result));
    case Op::kSubtract:
      return unless_overflown(__builtin_sub_overflow(a, b, &result));
    case Op::kMultiply:
      return unless_overflown(__builtin_mul_overflow(a, b, &result));
    case Op::kNegate:
      return unless_overflown(__builtin_sub_overflow(std::int64_t{0}, a, &result));
    case Op::kDivide:
      return floor_divide(a, b, result);
    case Op::kModulo:
      return modulo(a, b, result);
    case Op::kPower:
      return power(a, b, result);
    case Op::kMin:
      result = std::min(a, b);
      break;
    case Op::kMax:
      result = std::max(a, b);
      break;
    case Op::kEqual:
      result = a == b;
      break;
    case Op::kNotEqual:
      result = a != b;
      break;
    case Op::kLess:
      result = a < b;
      break;
    case Op::kLessEqual:
      result = a <= b;
      break;
    case Op::kGreater:
      result = a > b;
      break;
    case Op::kGreaterEqual:
      result = a >= b;
      break;
    case Op::kNot:
      result = a == 0;
      break;
    case Op::kAnd:
      result = a != 0 && b != 0;
      break;
    case Op::kOr:
      result = a != 0 || b != 0;
      break;
    default:
      return Verdict::kUndefined;
  }
  return Verdict::kHolds;
}

ShapeGuard::Verdict ShapeGuard::verdict(std::int64_t batch, std::int64_t tokens) const {
  std::vector<std::int64_t> stack;
  for (const auto& [op, constant] : steps_) {
    if (op == Op::kConstant || op == Op::kBatch || op == Op::kTokens) {
      stack.push_back(op == Op::kConstant ? constant : op == Op::kBatch ? batch : tokens);
      continue;
    }
    const std::int64_t right = stack.back();
    if (op != Op::kNegate && op != Op::kNot) stack.pop_back();
    const std::int64_t left = stack.back();
    const Verdict made = apply(op, left, right, stack.back());
    if (made != Verdict::kHolds) return made;
  }
  return stack.back() != 0 ? Verdict::kHolds : Verdict::kFails;
}

}  // namespace llmcache::exported
