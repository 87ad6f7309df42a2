// Conditions on the sizes of inputs that an exported program holds under, as torch.export writes them down:
//     L['attention_mask'].size()[1] == L['input_ids'].size()[1]
//     ((L['input_ids'].size()[0]*L['input_ids'].size()[1]) % L['input_ids'].size()[0]) == 0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache::exported {

/// A condition on the sizes of inputs: batch (dimension 0), which all have, and tokens (dimension 1).
class ShapeGuard {
 public:
  /// What it says of given sizes.
  enum class Verdict : std::uint8_t {
    kHolds,
    kFails,
    kTooLarge,  ///< a number on the way has more than 64 bits
    kUndefined  ///< Python raises an error, or goes on with a fraction: division by 0, a negative exponent
  };

  /// None if it is about something else, or has a form that is not understood: whole numbers, sizes, + - * // % **,
  /// comparisons, and, or, not, min and max are.
  static std::optional<ShapeGuard> parse(std::string_view text);

  /// For inputs that all have `tokens` tokens.
  [[nodiscard]] Verdict verdict(std::int64_t batch, std::int64_t tokens) const;
  /// The whole numbers in it.
  [[nodiscard]] const std::vector<std::int64_t>& constants() const { return constants_; }
  /// The inputs whose number of rows, and those whose number of tokens it is about; each once.
  [[nodiscard]] const std::vector<std::string>& batch_inputs() const { return batch_inputs_; }
  [[nodiscard]] const std::vector<std::string>& token_inputs() const { return token_inputs_; }
  /// How much work a verdict is.
  [[nodiscard]] std::size_t steps() const { return steps_.size(); }

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
  static Verdict apply(Op op, std::int64_t a, std::int64_t b, std::int64_t& result);

  std::vector<Step> steps_;  ///< operands before their operator
  std::vector<std::int64_t> constants_;
  std::vector<std::string> batch_inputs_;
  std::vector<std::string> token_inputs_;
};

}  // namespace llmcache::exported
