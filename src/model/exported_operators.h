// Which operator of LibTorch a node of an exported program stands for.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/symbol.h>

#include <optional>
#include <string>

#include "model/exported_program.h"

namespace llmcache::exported {

struct Operator {
  enum class Kind : std::uint8_t {
    kTensors,  ///< of LibTorch: `schema` says what it takes
    kNumbers,  ///< arithmetic with sizes; takes its inputs in order
    kSame,     ///< returns its input
    kNothing,  ///< a check that torch.export wrote down, and that all pass which the library lets through
  };
  Kind kind = Kind::kNothing;
  c10::Symbol symbol;
  std::string overload;
  const c10::FunctionSchema* schema = nullptr;  ///< LibTorch's own
};

/// Throws Refused for operators that this process does not have, and for checks that some inputs would not pass.
Operator operator_of(const Program& program, const Node& node);

/// The argument of a node by that name; null if it is left at its default.
const Argument* argument_of(const Node& node, const std::string& name);

/// Throws Refused if a node may write to an input or a weight, or to a view of one.
void check_writes(const Program& program);

}  // namespace llmcache::exported
