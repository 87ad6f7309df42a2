#include "model/torchscript_operators.h"

#include <unordered_set>

namespace llmcache::ts {
namespace {

using OperatorNames = std::unordered_set<std::string_view>;

}  // namespace

bool is_smooth(std::string_view name) {
  // clang-format off
  static const OperatorNames kNames{"add",   "sub",   "rsub",    "mul",     "neg",          "div",      "add_",  "sub_",
                            "mul_",  "div_",  "log",     "sqrt",    "rsqrt",        "pow",      "abs",   "reciprocal",
                            "cos",   "sin",   "outer",   "matmul",  "bmm",          "einsum",   "exp2",  "square",
                            "Float", "Int",   "IntImplicit", "ScalarImplicit", "FloatImplicit", "NumToTensor", "linear",
                            "truediv", "true_divide", "lerp", "addmm", "baddbmm"};
  // clang-format on
  return kNames.count(name) > 0;
}

bool is_structural(std::string_view name) {
  // clang-format off
  static const OperatorNames kNames{"view",       "reshape",    "expand",      "expand_as", "unsqueeze", "squeeze",
                            "transpose",  "permute",    "t",           "contiguous", "to",        "type_as",
                            "alias",      "detach",     "clone",       "repeat",    "repeat_interleave",
                            "view_as",    "_unsafe_view", "flatten",   "unflatten", "chunk",     "split",
                            "unbind",     "cat",        "stack",       "movedim",   "swapaxes",  "dropout",
                            "lift_fresh", "lift_fresh_copy", "_to_copy", "copy", "numpy_T", "mT", "reshape_as",
                            "broadcast_to", "broadcast_tensors", "tensor_split", "split_with_sizes", "tensor",
                            "ListConstruct", "TupleConstruct", "ListUnpack", "TupleUnpack", "TupleIndex",
                            "__getitem__", "Constant", "unchecked_cast", "Uninitialized", "unchecked_unwrap_optional",
                            "scalar_tensor", "DictConstruct", "detach_", "requires_grad_", "append", "list"};
  // clang-format on
  return kNames.count(name) > 0;
}

bool is_elementwise(std::string_view name) {
  // clang-format off
  static const OperatorNames kNames{
      "exp",        "tanh",        "sigmoid",     "relu",       "gelu",        "silu",        "eq",          "ne",
      "lt",         "le",          "gt",          "ge",         "logical_not", "logical_or",  "logical_and", "logical_xor",
      "where",      "bitwise_or",  "bitwise_and", "bitwise_not", "bitwise_xor", "minimum",    "maximum",     "clamp",
      "clamp_min",  "clamp_max",   "__and__",     "__or__",     "__xor__",     "masked_fill", "masked_fill_", "floor_divide",
      "remainder",  "fmod",        "floor",       "ceil",       "round",       "trunc",       "floordiv",    "isnan",
      "isinf",      "sign",        "embedding",   "layer_norm", "linear",      "rms_norm",    "erf",         "softplus",
      "nan_to_num", "isfinite",    "Bool",        "__not__",    "__is__",      "__isnot__",   "min",         "max",
      "tril",       "triu",        "mish",        "log1p",      "expm1",       "hardtanh",    "leaky_relu",  "elu",
      "one_hot",    "native_layer_norm", "group_norm", "_conj", "atan2", "sgn", "fill_", "zero_", "copy_", "index"};
  // clang-format on
  return kNames.count(name) > 0;
}

bool is_filled(std::string_view name) {
  // clang-format off
  static const OperatorNames kNames{"zeros",    "ones",     "full",      "empty",     "new_zeros", "new_ones",
                            "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "eye"};
  // clang-format on
  return kNames.count(name) > 0;
}

bool is_about_the_type(std::string_view name) {
  // clang-format off
  static const OperatorNames kNames{"dtype", "device", "layout", "is_cuda", "dim", "is_floating_point", "requires_grad", "ndim",
                            "get_device", "is_complex", "is_nested"};
  // clang-format on
  return kNames.count(name) > 0;
}

}  // namespace llmcache::ts
