#include "model/torchscript_writes.h"

#include <fmt/core.h>

#include <algorithm>
#include <map>
#include <set>

#include "llmcache/error.h"
#include "model/silent_aliases.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;

/// Something that another can write to: a tensor, or what holds tensors or is grown in place.
bool is_mutable(const Value* value) {
  switch (value->type()->kind()) {
    case c10::TypeKind::TensorType:
    case c10::TypeKind::ListType:
    case c10::TypeKind::DictType:
    case c10::TypeKind::TupleType:
    case c10::TypeKind::OptionalType:
    case c10::TypeKind::UnionType:
    case c10::TypeKind::ClassType:
    case c10::TypeKind::AnyType:
      return true;
    default:
      return false;
  }
}

bool is_container(const Value* value) {
  return is_mutable(value) && value->type()->kind() != c10::TypeKind::TensorType;
}

/// A list of numbers or texts: a copy of it has nothing in common with it.
bool is_plain_list(const Value* value) {
  if (value->type()->kind() != c10::TypeKind::ListType) return false;
  const auto kind = value->type()->expectRef<c10::ListType>().getElementType()->kind();
  return kind == c10::TypeKind::IntType || kind == c10::TypeKind::FloatType || kind == c10::TypeKind::BoolType ||
         kind == c10::TypeKind::StringType || kind == c10::TypeKind::NumberType;
}

/// Gives the parts of its first input, or that itself, whatever its schema says.
bool takes_apart(const Node* node) {
  return node->kind() == prim::TupleIndex || node->kind() == prim::TupleUnpack || node->kind() == prim::TupleSlice ||
         node->kind() == prim::unchecked_cast || node->kind() == prim::ListUnpack ||
         node->kind() == aten::_unwrap_optional || node->kind() == prim::unchecked_unwrap_optional;
}

/// May it be anything, so an element of a list too?
bool is_anything(const c10::AliasInfo* info) {
  return info != nullptr && (info->isWildcardBefore() || info->isWildcardAfter());
}

bool shares(const c10::AliasInfo* a, const c10::AliasInfo* b) {
  if (a == nullptr || b == nullptr) return false;
  return std::any_of(a->beforeSets().begin(), a->beforeSets().end(), [&](const c10::Symbol& set) {
    return b->beforeSets().count(set) > 0 || b->afterSets().count(set) > 0;
  });
}

/// How many tensors an operator is called with, those in a list that is made for it counted one by one.
std::size_t tensors_given(const Node* node) {
  std::size_t count = 0;
  for (const Value* input : node->inputs()) {
    const bool list = input->node()->kind() == prim::ListConstruct;
    count += list ? input->node()->inputs().size() : input->type()->kind() == c10::TypeKind::TensorType ? 1 : 0;
  }
  return count;
}

/// Does normalisation write to its running statistics? A flag that is no constant is that of a module in eval() mode.
bool updates_statistics(const Node* node, const c10::FunctionSchema& schema) {
  const std::string guard(guard_of_statistics(schema));
  if (guard.empty()) return false;
  const auto flag = torch::jit::toIValue(node->namedInput(guard));
  return flag && flag->isBool() && flag->toBool();
}

std::string where(const Node* node) {
  std::string text = node->kind().toQualString();
  auto place = node->sourceRange().file_line_col();
  // What sets an attribute has no place of its own; what makes the value has.
  for (std::size_t i = node->inputs().size(); !place && i-- > 0;) {
    place = node->input(i)->node()->sourceRange().file_line_col();
  }
  if (place) text += fmt::format(" at {}:{}", std::get<0>(*place), std::get<1>(*place));
  return text;
}

class Finder {
 public:
  Finder(Graph& graph, const Module& module) : graph_(graph), module_(module) {}

  Writes run() {
    follow(graph_.block());
    for (const auto& [path, writers] : writers_) settle(path, writers);
    return std::move(made_);
  }

 private:
  using Paths = std::set<std::string>;

