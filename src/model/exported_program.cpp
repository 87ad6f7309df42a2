#include "model/exported_program.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "model/exported_json.h"
#include "model/exported_shapes.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

constexpr std::size_t kMostFrames = 48;

bool starts(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

/// Do attribute look-ups lead along `path`? Each part must be a name, and not too many of them.
bool is_path(std::string_view path) {
  std::size_t length = 0;
  std::size_t parts = 1;
  for (const char c : path) {
    const bool part_of_name =
        (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
    if (c == '.' ? length == 0 || ++parts > kMostFrames : !part_of_name) return false;
    length = c == '.' ? 0 : length + 1;
  }
  return length > 0;
}

/// Operators that only exist once a program was taken apart by run_decompositions().
bool is_decomposed(const std::string& target) {
  constexpr std::array<std::string_view, 9> kParts{"_softmax.",          "_log_softmax.",      "_scaled_dot_product_",
                                                   "native_layer_norm.", "native_group_norm.", "native_dropout.",
                                                   "_unsafe_view.",      "_to_copy.",          "_native_batch_norm"};
  constexpr std::string_view kAten = "torch.ops.aten.";
  if (!starts(target, kAten)) return false;
  const std::string_view name = std::string_view(target).substr(kAten.size());
  return std::any_of(kParts.begin(), kParts.end(), [&](std::string_view part) { return starts(name, part); });
}

class ProgramReader {
 public:
  explicit ProgramReader(const Json& json) : json_(json) {}

  Program read() {
    check_version();
    const Json& module = JsonObject(json_, "the program").at("graph_module");
    const Json& graph = JsonObject(module, "the graph module").at("graph");
    const Json& signature = JsonObject(module, "the graph module").at("signature");
    for (const Json& spec : JsonObject(signature, "the signature").list("input_specs")) read_input(spec);
    if (program_.inputs.empty()) throw DamagedData("the program has no inputs");
    for (const Json& node : JsonObject(graph, "the graph").list("nodes")) read_node(node);
    read_result(module, signature);
    program_.tokens = token_ranges(json_, graph, user_inputs());
    return std::move(program_);
  }

 private:
  void check_version() {
    const Json& version = JsonObject(json_, "the program").at("schema_version");
    const std::int64_t major = JsonObject(version, "the schema version").whole("major");
    const auto torch = json_.find("torch_version");
    program_.torch_version = torch != json_.end() && torch->is_string() ? torch->get<std::string>() : "";
    if (major == kSchemaMajor) return;
    throw Refused(
        fmt::format("its schema has the major version {}; {} is what this version reads: save the program "
                    "again, with PyTorch 2.13 for one",
                    major, kSchemaMajor));
  }

  // --- values -----------------------------------------------------------------------------------

  ValueId define(const std::string& name, ValueKind kind) {
    const ValueId id = program_.values.size();
    if (!ids_.emplace(name, id).second) throw DamagedData(fmt::format("'{}' is made twice", shown(name)));
    program_.values.push_back({name, kind});
    return id;
  }

  ValueId known(const std::string& name, const std::string& subject) const {
    const auto found = ids_.find(name);
    if (found == ids_.end()) {
      throw DamagedData(fmt::format("{} uses '{}', which nothing before it makes", subject, shown(name)));
    }
    return found->second;
  }

  ValueRef tensor(const Json& value, const std::string& subject) const {
    const ValueId id = known(JsonObject(value, subject).text("name"), subject);
    if (program_.values[id].kind != ValueKind::kTensor) {
      throw DamagedData(fmt::format("{} uses '{}' as a tensor", subject, shown(program_.values[id].name)));
    }
    return {id};
  }

  // --- inputs -----------------------------------------------------------------------------------

  void read_input(const Json& spec) {
    const std::string subject = fmt::format("input {} of the signature", program_.inputs.size());
    const auto [kind, content] = only_member(spec, subject);
    if (kind == "constant_input") return read_constant_input(content, subject);
    if (kind == "custom_obj" || kind == "token") {
      throw Refused(fmt::format("it takes a {} as an input, which only Python can make: leave it out of the model",
                                kind == "token" ? "token of effects" : "custom object"));
    }
    if (kind == "user_input") return read_user_input(JsonObject(content, subject).at("arg"));
    const std::array<std::pair<const char*, Input::Kind>, 3> weights{{{"parameter", Input::Kind::kParameter},
                                                                      {"buffer", Input::Kind::kBuffer},
                                                                      {"tensor_constant", Input::Kind::kConstant}}};
    for (const auto& [name, weight] : weights) {
      if (kind != name) continue;
      const std::string& path = JsonObject(content, subject).text((std::string(name) + "_name").c_str());
      if (!is_path(path)) throw DamagedData(fmt::format("'{}' is no name of a weight", shown(path)));
      const std::string& value = JsonObject(JsonObject(content, subject).at("arg"), subject).text("name");
      program_.inputs.push_back({weight, define(value, ValueKind::kTensor), path});
      return;
    }
    throw Refused(fmt::format("{} is of the unknown kind '{}'", subject, shown(kind)));
  }

  /// Arguments that were constants when the program was exported are in the graph already.
  static void read_constant_input(const Json& content, const std::string& subject) {
    const std::string& name = JsonObject(content, subject).text("name");
    const auto [kind, value] = only_member(JsonObject(content, subject).at("value"), subject);
    if (kind == "as_none") return;
    throw Refused(fmt::format("its input '{}' is the constant {}: leave it out of forward(), or give None", shown(name),
                              shown(value.dump())));
  }

  void read_user_input(const Json& argument) {
    const auto [kind, content] = only_member(argument, "an input");
    if (kind == "as_none") return;
    if (kind != "as_tensor") {
      throw Refused(
          fmt::format("an input is no tensor ({}); the library takes tensors [batch, tokens] only", shown(kind)));
    }
    const std::string& name = JsonObject(content, "an input").text("name");
    if (!is_path(name) || name.find('.') != std::string::npos) {
      throw DamagedData(fmt::format("'{}' is no name of an input", shown(name)));
    }
    program_.inputs.push_back({Input::Kind::kUser, define(name, ValueKind::kTensor), name});
  }

  [[nodiscard]] std::vector<std::string> user_inputs() const {
    std::vector<std::string> names;
    for (const Input& input : program_.inputs) {
      if (input.kind == Input::Kind::kUser) names.push_back(input.name);
    }
    return names;
  }

  // --- nodes ------------------------------------------------------------------------------------

  void read_node(const Json& json) {
    Node node;
    node.target = JsonObject(json, "a node").text("target");
    const auto name = json.find("name");
    node.name =
        name != json.end() && name->is_string() ? name->get<std::string>() : fmt::format("{}", program_.nodes.size());
    read_frames(json, node);
    const std::string place = place_of(program_, node);
    if (starts(node.target, "torch.ops.higher_order.")) {
      throw Refused(
          fmt::format("{} is a higher-order operator (control flow, or a region with settings of its own): "
                      "rewrite that part of forward() without it",
                      place));
    }
    if (is_decomposed(node.target)) {
      throw Refused(
          fmt::format("{} is what run_decompositions() makes of attention and of other operators: save the "
                      "program as torch.export.export() returns it",
                      place));
    }
    for (const Json& input : JsonObject(json, place).list("inputs")) {
      node.inputs.emplace_back(JsonObject(input, place).text("name"),
                               argument(JsonObject(input, place).at("arg"), place));
    }
    for (const Json& output : JsonObject(json, place).list("outputs")) node.outputs.push_back(output_of(output, place));
    program_.nodes.push_back(std::move(node));
  }

  /// "L__self__,,Wrapper;L__self__model,model,BertModel": key, path and class of each module that is being called.
  void read_frames(const Json& json, Node& node) {
    const auto metadata = json.find("metadata");
    if (metadata == json.end() || !metadata->is_object()) return;
    const auto found = metadata->find("nn_module_stack");
    if (found == metadata->end() || !found->is_string()) return;
    const std::string_view stack = found->get_ref<const std::string&>();
    if (starts(stack, "_empty_nn_module_stack")) return;
    for (std::size_t begin = 0; begin < stack.size();) {
      const std::size_t end = std::min(stack.find(';', begin), stack.size());
      const std::string_view entry = stack.substr(begin, end - begin);
      const std::size_t first = entry.find(',');
      const std::size_t second = first == std::string_view::npos ? first : entry.find(',', first + 1);
      if (second == std::string_view::npos) throw DamagedData("a node has a damaged nn_module_stack");
      const std::string_view path = entry.substr(first + 1, second - first - 1);
      if (!path.empty() && !is_path(path)) throw DamagedData("a node has a damaged nn_module_stack");
      if (node.frames.size() == kMostFrames) throw DamagedData("a node has an nn_module_stack that is too deep");
      node.frames.push_back(frame(std::string(entry.substr(0, second)), std::string(path)));
      begin = end + 1;
    }
  }

  std::size_t frame(std::string call, std::string path) {
    const auto [found, added] = frames_.try_emplace(call, program_.frames.size());
    if (added) program_.frames.push_back({std::move(call), std::move(path)});
    return found->second;
  }

  Output output_of(const Json& json, const std::string& place) {
    const auto [kind, content] = only_member(json, "an output of " + place);
    if (kind == "as_none") return {};
    if (kind == "as_tensor") return {false, {define(JsonObject(content, place).text("name"), ValueKind::kTensor)}};
    if (kind == "as_optional_tensor") return output_of(content, place);
    if (kind == "as_sym_int") return {false, {define(JsonObject(content, place).text("as_name"), ValueKind::kInt)}};
    if (kind == "as_sym_float") return {false, {define(JsonObject(content, place).text("as_name"), ValueKind::kFloat)}};
    if (kind == "as_sym_bool") return {false, {define(JsonObject(content, place).text("as_name"), ValueKind::kBool)}};
    if (kind != "as_tensors" || !content.is_array()) {
      throw Refused(
          fmt::format("{} returns something of the kind '{}', which the library does not know", place, shown(kind)));
    }
    Output list{true, {}};
    for (const Json& tensor : content) {
      list.values.push_back(define(JsonObject(tensor, place).text("name"), ValueKind::kTensor));
    }
    return list;
  }

  // --- arguments --------------------------------------------------------------------------------

  Argument argument(const Json& json, const std::string& place) const {
    const auto [kind, content] = only_member(json, "an argument of " + place);
    Argument made;
    if (kind == "as_string") {
      made.kind = Argument::Kind::kText;
      made.text = text_of(content, place);
    } else if (kind == "as_device") {
      made.kind = Argument::Kind::kDevice;
      made.text = JsonObject(content, place).text("type");
    } else if (kind == "as_scalar_type" || kind == "as_layout" || kind == "as_memory_format") {
      made.kind = kind == "as_scalar_type" ? Argument::Kind::kScalarType
                  : kind == "as_layout"    ? Argument::Kind::kLayout
                                           : Argument::Kind::kMemoryFormat;
      made.code = whole_of(content, place);
    } else if (content.is_array()) {
      made.kind = Argument::Kind::kItems;
      made.tensors = kind == "as_tensors" || kind == "as_optional_tensors";
      const std::string single = kind.substr(0, kind.size() - 1);  // "as_ints" holds what "as_int" does
      if (kind.back() != 's') throw DamagedData(fmt::format("{} has a list as '{}'", place, shown(kind)));
      for (const Json& element : content) made.items.push_back(item(single, element, place));
    } else {
      made.items.push_back(item(kind, content, place));
    }
    return made;
  }

  Item item(const std::string& kind, const Json& content, const std::string& place) const {
    if (kind == "as_none") return std::monostate();
    if (kind == "as_tensor") return tensor(content, place);
    if (kind == "as_int") return whole_of(content, place);
    if (kind == "as_float") return number_of(content, place);
    if (kind == "as_bool") {
      if (!content.is_boolean()) throw DamagedData(fmt::format("{} has an as_bool that is none", place));
      return content.get<bool>();
    }
    if (kind == "as_name") return ValueRef{known(text_of(content, place), place)};
    const bool nested =
        kind == "as_optional_tensor" || kind == "as_sym_int" || kind == "as_sym_float" || kind == "as_sym_bool";
    if (nested) {
      const auto [inner, value] = only_member(content, "an argument of " + place);
      if (inner == kind) throw DamagedData(fmt::format("{} has a '{}' in itself", place, kind));
      return item(inner, value, place);
    }
    throw Refused(
        fmt::format("{} has an argument of the kind '{}', which the library does not know: rewrite that part "
                    "of forward()",
                    place, shown(kind)));
  }

  // --- result -----------------------------------------------------------------------------------

  void read_result(const Json& module, const Json& signature) {
    std::vector<std::optional<ValueId>> leaves;
    for (const Json& spec : JsonObject(signature, "the signature").list("output_specs")) {
      const auto [kind, content] = only_member(spec, "an output of the signature");
      if (kind.find("mutation") != std::string::npos) refuse_mutation(kind, content);
      if (kind != "user_output") {
        throw Refused(fmt::format("it returns a '{}': export the model in eval() mode, for inference", shown(kind)));
      }
      const auto [type, value] = only_member(JsonObject(content, "an output").at("arg"), "an output");
      if (type == "as_none") {
        leaves.emplace_back();
        continue;
      }
      if (type != "as_tensor") {
        throw Refused(
            fmt::format("output {} is no tensor ({}): let forward() return tensors only", leaves.size(), shown(type)));
      }
      leaves.push_back(tensor(value, "an output").id);
    }
    if (std::none_of(leaves.begin(), leaves.end(), [](const auto& leaf) { return leaf.has_value(); })) {
      throw Refused("it returns no tensor");
    }
    program_.result = structure_of(module, leaves);
  }

  [[noreturn]] static void refuse_mutation(const std::string& kind, const Json& content) {
    std::string name = "?";
    for (const char* key : {"buffer_name", "user_input_name", "parameter_name"}) {
      const auto found = content.is_object() ? content.find(key) : content.end();
      if (found != content.end() && found->is_string()) name = found->get<std::string>();
    }
    throw Refused(
        fmt::format("forward() changes '{}' ({}): the library runs layers by themselves, and answers "
                    "requests without running them; let it return what it computes instead",
                    shown(name), shown(kind)));
  }

  /// As the program's out_spec says; a flat tuple where that is neither tuples nor lists.
  static Result structure_of(const Json& module, const std::vector<std::optional<ValueId>>& leaves) {
    Result flat{true, {}, {}};
    for (const auto& leaf : leaves) flat.parts.push_back({false, leaf, {}});
    const auto calls = module.find("module_call_graph");
    if (calls == module.end() || !calls->is_array() || calls->empty()) return leaves.size() == 1 ? flat.parts[0] : flat;
    const Json& signature = JsonObject(calls->front(), "the call graph").at("signature");
    const Json spec = parse_json(JsonObject(signature, "the call graph").text("out_spec"), "its out_spec");
    if (!spec.is_array() || spec.size() != 2) throw DamagedData("its out_spec is not one");
    std::size_t next = 0;
    Result shaped;
    return take_structure(spec[1], leaves, next, shaped, 0) && next == leaves.size() ? shaped : flat;
  }

  static bool take_structure(const Json& spec, const std::vector<std::optional<ValueId>>& leaves, std::size_t& next,
                             Result& result, std::size_t depth) {
    const Json& type = JsonObject(spec, "its out_spec").at("type");
    if (type.is_null()) {
      if (next == leaves.size()) return false;
      result.value = leaves[next++];
      return true;
    }
    if (depth == kMostFrames || (type != "builtins.tuple" && type != "builtins.list")) return false;
    result.tuple = true;
    for (const Json& child : JsonObject(spec, "its out_spec").list("children_spec")) {
      if (!take_structure(child, leaves, next, result.parts.emplace_back(), depth + 1)) return false;
    }
    return true;
  }

  const Json& json_;
  Program program_;
  std::unordered_map<std::string, ValueId> ids_;
  std::unordered_map<std::string, std::size_t> frames_;
};

}  // namespace

std::string place_of(const Program& program, const Node& node) {
  const std::string module = node.frames.empty() ? "" : program.frames[node.frames.back()].path;
  return fmt::format("node '{}' ({}) in {}", shown(node.name), shown(node.target),
                     module.empty() ? "the outermost module" : fmt::format("module '{}'", module));
}

Program parse_program(std::string_view text) {
  const Json json = parse_json(text, "the program");
  return ProgramReader(json).read();
}

}  // namespace llmcache::exported
