// Operators whose results share memory with their arguments, or that write to these, though their schemas do not say
// so.
#pragma once

#include <ATen/core/function_schema.h>

#include <cstddef>
#include <string_view>

namespace llmcache {

/// May a result be one of its tensors, or a view of one? They return what they are given where that is right already:
/// type_as() of a tensor of that type, dropout() in eval() mode. False where the schema says it. `tensors`: how many
/// the operator is called with.
bool may_share_silently(const c10::FunctionSchema& schema, std::size_t tensors);

/// The argument that must be false for an operator to leave its running statistics alone; empty for all operators but
/// normalisation.
std::string_view guard_of_statistics(const c10::FunctionSchema& schema);
/// Does that argument name such statistics?
bool is_statistics(const c10::Argument& argument);

}  // namespace llmcache
