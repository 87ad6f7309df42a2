// What TorchScript's operators do to numbers, by their names without namespace.
#pragma once

#include <string_view>

namespace llmcache::ts {

/// Numbers that change wherever what they are made of does.
bool is_smooth(std::string_view name);
/// Operators that move numbers and make none.
bool is_structural(std::string_view name);
/// Operators that treat each element, or each token's vector, alike; what they make of a length may be a step.
bool is_elementwise(std::string_view name);
/// Made of nothing but sizes: only the number they are filled with counts.
bool is_filled(std::string_view name);
/// Facts about a tensor, not about what it holds.
bool is_about_the_type(std::string_view name);

}  // namespace llmcache::ts
