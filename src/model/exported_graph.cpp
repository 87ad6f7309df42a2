#include "model/exported_graph.h"

#include <ATen/core/List.h>
#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "model/exported_archive.h"
#include "model/exported_json.h"
#include "model/exported_scopes.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

namespace prim = c10::prim;
using c10::TypeKind;
using TorchNode = torch::jit::Node;
using TorchValue = torch::jit::Value;

/// Of an optional one, the type inside.
c10::TypePtr without_optional(const c10::TypePtr& type) {
  return type->kind() == TypeKind::OptionalType ? type->expectRef<c10::OptionalType>().getElementType() : type;
}

bool takes_list(const c10::Argument& parameter) {
  return without_optional(parameter.type())->kind() == TypeKind::ListType;
}

bool is_constant(const Item& item) { return !std::holds_alternative<ValueRef>(item); }

double as_double(const Item& item) {
  if (const auto* whole = std::get_if<std::int64_t>(&item)) return static_cast<double>(*whole);
  const auto* number = std::get_if<double>(&item);
  if (number == nullptr) throw DamagedData("a list of numbers holds something else");
  return *number;
}

template <class T>
T item_as(const Item& item) {
  const T* value = std::get_if<T>(&item);
  if (value == nullptr) throw DamagedData("a list of numbers holds something else");
  return *value;
}

c10::IValue constant_list(const std::vector<Item>& items, TypeKind element) {
  if (element == TypeKind::FloatType) {
    c10::List<double> numbers;
    for (const Item& item : items) numbers.push_back(as_double(item));
    return numbers;
  }
  if (element == TypeKind::BoolType) {
    c10::List<bool> flags;
    for (const Item& item : items) flags.push_back(item_as<bool>(item));
    return flags;
  }
  c10::List<std::int64_t> numbers;
  for (const Item& item : items) numbers.push_back(item_as<std::int64_t>(item));
  return numbers;
}

std::int64_t layout_code(std::int64_t code) {
  constexpr std::int64_t kStrided = 7;
  if (code != kStrided) throw Refused("it makes sparse tensors, which the library does not take");
  return static_cast<std::int64_t>(at::kStrided);
}

std::int64_t memory_format_code(std::int64_t code) {
  switch (code) {
    case 1:
      return static_cast<std::int64_t>(at::MemoryFormat::Contiguous);
    case 2:
      return static_cast<std::int64_t>(at::MemoryFormat::ChannelsLast);
    case 3:
      return static_cast<std::int64_t>(at::MemoryFormat::ChannelsLast3d);
    case 4:
      return static_cast<std::int64_t>(at::MemoryFormat::Preserve);
    default:
      throw DamagedData(fmt::format("there is no memory format {}", code));
  }
}

/// Is a number handed over where the schema has a tensor? Python allows that; in TorchScript it is another overload.
bool number_for_tensor(const Node& node, const c10::FunctionSchema& schema, const Program& program) {
  return std::any_of(schema.arguments().begin(), schema.arguments().end(), [&](const c10::Argument& parameter) {
    const Argument* given = argument_of(node, parameter.name());
    if (given == nullptr || given->kind != Argument::Kind::kItem) return false;
    if (without_optional(parameter.type())->kind() != TypeKind::TensorType) return false;
    const Item& item = given->items[0];
    const auto* value = std::get_if<ValueRef>(&item);
    return value != nullptr ? program.values[value->id].kind != ValueKind::kTensor
                            : !std::holds_alternative<std::monostate>(item);
  });
}

const bool* flag_in(const Argument* given) {
  return given == nullptr || given->kind != Argument::Kind::kItem ? nullptr : std::get_if<bool>(&given->items[0]);
}

/// True or False where the schema has a number, or a tensor that a number may stand for; else null.
const bool* flag_for_number(const Argument* given, const c10::Argument& parameter) {
  const TypeKind wanted = without_optional(parameter.type())->kind();
  return wanted == TypeKind::NumberType || wanted == TypeKind::TensorType ? flag_in(given) : nullptr;
}

