#include "model/exported_operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "model/exported_json.h"
#include "model/exported_scopes.h"
#include "model/silent_aliases.h"
#include "store/bounded_json.h"

namespace llmcache::exported {
namespace {

/// Python's functions of sizes, and TorchScript's of the same meaning.
constexpr std::array<std::pair<std::string_view, const char*>, 24> kNumberOperators{{
    {"_operator.add", "aten::add"},     {"_operator.sub", "aten::sub"},
    {"_operator.mul", "aten::mul"},     {"_operator.floordiv", "aten::floordiv"},
    {"_operator.truediv", "aten::div"}, {"_operator.mod", "aten::remainder"},
    {"_operator.neg", "aten::neg"},     {"_operator.eq", "aten::eq"},
    {"_operator.ne", "aten::ne"},       {"_operator.ge", "aten::ge"},
    {"_operator.le", "aten::le"},       {"_operator.gt", "aten::gt"},
    {"_operator.lt", "aten::lt"},       {"_operator.and_", "aten::__and__"},
    {"_operator.or_", "aten::__or__"},  {"torch.sym_not", "aten::__not__"},
    {"torch.sym_max", "prim::max"},     {"torch.sym_min", "prim::min"},
    {"torch.sym_float", "aten::Float"}, {"torch.sym_int", "aten::Int"},
    {"math.trunc", "aten::Int"},        {"math.ceil", "aten::ceil"},
    {"math.floor", "aten::floor"},      {"torch._sym_sqrt", "aten::sqrt"},
}};

constexpr std::array<std::string_view, 6> kChecks{
    "_assert_tensor_metadata",      "_assert_scalar",          "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size", "_functional_assert_async"};

struct Target {
  std::string space;
  std::string name;
  std::string overload;
};

/// Of "torch.ops.aten.linear.default".
std::optional<Target> target_of(const std::string& text) {
  constexpr std::string_view kBegin = "torch.ops.";
  if (text.compare(0, kBegin.size(), kBegin) != 0) return std::nullopt;
  const std::size_t first = text.find('.', kBegin.size());
  const std::size_t second = first == std::string::npos ? first : text.find('.', first + 1);
  if (second == std::string::npos) return std::nullopt;
  const std::string overload = text.substr(second + 1);
  return Target{text.substr(kBegin.size(), first - kBegin.size()), text.substr(first + 1, second - first - 1),
                overload == "default" ? "" : overload};
}

[[noreturn]] void refuse_unknown(const Program& program, const Node& node, bool own) {
  throw Refused(fmt::format(
      "{} is no operator that this process has: {}", place_of(program, node),
      own ? "load the library that registers it (dlopen or torch::jit's loaders do) before the program, or use "
            "operators of PyTorch in that part of forward()"
          : "rewrite that part of forward() by operators of PyTorch"));
}

bool is_given(const Argument& argument) {
  return argument.kind != Argument::Kind::kItem || !std::holds_alternative<std::monostate>(argument.items[0]);
}

/// A check may be left out where all that the library lets through passes it: one of constants, or of the type and
/// device of a tensor, which follow from those of inputs and weights.
void refuse_unless_settled(const Program& program, const Node& node, const std::string& check) {
  if (check == "_assert_tensor_metadata") {
    for (const char* name : {"size", "stride"}) {
      const Argument* argument = argument_of(node, name);
      if (argument == nullptr || !is_given(*argument)) continue;
      throw Refused(
          fmt::format("{} checks the {} of a tensor: take the check out of forward()", place_of(program, node), name));
    }
    return;
  }
  if (values_in(node).empty()) return;
  const Argument* message = argument_of(node, "assert_msg");
  throw Refused(fmt::format(
      "{} checks what the model is given{}: export without prefer_deferred_runtime_asserts_over_guards, and take "
      "torch._check(), torch._assert_async(), item() and the like out of forward()",
      place_of(program, node), message == nullptr ? "" : fmt::format(" (\"{}\")", shown(message->text))));
}

/// The input (by its place among Program::inputs) whose memory a value may share; of several the first.
using Root = std::optional<std::size_t>;

Root earlier_root(Root a, Root b) { return !a ? b : !b ? a : std::min(a, b); }

Root root_of(const Argument* argument, const std::vector<Root>& known) {
  Root root;
  if (argument == nullptr) return root;
  for (const Item& item : argument->items) {
    if (const auto* value = std::get_if<ValueRef>(&item)) root = earlier_root(root, known[value->id]);
  }
  return root;
}

/// Does it write to the running statistics that it is given?
bool writes_statistics(const Node& node, const c10::FunctionSchema& schema) {
  const Argument* flag = argument_of(node, std::string(guard_of_statistics(schema)));
  if (flag == nullptr || flag->kind != Argument::Kind::kItem) return false;
  const bool* given = std::get_if<bool>(&flag->items[0]);
  return given == nullptr || *given;
}

[[noreturn]] void refuse_write(const Program& program, const Node& node, const Input& written) {
  throw Refused(fmt::format(
      "{} writes to the {} '{}': the library runs layers by themselves, and answers requests "
      "without running them; let it write to a copy (clone()) instead",
      place_of(program, node), written.kind == Input::Kind::kUser ? "input" : "weight or buffer", written.name));
}

}  // namespace

Operator operator_of(const Program& program, const Node& node) {
  Operator found;
  const auto* number = std::find_if(kNumberOperators.begin(), kNumberOperators.end(),
                                    [&](const auto& known) { return known.first == node.target; });
  if (number != kNumberOperators.end()) {
    found.kind = Operator::Kind::kNumbers;
    found.symbol = c10::Symbol::fromQualString(number->second);
    return found;
  }
  auto target = target_of(node.target);
  if (!target) refuse_unknown(program, node, false);
  if (target->space == "aten") {
    if (std::find(kChecks.begin(), kChecks.end(), target->name) != kChecks.end()) {
      refuse_unless_settled(program, node, target->name);
      return found;
    }
    if (target->name == "sym_size" || target->name == "sym_stride" || target->name == "sym_numel") {
      target->name = target->name.substr(4);
    }
  }
  const auto handle = c10::Dispatcher::singleton().findSchema({target->space + "::" + target->name, target->overload});
  if (!handle) refuse_unknown(program, node, target->space != "aten");
  // It takes a tensor out of the graph of gradients, which there is none of.
  found.kind = node.target == "torch.ops.aten.detach_.default" ? Operator::Kind::kSame : Operator::Kind::kTensors;
  found.symbol = c10::Symbol::fromQualString(target->space + "::" + target->name);
  found.overload = target->overload;
  found.schema = &handle->schema();
  return found;
}

const Argument* argument_of(const Node& node, const std::string& name) {
  const auto found =
      std::find_if(node.inputs.begin(), node.inputs.end(), [&](const auto& input) { return input.first == name; });
  return found == node.inputs.end() ? nullptr : &found->second;
}

void check_writes(const Program& program) {
  std::vector<Root> roots(program.values.size());
  for (std::size_t i = 0; i < program.inputs.size(); ++i) roots[program.inputs[i].value] = i;
  for (const Node& node : program.nodes) {
    const Operator op = operator_of(program, node);
    if (op.kind != Operator::Kind::kTensors && op.kind != Operator::Kind::kSame) continue;
    const bool silent = may_share_silently(*op.schema, values_in(node).size());
    const bool statistics = writes_statistics(node, *op.schema);
    Root shared;  // of all arguments that a result may be a view of
    for (const c10::Argument& parameter : op.schema->arguments()) {
      const Root of_argument = root_of(argument_of(node, parameter.name()), roots);
      const auto* alias = parameter.alias_info();
      const bool writes = (alias != nullptr && alias->isWrite() && op.kind != Operator::Kind::kSame) ||
                          (statistics && is_statistics(parameter));
      if (writes && of_argument) refuse_write(program, node, program.inputs[*of_argument]);
      if (alias != nullptr || silent) shared = earlier_root(shared, of_argument);
    }
    for (const Output& output : node.outputs) {
      for (const ValueId value : output.values) roots[value] = shared;
    }
  }
}

}  // namespace llmcache::exported