  /// Which attributes a value may be, or a view of them.
  void follow(torch::jit::Block* block) {
    for (Node* node : block->nodes()) {
      if (node->kind() == prim::GetAttr && is_mutable(node->output())) {
        if (const auto path = attribute_path(node->output(), graph_.inputs()[0])) {
          attributes_[node->output()].insert(*path);
          add_once(reads_[*path], node->output());
        }
        continue;
      }
      if (node->kind() == prim::SetAttr) refuse_set(node);
      if (node->kind() == prim::fork || node->kind() == prim::rpc_async) refuse_fork(node);
      for (std::size_t b = 0; b < node->blocks().size(); ++b) {
        auto* inner = node->blocks()[b];
        const std::size_t skip = node->kind() == prim::Loop ? 1 : 0;
        for (std::size_t i = skip; i < inner->inputs().size(); ++i)
          alias(inner->inputs()[i], node->input(i + 2 - skip));
        follow(inner);
        for (std::size_t i = 0; i < node->outputs().size(); ++i) alias(node->output(i), inner->outputs()[i + skip]);
        if (node->kind() == prim::Loop) {  // what it carries comes back
          for (std::size_t i = skip; i < inner->inputs().size(); ++i) alias(inner->inputs()[i], inner->outputs()[i]);
          follow(inner);
          for (std::size_t i = 0; i < node->outputs().size(); ++i) alias(node->output(i), inner->outputs()[i + skip]);
        }
      }
      if (node->kind() != prim::If && node->kind() != prim::Loop) look_at(node);
    }
  }

  /// `to` is `from`, or a view of it.
  void alias(const Value* to, const Value* from) {
    add(attributes_, to, attributes_, from);
    add(held_, to, held_, from);
  }
  /// `to` holds `from`.
  void put_in(const Value* to, const Value* from) {
    add(held_, to, attributes_, from);
    add(held_, to, held_, from);
  }
  /// `to` is a part of `from`.
  void take_out(const Value* to, const Value* from) {
    add(attributes_, to, attributes_, from);
    add(attributes_, to, held_, from);
    add(held_, to, held_, from);
  }

  /// `to` may be `from`, a part of it, or hold it.
  void share(const Value* to, const Value* from) {
    if (is_container(to)) return put_in(to, from);
    is_container(from) ? take_out(to, from) : alias(to, from);
  }

  using Known = std::unordered_map<const Value*, Paths>;
  static void add(Known& into, const Value* to, const Known& of, const Value* from) {
    const auto it = of.find(from);
    if (it == of.end() || !is_mutable(to)) return;
    const Paths paths = it->second;
    into[to].insert(paths.begin(), paths.end());
  }

  void look_at(Node* node) {
    const auto* schema = node->maybeSchema();
    if (takes_apart(node)) {
      for (const Value* output : node->outputs()) take_out(output, node->input(0));
      return;
    }
    if (schema == nullptr) {  // lists, tuples and dictionaries are made
      for (const Value* input : node->inputs()) {
        for (const Value* output : node->outputs()) put_in(output, input);
      }
      return;
    }
    const auto& arguments = schema->arguments();
    const bool silent = may_share_silently(*schema, tensors_given(node));
    for (std::size_t i = 0; i < node->inputs().size() && i < arguments.size(); ++i) {
      const Value* input = node->input(i);
      const auto* info = arguments[i].alias_info();
      const bool statistics = is_statistics(arguments[i]) && updates_statistics(node, *schema);
      if ((info != nullptr && info->isWrite()) || statistics) {
        const auto found = attributes_.find(input);
        if (found != attributes_.end()) {
          for (const auto& path : found->second) add_once(writers_[path], node);
        }
      }
      // Put into a list or dictionary.
      if (i > 0 && is_anything(info) && is_container(node->input(0))) put_in(node->input(0), input);
      for (std::size_t j = 0; j < node->outputs().size() && j < schema->returns().size(); ++j) {
        const Value* output = node->output(j);
        const auto* returned = schema->returns()[j].alias_info();
        if (shares(info, returned)) {
          alias(output, input);
        } else if (silent) {
          share(output, input);
        } else if (is_container(input) && is_container(output) && !is_plain_list(output)) {
          put_in(output, input);  // a copy, but not of what it holds
        } else if (is_container(input) && is_anything(returned)) {
          take_out(output, input);
        }
      }
    }
  }

  template <class T>
  static void add_once(std::vector<T>& all, T one) {
    if (std::find(all.begin(), all.end(), one) == all.end()) all.push_back(one);
  }

  [[noreturn]] static void refuse_fork(const Node* node) {
    throw Error(
        ErrorCode::kUnsupportedModel,
        fmt::format("forward() starts tasks of its own ({}); run their code in place, and export again", where(node)));
  }

  [[noreturn]] static void refuse_set(const Node* node) {
    throw Error(
        ErrorCode::kUnsupportedModel,
        fmt::format("forward() sets the attribute '{}' of the module ({}); a model that keeps state between calls "
                    "cannot be cached: pass the state as an input, or leave it out of the export",
                    node->s(c10::attr::name), where(node)));
  }

  /// The node of the graph's own block that holds `node`.
  const Node* top(const Node* node) const {
    while (node->owningBlock() != graph_.block()) node = node->owningBlock()->owningNode();
    return node;
  }