/// Does the type of what an operator returns follow from something else than from the number that it is given?
bool is_typed_otherwise(const c10::FunctionSchema& schema) {
  constexpr std::array<std::string_view, 18> kNames{"full",
                                                    "full_like",
                                                    "new_full",
                                                    "fill",
                                                    "fill_",
                                                    "masked_fill",
                                                    "masked_fill_",
                                                    "index_fill",
                                                    "index_fill_",
                                                    "constant_pad_nd",
                                                    "scalar_tensor",
                                                    "scatter",
                                                    "eq",
                                                    "ne",
                                                    "lt",
                                                    "le",
                                                    "gt",
                                                    "ge"};
  constexpr std::string_view kSpace = "aten::";
  std::string_view name = schema.name();
  if (name.substr(0, kSpace.size()) != kSpace) return false;
  name.remove_prefix(kSpace.size());
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

/// Is this the type of full(size, True), which Python takes from the value?
bool decides_type_of_flags(const Node& node, const Operator& op, const c10::Argument& parameter) {
  if (op.symbol != c10::aten::full || parameter.name() != "dtype") return false;
  const Argument* given = argument_of(node, "dtype");
  const bool chosen = given != nullptr && given->kind == Argument::Kind::kScalarType;
  return !chosen && flag_in(argument_of(node, "fill_value")) != nullptr;
}

}  // namespace

c10::TypePtr type_of(const Value& value) {
  switch (value.kind) {
    case ValueKind::kInt:
      return c10::IntType::get();
    case ValueKind::kFloat:
      return c10::FloatType::get();
    case ValueKind::kBool:
      return c10::BoolType::get();
    case ValueKind::kTensor:
      break;
  }
  return c10::TensorType::get();
}

GraphBuilder::GraphBuilder(const Program& program, const c10::TypePtr& self, at::Device device)
    : program_(program), device_(device), self_(graph_->addInput("self")) {
  self_->setType(self);
}

void GraphBuilder::add_input(ValueId id) {
  TorchValue* input = graph_->addInput();
  input->setType(type_of(program_.values[id]));
  set(id, input);
}

void GraphBuilder::set_weight(ValueId id, const std::string& path) { weights_[id] = path; }

TorchValue* GraphBuilder::value(ValueId id) {
  if (const auto found = values_.find(id); found != values_.end()) return found->second;
  const auto weight = weights_.find(id);
  if (weight == weights_.end()) {
    throw DamagedData(fmt::format("'{}' is used before it is made", shown(program_.values[id].name)));
  }
  return values_[id] = attribute(weight->second);
}

TorchValue* GraphBuilder::attribute(const std::string& path) {
  if (path.empty()) return self_;
  if (const auto found = attributes_.find(path); found != attributes_.end()) return found->second;
  const auto dot = path.rfind('.');
  TorchValue* owner = attribute(dot == std::string::npos ? "" : path.substr(0, dot));
  TorchNode* get = graph_->createGetAttr(owner, dot == std::string::npos ? path : path.substr(dot + 1));
  // In front of everything, so that it is there wherever it is used.
  owner == self_ ? graph_->prependNode(get) : get->insertAfter(owner->node());
  return attributes_[path] = get->output();
}

void GraphBuilder::add(const Node& node) {
  const Operator op = operator_of(program_, node);
  switch (op.kind) {
    case Operator::Kind::kNothing:
      break;
    case Operator::Kind::kNumbers:
      add_numbers(node, op);
      break;
    case Operator::Kind::kTensors:
      add_tensors(node, op);
      break;
    case Operator::Kind::kSame: {
      const auto used = values_in(node);
      if (used.size() != 1 || node.outputs.size() != 1 || node.outputs[0].values.size() != 1) {
        throw DamagedData(place_of(program_, node) + " has other arguments than it takes");
      }
      set(node.outputs[0].values[0], value(used[0]));
    }
  }
}

