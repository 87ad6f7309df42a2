#include "model/exported_module.h"

#include <ATen/core/List.h>
#include <fmt/core.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <cstdint>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model/exported_graph.h"
#include "model/exported_json.h"
#include "model/exported_scopes.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

using torch::jit::Module;
using TorchValue = torch::jit::Value;

std::pair<std::string, std::string> owner_and_name(const std::string& path) {
  const auto dot = path.rfind('.');
  if (dot == std::string::npos) return {"", path};
  return {path.substr(0, dot), path.substr(dot + 1)};
}

/// The modules by their paths; each is made when it is first asked for.
class ModuleTree {
 public:
  ModuleTree() { add("", new_module()); }

  Module& at(const std::string& path) {
    if (const auto found = modules_.find(path); found != modules_.end()) return found->second;
    const auto [owner_path, name] = owner_and_name(path);
    Module made = new_module();
    Module& owner = at(owner_path);
    check_free(owner, name, path);
    owner.register_module(name, made);
    return add(path, std::move(made));
  }

  void add_weight(const Input& input, const at::Tensor& tensor) {
    const auto [owner_path, name] = owner_and_name(input.name);
    Module& owner = at(owner_path);
    check_free(owner, name, input.name);
    if (input.kind == Input::Kind::kParameter) {
      owner.register_parameter(name, tensor, /*is_buffer=*/false);
    } else {
      owner.register_buffer(name, tensor);
    }
  }

  [[nodiscard]] const std::shared_ptr<torch::jit::CompilationUnit>& unit() const { return unit_; }

 private:
  Module new_module() { return {c10::QualifiedName(fmt::format("__torch__.exported.Module{}", made_++)), unit_}; }

  Module& add(const std::string& path, Module module) {
    module.register_attribute("training", c10::BoolType::get(), false);
    return modules_.emplace(path, std::move(module)).first->second;
  }

  static void check_free(const Module& owner, const std::string& name, const std::string& path) {
    if (owner.hasattr(name)) throw DamagedData(fmt::format("two things are called '{}'", shown(path)));
  }

  std::shared_ptr<torch::jit::CompilationUnit> unit_ = std::make_shared<torch::jit::CompilationUnit>();
  std::unordered_map<std::string, Module> modules_;
  std::size_t made_ = 0;
};

class ProgramModule {
 public:
  ProgramModule(const Program& program, const std::map<std::string, at::Tensor>& weights, at::Device device)
      : program_(program), device_(device), flow_(program) {
    for (const Input& input : program.inputs) {
      if (input.kind == Input::Kind::kUser) continue;
      const auto found = weights.find(input.name);
      if (found == weights.end()) {
        throw DamagedData(fmt::format("the archive has no tensor for the weight '{}'", shown(input.name)));
      }
      // The program may name a tensor twice, as an exporter does that shares it.
      if (weights_.emplace(input.value, input.name).second && named_.insert(input.name).second) {
        tree_.add_weight(input, found->second);
      }
    }
  }

  Module make() {
    const Scope scope = scopes_of(program_);
    Module& root = tree_.at("");
    GraphBuilder builder(program_, root.type(), device_);
    std::vector<c10::Argument> parameters{{"self", root.type()}};
    for (const auto& [value, path] : weights_) builder.set_weight(value, path);
    for (const Input& input : program_.inputs) {
      if (input.kind != Input::Kind::kUser) continue;
      builder.add_input(input.value);
      builder.value(input.value)->setDebugName(input.name);
      parameters.emplace_back(input.name, c10::TensorType::get());
    }
    fill(builder, scope);
    TorchValue* result = result_of(builder, program_.result);
    add_method(root, "forward", builder, std::move(parameters), result);
    c10::List<std::int64_t> most;
    c10::List<std::int64_t> groups;
    for (const TokenRange& range : program_.tokens) {
      most.push_back(range.most);
      groups.push_back(static_cast<std::int64_t>(range.group));
    }
    root.register_attribute(kMostTokens, c10::ListType::ofInts(), most);
    root.register_attribute(kTokenGroups, c10::ListType::ofInts(), groups);
    return root;
  }

 private:
  /// A method that a call became.
  struct Method {
    std::string name;
    std::vector<ValueId> taken;  ///< in the order of its parameters
    std::vector<ValueId> given;
    c10::TypePtr result;
  };