  void settle(const std::string& path, const std::vector<Node*>& writers) {
    if (nobody_reads(path, writers) && !shares_memory(path)) {
      drop(path, writers);
      return;
    }
    if (!overwritten_first(path, writers)) {
      throw Error(
          ErrorCode::kUnsupportedModel,
          fmt::format(
              "forward() writes to '{}', which it reads too ({}): a model that keeps state between calls cannot "
              "be cached. Make a new value in place of writing to the attribute (clone() a tensor first), or pass "
              "the state as an input, and export again",
              path, where(writers.front())));
    }
    Node* write = writers.front();
    const torch::jit::WithInsertPoint guard(write);
    Value* buffer = write->input(0);
    Value* typed = graph_.insert(c10::Symbol::fromQualString("aten::type_as"), {write->input(1), buffer});
    Value* expanded = graph_.insert(c10::Symbol::fromQualString("aten::expand_as"), {typed, buffer});
    Value* value =
        graph_.insert(c10::Symbol::fromQualString("aten::clone"), {expanded});  // its source may change later
    write->output()->replaceAllUsesWith(value);
    for (Value* read : reads_.at(path)) {
      const auto uses = read->uses();
      for (const auto& use : uses) {
        if (use.user != write && use.user != typed->node() && use.user != expanded->node()) {
          use.user->replaceInput(use.offset, value);
        }
      }
    }
    write->destroy();
    // What is read of it is its type and shape.
    made_.exempt.push_back(path);
    made_.notes.push_back(
        fmt::format("'{}', which forward() overwrites before it reads it, is not written to by the library", path));
  }

  /// Only the writes themselves use it, and nobody uses what they return.
  bool nobody_reads(const std::string& path, const std::vector<Node*>& writers) const {
    for (const Value* read : reads_.at(path)) {
      for (const auto& use : read->uses()) {
        const bool writes = use.offset == 0 && std::find(writers.begin(), writers.end(), use.user) != writers.end();
        if (!writes || use.user->hasUses()) return false;
      }
    }
    return true;
  }

  void drop(const std::string& path, const std::vector<Node*>& writers) {
    for (Node* write : writers) write->destroy();
    made_.exempt.push_back(path);
    made_.notes.push_back(fmt::format(
        "forward() writes to '{}', which nothing reads: calls that the library answers do not change it", path));
  }

  bool overwritten_first(const std::string& path, const std::vector<Node*>& writers) const {
    const Node* write = writers.front();
    if (writers.size() != 1 || write->kind() != aten::copy_ || write->owningBlock() != graph_.block()) return false;
    if (write->input(0)->node()->kind() != prim::GetAttr || attributes_.at(write->input(0)).size() != 1) return false;
    if (attributes_.count(write->input(1)) && attributes_.at(write->input(1)).count(path)) return false;
    for (const Value* read : reads_.at(path)) {
      for (const auto& use : read->uses()) {
        if (use.user != write && !write->isBefore(top(use.user))) return false;
      }
    }
    return !shares_memory(path);
  }

  /// With another attribute, so that what is written shows there.
  bool shares_memory(const std::string& path) const {
    c10::IValue own;
    std::set<const void*> others;
    for (const auto& item : module_.named_attributes(/*recurse=*/true)) {
      if (item.name == path) {
        own = item.value;
      } else {
        add_memory(item.value, others);
      }
    }
    std::set<const void*> mine;
    add_memory(own, mine);
    return mine.empty() ||
           std::any_of(mine.begin(), mine.end(), [&](const void* memory) { return others.count(memory) > 0; });
  }

  /// Where a tensor's numbers lie, and each list or dictionary itself.
  static void add_memory(const c10::IValue& value, std::set<const void*>& memory) {
    if (value.isTensor()) {
      if (value.toTensor().defined() && value.toTensor().has_storage())
        memory.insert(value.toTensor().storage().data());
      return;
    }
    if (value.isPtrType() && (value.isList() || value.isGenericDict())) memory.insert(value.internalToPointer());
    if (value.isList()) {
      for (const c10::IValue& part : value.toListRef()) add_memory(part, memory);
    } else if (value.isTuple()) {
      for (const c10::IValue& part : value.toTupleRef().elements()) add_memory(part, memory);
    } else if (value.isGenericDict()) {
      for (const auto& entry : value.toGenericDict()) add_memory(entry.value(), memory);
    }
  }

  Graph& graph_;
  const Module& module_;
  Known attributes_;  ///< what a value may be, or be a view of
  Known held_;        ///< what a list, tuple or dictionary may hold
  std::map<std::string, std::vector<Value*>> reads_;
  std::map<std::string, std::vector<Node*>> writers_;
  Writes made_;
};

}  // namespace

Writes remove_writes(Graph& graph, const Module& module) { return Finder(graph, module).run(); }

}  // namespace llmcache::ts
