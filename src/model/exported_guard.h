// Conditions on the sizes of inputs that an exported program holds under, as torch.export writes them down:
//     L['attention_mask'].size()[1] == L['input_ids'].size()[1]
//     ((L['input_ids'].size()[0]*L['input_ids'].size()[1]) % L['input_ids'].size()[0]) == 0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace llmcache::exported {

/// A condition on the two sizes that all inputs have: batch (dimension 0) and tokens (dimension 1).
class ShapeGuard {
 public:
  /// None if it is about something else, or has a form that is not understood: whole numbers, sizes, + - * // % **,
  /// comparisons, and, or, not, min and max are.
  static std::optional<ShapeGuard> parse(std::string_view text);

  /// None where a number gets too large.
  [[nodiscard]] std::optional<bool> holds(std::int64_t batch, std::int64_t tokens) const;
  /// The whole numbers in it.
  [[nodiscard]] const std::vector<std::int64_t>& constants() const { return constants_; }

 private:
  friend class GuardParser;
  enum class Op : std::uint8_t {
    kConstant,
    kBatch,
    kTokens,
    kNegate,
    kAdd,
    kSubtract,
    kMultiply,
    kDivide,
    kModulo,
    kPower,
    kMin,
    kMax,
    kEqual,
    kNotEqual,
    kLess,
    kLessEqual,
    kGreater,
    kGreaterEqual,
    kNot,
    kAnd,
    kOr
  };
  struct Step {
    Op op;
    std::int64_t constant;
  };
  static std::optional<std::int64_t> apply(Op op, std::int64_t a, std::int64_t b);

  std::vector<Step> steps_;  ///< operands before their operator
  std::vector<std::int64_t> constants_;
};

}  // namespace llmcache::exported
