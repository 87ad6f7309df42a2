#include "model/silent_aliases.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include <algorithm>
#include <array>
#include <string>

namespace llmcache {
namespace {

/// Found by calling operators whose schemas name no alias. LibTorch tags some of them, but not these.
constexpr std::array<std::string_view, 17> kSharing{
    "aten::type_as",       "aten::broadcast_tensors", "aten::meshgrid",     "aten::sum_to_size",
    "aten::atleast_1d",    "aten::atleast_2d",        "aten::atleast_3d",   "aten::to_dense",
    "aten::data",          "aten::_to_cpu",           "aten::lift",         "aten::flatten_dense_tensors",
    "aten::unsafe_chunk",  "aten::unsafe_split",      "aten::_unsafe_view", "aten::unsafe_split_with_sizes",
    "aten::_reshape_alias"};

bool is_normalisation(std::string_view name) {
  return name.find("batch_norm") != std::string_view::npos || name == "aten::instance_norm";
}

bool names_aliases(const c10::FunctionSchema& schema) {
  return std::any_of(schema.arguments().begin(), schema.arguments().end(),
                     [](const c10::Argument& argument) { return argument.alias_info() != nullptr; });
}

}  // namespace

bool may_share_silently(const c10::FunctionSchema& schema, std::size_t tensors) {
  const std::string_view name = schema.name();
  // Batch normalisation has the tag for what it may write to; its result is its own.
  if (names_aliases(schema) || is_normalisation(name)) return false;
  if (std::find(kSharing.begin(), kSharing.end(), name) != kSharing.end()) return true;
  if (name == "aten::einsum") return tensors == 1;       // of several it makes a product
  if (name.substr(0, 11) == "aten::_cast") return true;  // _cast_Float() and the like
  const auto handle = c10::Dispatcher::singleton().findSchema(schema.operator_name());
  return handle && handle->hasTag(at::Tag::maybe_aliasing_or_mutating);
}

std::string_view guard_of_statistics(const c10::FunctionSchema& schema) {
  if (!is_normalisation(schema.name())) return "";
  return schema.name() == "aten::instance_norm" ? "use_input_stats" : "training";
}

bool is_statistics(const c10::Argument& argument) {
  return argument.name() == "running_mean" || argument.name() == "running_var";
}

}  // namespace llmcache
