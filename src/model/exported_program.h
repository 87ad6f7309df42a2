// The graph of an exported program (torch.export), read from the JSON in its archive and checked: what follows needs
// to look for no damage. Needs no LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace llmcache::exported {

/// The major version of the schemas that were tested: that of PyTorch 2.13.
inline constexpr std::int64_t kSchemaMajor = 8;

/// A value of the graph, as its place in Program::values.
using ValueId = std::size_t;

struct ValueRef {
  ValueId id;
  bool operator==(const ValueRef&) const = default;
};

/// None, a constant, or a value of the graph.
using Item = std::variant<std::monostate, bool, std::int64_t, double, ValueRef>;

/// What an operator is called with.
struct Argument {
  enum class Kind : std::uint8_t { kItem, kItems, kText, kScalarType, kLayout, kMemoryFormat, kDevice };
  Kind kind = Kind::kItem;
  std::vector<Item> items;  ///< of kItem and kItems
  bool tensors = false;     ///< items are tensors or None
  std::string text;         ///< of kText; of kDevice its type
  std::int64_t code = 0;    ///< of the other kinds, the number that the schema gives it
  bool operator==(const Argument&) const = default;
};

enum class ValueKind : std::uint8_t { kTensor, kInt, kFloat, kBool };

struct Value {
  std::string name;
  ValueKind kind = ValueKind::kTensor;
  bool operator==(const Value&) const = default;
};

/// What an operator returns at one place: nothing that is used, a value, or a list of tensors.
struct Output {
  bool list = false;
  std::vector<ValueId> values;
  bool operator==(const Output&) const = default;
};

/// A module that is being called while an operator runs.
struct Frame {
  std::string call;  ///< differs between calls of one module
  std::string path;  ///< of the module; the root has none
  bool operator==(const Frame&) const = default;
};

struct Node {
  std::string name;
  std::string target;  ///< "torch.ops.aten.linear.default"
  std::vector<std::pair<std::string, Argument>> inputs;
  std::vector<Output> outputs;
  std::vector<std::size_t> frames;  ///< in Program::frames, the outermost first
  bool operator==(const Node&) const = default;
};

/// What a value stands for that no node makes.
struct Input {
  enum class Kind : std::uint8_t { kUser, kParameter, kBuffer, kConstant };
  Kind kind = Kind::kUser;
  ValueId value = 0;
  std::string name;  ///< of the input, or the dotted path of the weight
  bool operator==(const Input&) const = default;
};

/// What the program returns: a tensor, None, or a tuple of such.
struct Result {
  bool tuple = false;
  std::optional<ValueId> value = std::nullopt;  ///< of no tuple; None
  std::vector<Result> parts;
  bool operator==(const Result&) const = default;
};

/// How many tokens an input may have.
struct TokenRange {
  std::size_t group = 0;  ///< inputs of one group have equally many; the first of them
  std::int64_t most = 0;  ///< that the program was exported for; 0: any number
  bool operator==(const TokenRange&) const = default;
};

struct Program {
  std::string torch_version;
  std::vector<Value> values;
  std::vector<Frame> frames;
  std::vector<Input> inputs;
  std::vector<Node> nodes;
  Result result;
  std::vector<TokenRange> tokens;  ///< by input of the caller
  bool operator==(const Program&) const = default;
};

/// "node 'linear_3' (torch.ops.aten.linear.default) in module 'model.encoder.layer.0'"
std::string place_of(const Program& program, const Node& node);

/// Throws DamagedData, or Refused with what is in the way.
Program parse_program(std::string_view text);

}  // namespace llmcache::exported