void GraphBuilder::add_numbers(const Node& node, const Operator& op) {
  std::vector<TorchValue*> inputs;
  for (const auto& [name, given] : node.inputs) {
    if (given.kind != Argument::Kind::kItem) refuse_node(node, "is called with something else than numbers");
    const Item& item = given.items[0];
    if (const auto* reference = std::get_if<ValueRef>(&item)) inputs.push_back(value(reference->id));
    if (const auto* flag = std::get_if<bool>(&item)) inputs.push_back(constant(*flag));
    if (const auto* whole = std::get_if<std::int64_t>(&item)) inputs.push_back(constant(*whole));
    if (const auto* number = std::get_if<double>(&item)) inputs.push_back(constant(*number));
  }
  TorchNode* made = graph_->insertNode(graph_->create(op.symbol, inputs, 1));
  const auto* schema = made->maybeSchema();
  if (schema == nullptr) refuse_node(node, "is called with numbers that TorchScript has no such function for");
  made->output()->setType(schema->returns()[0].type());
  set_outputs(node, *made, *schema);
}

void GraphBuilder::add_tensors(const Node& node, const Operator& op) {
  const auto& parameters = op.schema->arguments();
  for (const auto& input : node.inputs) {
    const bool known = std::any_of(parameters.begin(), parameters.end(),
                                   [&](const c10::Argument& parameter) { return parameter.name() == input.first; });
    if (!known) refuse_node(node, fmt::format("has no parameter '{}' in this version of LibTorch", shown(input.first)));
  }
  std::vector<TorchValue*> inputs;
  for (const c10::Argument& parameter : parameters) {
    const Argument* given = argument_of(node, parameter.name());
    if (const bool* flag = flag_for_number(given, parameter)) {
      inputs.push_back(number_of_flag(node, op, parameter, *flag));
    } else if (decides_type_of_flags(node, op, parameter)) {
      inputs.push_back(constant(static_cast<std::int64_t>(at::kBool)));
    } else if (given != nullptr) {
      inputs.push_back(argument(*given, parameter));
    } else if (parameter.default_value()) {
      inputs.push_back(constant(*parameter.default_value()));
    } else {
      refuse_node(node, fmt::format("lacks the argument '{}'", parameter.name()));
    }
  }
  TorchNode* made = graph_->create(op.symbol, inputs, op.schema->returns().size());
  for (std::size_t i = 0; i < made->outputs().size(); ++i) made->output(i)->setType(op.schema->returns()[i].type());
  graph_->insertNode(made);
  const auto* schema = made->maybeSchema();
  const bool same =
      schema != nullptr && (schema->overload_name() == op.overload || number_for_tensor(node, *op.schema, program_));
  if (!same) refuse_node(node, "is called with arguments that LibTorch's operator of this name does not take");
  set_outputs(node, *made, *op.schema);
}

void GraphBuilder::set_outputs(const Node& node, const TorchNode& made, const c10::FunctionSchema& schema) {
  if (node.outputs.size() > schema.returns().size()) refuse_node(node, "returns less than the program takes of it");
  for (std::size_t i = 0; i < node.outputs.size(); ++i) {
    const Output& output = node.outputs[i];
    TorchValue* returned = const_cast<TorchValue*>(made.outputs()[i]);
    if (output.list) {
      if (*schema.returns()[i].type() != *c10::ListType::ofTensors()) refuse_node(node, "returns no list of tensors");
      TorchNode* parts = graph_->insertNode(graph_->createListUnpack(returned, output.values.size()));
      for (std::size_t j = 0; j < output.values.size(); ++j) set(output.values[j], parts->output(j));
      continue;
    }
    for (const ValueId id : output.values) {  // one, or none
      const auto& wanted = type_of(program_.values[id]);
      if (*schema.returns()[i].type() != *wanted) {
        refuse_node(node, fmt::format("returns a {}, not a {}", schema.returns()[i].type()->str(), wanted->str()));
      }
      set(id, returned);
    }
  }
}