  void fill(GraphBuilder& builder, const Scope& scope) {
    std::size_t next = scope.begin;
    const auto own_until = [&](std::size_t end) {
      for (; next < end; ++next) builder.add(program_.nodes[next]);
    };
    for (const Scope& call : scope.calls) {
      own_until(call.begin);
      // Nobody uses what it returns, but it may write to what it is given.
      if (flow_.given(call).empty()) continue;
      add_call(builder, call, scope.path);
      next = call.end;
    }
    own_until(scope.end);
  }

  void add_call(GraphBuilder& builder, const Scope& call, const std::string& caller) {
    const Method method = method_of(call);
    const std::size_t skipped = caller.empty() ? 0 : caller.size() + 1;
    std::vector<TorchValue*> inputs{builder.attribute(call.path.substr(skipped))};
    for (const ValueId id : method.taken) inputs.push_back(builder.value(id));
    torch::jit::Graph& graph = *builder.graph();
    torch::jit::Node* node = graph.insertNode(graph.create(c10::prim::CallMethod, inputs, 1));
    node->s_(c10::attr::name, method.name);
    node->output()->setType(method.result);
    if (method.given.size() == 1) return builder.set(method.given[0], node->output());
    torch::jit::Node* parts = graph.insertNode(graph.createTupleUnpack(node->output()));
    for (std::size_t i = 0; i < method.given.size(); ++i) builder.set(method.given[i], parts->output(i));
  }

  Method method_of(const Scope& scope) {
    Module& module = tree_.at(scope.path);
    GraphBuilder builder(program_, module.type(), device_);
    std::vector<c10::Argument> parameters{{"self", module.type()}};
    Method method;
    for (const ValueId id : flow_.taken(scope)) {
      const auto weight = weights_.find(id);
      const std::string below = scope.path + ".";
      if (weight != weights_.end() && weight->second.compare(0, below.size(), below) == 0) {
        builder.set_weight(id, weight->second.substr(below.size()));
        continue;
      }
      builder.add_input(id);
      method.taken.push_back(id);
      parameters.emplace_back(fmt::format("argument_{}", parameters.size()), type_of(program_.values[id]));
    }
    fill(builder, scope);
    method.given = flow_.given(scope);
    std::vector<TorchValue*> results;
    for (const ValueId id : method.given) results.push_back(builder.value(id));
    TorchValue* result = results[0];
    if (results.size() > 1) result = builder.graph()->insertNode(builder.graph()->createTuple(results))->output();
    method.result = result->type();
    const std::size_t earlier = calls_[scope.path]++;
    method.name = earlier == 0 ? "forward" : fmt::format("forward_{}", earlier);
    add_method(module, method.name, builder, std::move(parameters), result);
    return method;
  }

  static TorchValue* result_of(GraphBuilder& builder, const Result& result) {
    if (result.value) return builder.value(*result.value);
    if (!result.tuple) return builder.graph()->insertConstant(c10::IValue());
    std::vector<TorchValue*> parts;
    for (const Result& part : result.parts) parts.push_back(result_of(builder, part));
    return builder.graph()->insertNode(builder.graph()->createTuple(parts))->output();
  }

  void add_method(Module& module, const std::string& name, GraphBuilder& builder, std::vector<c10::Argument> parameters,
                  TorchValue* result) {
    const auto graph = builder.graph();
    graph->registerOutput(result);
    torch::jit::EliminateDeadCode(graph);
    graph->lint();
    auto* function = tree_.unit()->create_function(c10::QualifiedName(*module.type()->name(), name), graph);
    function->setSchema(c10::FunctionSchema(name, "", std::move(parameters), {c10::Argument("", result->type())}));
    module.type()->addMethod(function);
  }

  const Program& program_;
  at::Device device_;
  ValueFlow flow_;
  ModuleTree tree_;
  std::map<ValueId, std::string> weights_;
  std::set<std::string> named_;
  std::unordered_map<std::string, std::size_t> calls_;
};

}  // namespace

torch::jit::Module make_module(const Program& program, const std::map<std::string, at::Tensor>& weights,
                               at::Device device) {
  check_writes(program);
  return ProgramModule(program, weights, device).make();
}

}  // namespace llmcache::exported