TorchValue* GraphBuilder::argument(const Argument& argument, const c10::Argument& parameter) {
  switch (argument.kind) {
    case Argument::Kind::kText:
      return constant(argument.text);
    case Argument::Kind::kScalarType:
      return constant(static_cast<std::int64_t>(scalar_type_of(argument.code)));
    case Argument::Kind::kLayout:
      return constant(layout_code(argument.code));
    case Argument::Kind::kMemoryFormat:
      return constant(memory_format_code(argument.code));
    case Argument::Kind::kDevice:
      return constant(device_);
    case Argument::Kind::kItem:
      return single(argument.items[0], parameter);
    case Argument::Kind::kItems:
      return list(argument, without_optional(parameter.type()));
  }
  throw DamagedData("an argument is of no kind");
}

TorchValue* GraphBuilder::single(const Item& item, const c10::Argument& parameter) {
  const bool wants_float = without_optional(parameter.type())->kind() == TypeKind::FloatType;
  if (const auto* reference = std::get_if<ValueRef>(&item)) {
    TorchValue* found = value(reference->id);
    if (!wants_float || found->type()->kind() != TypeKind::IntType) return found;
    TorchNode* converted = graph_->insertNode(graph_->create(c10::aten::Float, {found}, 1));
    converted->output()->setType(c10::FloatType::get());
    return converted->output();
  }
  if (const auto* whole = std::get_if<std::int64_t>(&item)) {
    if (wants_float) return constant(static_cast<double>(*whole));
    if (!takes_list(parameter)) return constant(*whole);
    // One number for each dimension: int[2] stride=1.
    const auto count = static_cast<std::size_t>(parameter.N().value_or(1));
    return constant(c10::List<std::int64_t>(std::vector<std::int64_t>(count, *whole)));
  }
  if (const auto* flag = std::get_if<bool>(&item)) return constant(*flag);
  if (const auto* number = std::get_if<double>(&item)) return constant(*number);
  return constant(c10::IValue());
}

TorchValue* GraphBuilder::number_of_flag(const Node& node, const Operator& op, const c10::Argument& parameter,
                                         bool flag) {
  const bool of_numbers = without_optional(parameter.type())->kind() == TypeKind::NumberType;
  if (of_numbers && is_typed_otherwise(*op.schema)) return constant(static_cast<std::int64_t>(flag));
  refuse_node(node, fmt::format("is given {} as the number '{}', which TorchScript does not take here: give {} in "
                                "forward(), or torch.tensor({}) where the result is to be bool",
                                flag ? "True" : "False", parameter.name(), flag ? 1 : 0, flag ? "True" : "False"));
}

TorchValue* GraphBuilder::list(const Argument& argument, const c10::TypePtr& wanted) {
  if (wanted->kind() != TypeKind::ListType) throw DamagedData("a list stands where an operator takes none");
  const c10::TypePtr element = wanted->expectRef<c10::ListType>().getElementType();
  const bool tensors = without_optional(element)->kind() == TypeKind::TensorType;
  if (tensors || !std::all_of(argument.items.begin(), argument.items.end(), is_constant)) {
    return list_of_values(argument, element);
  }
  return constant(constant_list(argument.items, element->kind()));
}

TorchValue* GraphBuilder::list_of_values(const Argument& argument, const c10::TypePtr& element) {
  std::vector<TorchValue*> items;
  for (const Item& item : argument.items) {
    if (const auto* reference = std::get_if<ValueRef>(&item)) {
      items.push_back(value(reference->id));
    } else {
      const auto* whole = std::get_if<std::int64_t>(&item);
      items.push_back(constant(whole != nullptr ? c10::IValue(*whole) : c10::IValue()));
    }
  }
  const bool of_sizes = element->kind() == TypeKind::SymIntType || element->kind() == TypeKind::IntType;
  const c10::TypePtr type = of_sizes ? c10::TypePtr(c10::IntType::get()) : element;
  for (const TorchValue* item : items) {
    if (!item->type()->isSubtypeOf(*type)) throw DamagedData("a list holds something else than its operator takes");
  }
  return graph_->insertNode(graph_->createList(type, items))->output();
}

void GraphBuilder::refuse_node(const Node& node, const std::string& why) const {
  throw Refused(fmt::format("{} {}; the program was saved by PyTorch {}", place_of(program_, node), why,
                            program_.torch_version.empty() ? "?" : shown(program_.torch_version)));
}

}  // namespace llmcache::exported
