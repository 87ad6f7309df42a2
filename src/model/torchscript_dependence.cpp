#include "model/torchscript_dependence.h"

#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <string_view>

#include "model/torchscript_analysis.h"
#include "model/torchscript_operators.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;
using Kind = Label::Kind;
using Names = std::unordered_set<std::string_view>;

/// How a number follows from something: not at all, so that every change of it shows, or so that it may stay the same
/// on all sizes that are tried.
enum class Way : std::uint8_t { kNone, kSmooth, kStepped };

Way later(Way a, Way b) { return std::max(a, b); }

struct Taint {
  Way length = Way::kNone;
  Way rows = Way::kNone;
  Way source = Way::kNone;    ///< of the length of the source
  bool row_index = false;     ///< counts the rows of the batch
  bool hidden = false;        ///< follows from hidden states
  bool raw = false;           ///< holds numbers of an input as they are
  bool count = false;         ///< how many tokens of a row are marked
  std::uint64_t inputs = 0;   ///< that its content follows from, a bit each
  std::optional<Label> size;  ///< is a size of the input, and nothing else
  const Node* length_from = nullptr;
  const Node* rows_from = nullptr;
  const Node* source_from = nullptr;

  void add(const Taint& other) {
    if (length_from == nullptr || other.length > length)
      length_from = other.length_from ? other.length_from : length_from;
    if (rows_from == nullptr || other.rows > rows) rows_from = other.rows_from ? other.rows_from : rows_from;
    if (source_from == nullptr || other.source > source)
      source_from = other.source_from ? other.source_from : source_from;
    length = later(length, other.length);
    rows = later(rows, other.rows);
    source = later(source, other.source);
    row_index = row_index || other.row_index;
    hidden = hidden || other.hidden;
    inputs |= other.inputs;
  }
  void set_length(Way way, const Node* node) {
    if (way > length) length_from = node;
    length = later(length, way);
  }
  void set_rows(Way way, const Node* node) {
    if (way > rows) rows_from = node;
    rows = later(rows, way);
  }
  void set_source(Way way, const Node* node) {
    if (way > source) source_from = node;
    source = later(source, way);
  }
};

class Follower {
 public:
  explicit Follower(const Analysis& analysis) : analysis_(analysis), inputs_(analysis.flat.graph->inputs().size() - 1) {
    found_.pairs.resize(inputs_);
    found_.compared.resize(inputs_);
  }

  Dependence run() {
    for (std::size_t i = 0; i < inputs_; ++i) {
      Taint& own = taints_[analysis_.flat.input(i)];
      own.inputs = std::uint64_t{1} << std::min<std::size_t>(i, 63);
      own.raw = true;
    }
    visit(analysis_.flat.graph->block());
    return std::move(found_);
  }

 private:
  const Taint& of(const Value* value) { return taints_[value]; }

  void visit(const torch::jit::Block* block) {
    for (const Node* node : block->nodes()) follow(node);
    for (const Value* output : block->outputs()) {
      if (block == analysis_.flat.graph->block()) reaches_result(of(output), nullptr);
    }
  }

  void follow(const Node* node) {
    if (!node->blocks().empty()) {
      follow_blocks(node);
    } else {
      const Taint made = taint_of(node);
      for (std::size_t i = 0; i < node->outputs().size(); ++i) {
        Taint& own = taints_[node->output(i)] = made;
        if (node->outputs().size() > 1 || is_extraction(node)) refine_size(node->output(i), own);
      }
    }
    for (const Value* output : node->outputs()) {
      if (output != analysis_.hidden[0]) continue;
      reaches_result(of(output), node);
      taints_[output] = {};
      taints_[output].hidden = true;
    }
  }

  /// The way that a branch takes counts for all that it makes; a loop is followed twice, so that what it carries
  /// arrives.
  void follow_blocks(const Node* node) {
    Taint control;
    for (const Value* input : node->inputs()) {
      if (node->kind() == prim::If || input->type()->kind() != c10::TypeKind::TensorType) control.add(of(input));
    }
    if (node->kind() == prim::Loop) {
      control = of(node->input(0));
      control.add(of(node->input(1)));
    }
    step(control, node);
    for (int round = 0; round < (node->kind() == prim::Loop ? 2 : 1); ++round) {
      for (const torch::jit::Block* block : node->blocks()) {
        const std::size_t skip = node->kind() == prim::Loop ? 1 : 0;  // the counter
        for (std::size_t i = 0; i < block->inputs().size(); ++i) {
          Taint& own = taints_[block->inputs()[i]];
          own = i < skip ? control : of(node->input(i + 2 - skip));
          if (round > 0 && i >= skip) own.add(of(block->outputs()[i]));
        }
        visit(block);
      }
    }
    for (std::size_t i = 0; i < node->outputs().size(); ++i) {
      Taint all = control;
      for (const torch::jit::Block* block : node->blocks()) {
        const std::size_t skip = node->kind() == prim::Loop ? 1 : 0;
        all.add(of(block->outputs()[i + skip]));
      }
      if (node->kind() == prim::Loop) all.add(of(node->input(i + 2)));
      all.size.reset();
      if (all.hidden) reaches_result(control, node);
      taints_[node->output(i)] = all;
    }
  }

  [[nodiscard]] const ValueInfo* tensor_info(const Value* value) const {
    const auto it = analysis_.infos.find(value);
    return it == analysis_.infos.end() || !it->second.is_tensor() ? nullptr : &it->second;
  }
  static int tokens(const ValueInfo* info) {
    return info == nullptr ? 0 : info->count(Kind::kTokens) + info->count(Kind::kBatchTokens);
  }
  static int rows(const ValueInfo* info) {
    return info == nullptr
               ? 0
               : info->count(Kind::kBatch) + info->count(Kind::kBatchTokens) + info->count(Kind::kBatchSource);
  }
  static bool is_tensor(const Value* value) { return value->type()->isSubtypeOf(*c10::TensorType::get()); }
  static std::string_view name_of(const Node* node) { return node->kind().toUnqualString(); }

  static bool is_extraction(const Node* node) {
    const auto name = name_of(node);
    return name == "size" || name == "len" || name == "numel" || name == "__getitem__";
  }

  /// A number taken out of a list of sizes is one of them: which, its label tells.
  void refine_size(const Value* value, Taint& taint) const {
    const auto it = analysis_.infos.find(value);
    if (it == analysis_.infos.end() || is_tensor(value)) return;
    const Label& label = it->second.integer;
    if (label.kind == Kind::kUnknown || taint.inputs != 0 || taint.length == Way::kStepped ||
        taint.rows == Way::kStepped) {
      return;
    }
    const bool over_tokens = label.kind == Kind::kTokens || label.kind == Kind::kBatchTokens;
    const bool over_rows =
        label.kind == Kind::kBatch || label.kind == Kind::kBatchTokens || label.kind == Kind::kBatchSource;
    const bool over_source = label.kind == Kind::kSource || label.kind == Kind::kBatchSource;
    if (!over_source && taint.source != Way::kStepped) taint.source = Way::kNone;
    if (!over_tokens) taint.length = Way::kNone;
    if (!over_rows) taint.rows = Way::kNone;
    taint.size = label;
  }

  /// Is this input of a node a shape, a dimension or the like, rather than a number that counts by its value?
  static bool is_shape(const Node* node, std::size_t input) {
    // clang-format off
    static const Names kByValue{"tril", "triu", "tril_", "triu_", "roll", "one_hot", "pow",
                                 "repeat_interleave", "tensor", "scalar_tensor", "as_tensor"};
    // clang-format on
    const auto* schema = node->maybeSchema();
    if (schema == nullptr || input >= schema->arguments().size()) return false;
    const auto& type = schema->arguments()[input].type();
    const bool whole =
        type->kind() == c10::TypeKind::IntType ||
        (type->kind() == c10::TypeKind::ListType &&
         type->expect<c10::ListType>()->getElementType()->kind() == c10::TypeKind::IntType) ||
        (type->kind() == c10::TypeKind::OptionalType && !type->isSubtypeOf(*c10::OptionalType::ofTensor()) &&
         type->str().find("float") == std::string::npos && type->str().find("number") == std::string::npos &&
         type->str().find("Scalar") == std::string::npos);
    if (!whole) return false;
    const bool makes_tensor = std::any_of(node->outputs().begin(), node->outputs().end(), [](const Value* v) {
      return is_tensor(v) || v->type()->kind() == c10::TypeKind::ListType;
    });
    return makes_tensor && !kByValue.count(name_of(node));
  }

  static std::optional<std::int64_t> constant(const Value* value) {
    const auto held = torch::jit::toIValue(value);
    return held && held->isInt() ? std::optional(held->toInt()) : std::nullopt;
  }

  /// Label of dimension `dim` of a tensor; null if it is not known.
  const Label* label(const Value* value, const Value* dim) const {
    const auto* info = tensor_info(value);
    auto d = constant(dim);
    if (info == nullptr || !d) return nullptr;
    if (*d < 0) *d += static_cast<std::int64_t>(info->dims.size());
    return *d < 0 || *d >= static_cast<std::int64_t>(info->dims.size()) ? nullptr
                                                                        : &info->dims[static_cast<std::size_t>(*d)];
  }

  /// From here on it may stay the same where what it is made of does not.
  static void step(Taint& taint, const Node* node) {
    if (taint.length == Way::kSmooth) taint.set_length(Way::kStepped, node);
    if (taint.rows == Way::kSmooth || taint.row_index) taint.set_rows(Way::kStepped, node);
    if (taint.source == Way::kSmooth) taint.set_source(Way::kStepped, node);
    taint.size.reset();
  }

  /// What has entries for several tokens, or rows, is put together over them.
  static void mix_tokens(Taint& taint, const Node* node, bool sums) {
    if (taint.hidden) return;
    const bool ids = taint.inputs != 0 && !sums;
    taint.set_length(ids ? Way::kStepped : Way::kSmooth, node);
  }

  [[nodiscard]] bool marks_only(std::uint64_t inputs) const {
    for (std::size_t i = 0; i < inputs_; ++i) {
      if ((inputs >> std::min<std::size_t>(i, 63) & 1U) && (analysis_.vocabulary[i] != 0)) return false;
    }
    return true;
  }

  Taint taint_of(const Node* node) {
    const auto name = name_of(node);
    if (node->kind() == prim::Constant || node->kind() == prim::GetAttr || is_about_the_type(name)) return {};
    if (name == "size" || name == "len" || name == "numel" || name == "sym_size") {
      Taint taint;
      taint.set_length(Way::kSmooth, node);
      taint.set_rows(Way::kSmooth, node);
      if (!analysis_.source.empty()) taint.set_source(Way::kSmooth, node);
      if (const auto* info = tensor_info(node->input(0));
          info != nullptr && tokens(info) == 0 && rows(info) == 0 &&
          info->count(Kind::kUnknown) + info->count(Kind::kSource) == 0) {
        return {};  // of a weight
      }
      return taint;
    }
    if (name == "arange") return arange(node);
    if (is_filled(name)) return filled(node, name);
    if (name == "sub" && node->inputs().size() >= 2) {
      const auto& a = of(node->input(0)).size;
      const auto& b = of(node->input(1)).size;
      if (a && b && *a == *b) return {};  // how much longer the keys are than the queries: nothing
    }
    Taint all;
    bool any_tensor = false;
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      if (is_shape(node, i) || (i > 0 && only_first_counts(name))) continue;
      all.add(of(node->input(i)));
      any_tensor = any_tensor || is_tensor(node->input(i));
    }
    all.size.reset();
    if (passes_size(name)) all.size = of(node->input(0)).size;
    const bool moves = is_structural(name) && !node->inputs().empty();
    all.raw = moves && of(node->input(0)).raw;
    all.count = moves && of(node->input(0)).count;
    note_comparison(node, name);
    if (node == analysis_.choice.node) return chosen(node);
    if (name == "slice" || name == "narrow" || name == "select") return part(node, name, all);
    if (name == "index") all = indexed(node, all);
    if (name == "gather" || name == "index_select" || name == "take_along_dim") {
      // A look-up, where the table is the same for all.
      const Taint& table = of(node->input(0));
      if (table.inputs == 0 && table.length == Way::kNone && table.rows == Way::kNone && !table.hidden && !all.hidden) {
        step(all, node);
        return all;
      }
    }
    if (name == "cumsum" || name == "flip" || name == "roll") return along(node, name, all);
    if (all.hidden) {
      meets_hidden(node);
      return hidden_result(node, all);
    }
    const bool reduces = any_tensor && reduction(node, name, all);
    if (reduces && name == "sum") {
      all.count = of(node->input(0)).raw && marks_only(all.inputs);
    } else if (!is_structural(name) && !is_smooth(name) && !keeps_from_zero(node, name)) {
      step(all, node);
    }
    return all;
  }

  /// A count that is kept from being zero, as those who divide by it do: nothing for a sequence with a token.
  bool keeps_from_zero(const Node* node, std::string_view name) {
    if ((name != "clamp" && name != "clamp_min") || node->inputs().size() < 2 || !of(node->input(0)).count)
      return false;
    const auto low = torch::jit::toIValue(node->input(1));
    const bool at_most_one = low && ((low->isInt() && low->toInt() <= 1) || (low->isDouble() && low->toDouble() <= 1));
    return at_most_one && (node->inputs().size() < 3 || node->input(2)->type()->kind() == c10::TypeKind::NoneType);
  }

  /// The other tensors tell a type or a shape.
  static bool only_first_counts(std::string_view name) {
    return name == "type_as" || name == "expand_as" || name == "view_as" || name == "reshape_as" || name == "to";
  }

  static bool passes_size(std::string_view name) {
    return name == "NumToTensor" || name == "Int" || name == "IntImplicit" || name == "ScalarImplicit" ||
           name == "unchecked_cast";
  }

  Taint arange(const Node* node) {
    const auto* schema = node->maybeSchema();
    Taint taint;
    Taint end;
    for (std::size_t i = 0; schema != nullptr && i < node->inputs().size(); ++i) {
      const auto& argument = schema->arguments()[i].name();
      if (argument == "start" || argument == "step") taint.add(of(node->input(i)));
      if (argument == "end") end = of(node->input(i));
    }
    taint.size.reset();
    const auto* info = tensor_info(node->output());
    const bool counts_rows = info == nullptr ? end.rows != Way::kNone : rows(info) > 0;
    if (counts_rows) {
      taint.row_index = true;
      taint.rows_from = node;
    }
    return taint;
  }

  Taint filled(const Node* node, std::string_view name) {
    Taint taint;
    const auto* schema = node->maybeSchema();
    for (std::size_t i = 0; schema != nullptr && i < node->inputs().size(); ++i) {
      if (schema->arguments()[i].name() == "fill_value") taint.add(of(node->input(i)));
    }
    taint.size.reset();
    if (name == "eye") taint.inputs = 0;
    return taint;
  }

  /// A part of a tensor along a dimension.
  Taint part(const Node* node, std::string_view name, Taint all) {
    const Value* whole = node->input(0);
    const auto* along = label(whole, node->input(1));
    const bool is_slice = name == "slice" && node->inputs().size() >= 4;
    const Value* start = name == "slice" ? (is_slice ? node->input(2) : nullptr) : node->input(2);
    Taint from = start == nullptr ? Taint{} : of(start);
    all = of(whole);
    all.size.reset();
    const auto first = start == nullptr ? std::optional<std::int64_t>(0) : constant(start);
    const bool none = start != nullptr && start->type()->kind() == c10::TypeKind::NoneType;
    from.size.reset();
    all.add(from);  // where it begins decides what it holds
    if (is_slice) {
      const Value* end = node->input(3);
      const auto last = constant(end);
      const bool whole_end = end->type()->kind() == c10::TypeKind::NoneType || of(end).length != Way::kNone ||
                             of(end).rows != Way::kNone || !last || *last >= std::numeric_limits<std::int32_t>::max();
      if (none || (first && *first == 0)) {
        if (whole_end) return finish(node, all);
      }
    }
    if (along == nullptr) return finish(node, all);
    const bool fixed_front = name == "select" && first && *first >= 0;
    if ((along->kind == Kind::kTokens || along->kind == Kind::kBatchTokens) && !fixed_front && !all.hidden) {
      all.set_length(all.inputs != 0 ? Way::kStepped : Way::kSmooth, node);
    }
    if ((along->kind == Kind::kBatch || along->kind == Kind::kBatchTokens)) {
      const auto* info = tensor_info(node->output());
      if (along->kind == Kind::kBatch || info == nullptr || rows(info) == 0) all.set_rows(Way::kStepped, node);
    }
    return finish(node, all);
  }

  /// Of a part of hidden states.
  Taint finish(const Node* node, Taint all) {
    if (!all.hidden) return all;
    reaches_result(all, node);
    Taint hidden;
    hidden.hidden = true;
    return hidden;
  }

  /// The token that the head chooses may be any: which it is, is known of each request.
  Taint chosen(const Node* node) {
    Taint position = of(analysis_.choice.position);
    position.length = Way::kNone;
    reaches_result(position, node);
    Taint hidden;
    hidden.hidden = true;
    return hidden;
  }

  /// The rows' own numbers as indices of the rows pick what belongs to each.
  Taint indexed(const Node* node, Taint all) {
    const Node* list = node->inputs().size() > 1 ? node->input(1)->node() : nullptr;
    if (list == nullptr || list->kind() != prim::ListConstruct || list->inputs().empty()) return all;
    Taint taint = of(node->input(0));
    taint.size.reset();
    const auto* info = tensor_info(node->input(0));
    for (std::size_t i = 0; i < list->inputs().size(); ++i) {
      Taint own = of(list->input(i));
      const bool of_rows = info != nullptr && i < info->dims.size() && info->dims[i].kind == Kind::kBatch;
      if (of_rows && own.row_index && own.rows == Way::kNone) own.row_index = false;
      taint.add(own);
    }
    return taint;
  }

  Taint along(const Node* node, std::string_view name, Taint all) {
    if (all.hidden) {
      const Label* over = name == "cumsum" ? label(node->input(0), node->input(1)) : nullptr;
      if (over != nullptr && (over->kind == Kind::kBatch || over->kind == Kind::kBatchTokens)) {
        found(found_.rows, node, node, "what other rows of the batch hold");
      }
      return hidden_result(node, all);
    }
    const auto* info = tensor_info(node->input(0));
    const Label* over = name == "cumsum" ? label(node->input(0), node->input(1)) : nullptr;
    const bool over_tokens = over == nullptr ? tokens(info) > 0 : over->kind == Kind::kTokens;
    const bool over_rows = over == nullptr ? name != "flip" && rows(info) > 0
                                           : over->kind == Kind::kBatch || over->kind == Kind::kBatchTokens;
    if (name != "cumsum" && over_tokens) mix_tokens(all, node, false);
    if (over_rows && name == "cumsum") all.set_rows(Way::kStepped, node);
    if (name != "cumsum") step(all, node);
    return all;
  }

  /// A product that sums over a dimension of two computed tensors, or a choice among the entries of one.
  [[nodiscard]] static bool contracts(const Node* node, std::string_view name) {
    static const Names kNames{"matmul", "bmm", "mm", "einsum", "addmm", "baddbmm", "index", "linear", "outer"};
    if (!kNames.count(name)) return false;
    const auto is_weight = [](const Value* value) {
      return value->node()->kind() == prim::GetAttr || value->node()->kind() == prim::Constant;
    };
    std::size_t computed = 0;
    for (const Value* input : node->inputs()) computed += is_tensor(input) && !is_weight(input) ? 1 : 0;
    return computed > 1 || name == "einsum" || name == "index";
  }

  /// True if the node puts together what has one entry a token, or a row.
  bool reduction(const Node* node, std::string_view name, Taint& all) {
    int tokens_in = 0;
    int rows_in = 0;
    bool known = true;
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      if (!is_tensor(node->input(i)) || (i > 0 && only_first_counts(name))) continue;
      if (name == "embedding" && i == 0) continue;
      const auto* info = tensor_info(node->input(i));
      known = known && (info != nullptr || !is_tensor(node->input(i)));
      tokens_in = std::max(tokens_in, tokens(info));
      rows_in = std::max(rows_in, rows(info));
    }
    const bool sums = (name == "sum" || name == "mean") && marks_only(all.inputs);
    const bool normalises = name == "softmax" || name == "log_softmax" || name == "_softmax";
    const bool extreme = (name == "max" || name == "min") && (node->inputs().size() == 1 || !is_tensor(node->input(1)));
    const bool unknown_kind = !is_structural(name) && !is_smooth(name) && (!is_elementwise(name) || extreme);
    bool reduces = false;
    for (const Value* output : node->outputs()) {
      const auto* info = tensor_info(output);
      if (is_structural(name) && (info == nullptr || info->count(Kind::kUnknown) > 0)) continue;
      // Inside a branch nothing is known of shapes; these keep them.
      if (is_tensor(output) && info == nullptr && !unknown_kind && !normalises && !contracts(node, name)) continue;
      if (info == nullptr && known && !is_tensor(output)) {
        // A number taken from a tensor: item(), Bool(), Int().
        if (tokens_in == 0 && rows_in == 0) continue;
      }
      if (tokens(info) < tokens_in || (unknown_kind && tokens_in > 0) || (normalises && tokens_in > 0)) {
        mix_tokens(all, node, sums);
        reduces = true;
      }
      if (rows(info) < rows_in) {
        all.set_rows(Way::kStepped, node);
        reduces = true;
      }
    }
    if (!known && (unknown_kind || contracts(node, name)) && !all.hidden) {
      mix_tokens(all, node, false);
      if (all.inputs != 0) all.set_rows(Way::kStepped, node);
    }
    return reduces;
  }

  /// A node that works on hidden states: what else enters it must not follow from lengths or rows by steps.
  void meets_hidden(const Node* node) {
    const bool pairs = std::any_of(node->outputs().begin(), node->outputs().end(), [&](const Value* v) {
      const auto* info = tensor_info(v);
      return info != nullptr && tokens(info) >= 2;
    });
    const bool attends = name_of(node) == "scaled_dot_product_attention";
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      if (is_shape(node, i)) continue;
      const Value* input = node->input(i);
      const Taint& own = of(input);
      if (own.hidden) continue;
      reaches_result(own, node);
      if (own.inputs == 0 || !(pairs || attends)) continue;
      const auto* info = tensor_info(input);
      if (info != nullptr && tokens(info) == 0) continue;
      for (std::size_t a = 0; a < inputs_; ++a) {
        if (!(own.inputs >> std::min<std::size_t>(a, 63) & 1U) || !found_.pairs[a].empty()) continue;
        found_.pairs[a] = fmt::format("which tokens attend to which follows from input '{}' ({})",
                                      analysis_.flat.input(a)->debugName(), where(node));
      }
    }
  }

  Taint hidden_result(const Node* node, const Taint& all) {
    Taint result;
    result.hidden = true;
    // What is a number still may only decide whether there is a result.
    const bool number = std::all_of(node->outputs().begin(), node->outputs().end(), [&](const Value* v) {
      const auto* info = tensor_info(v);
      return !is_tensor(v) || (info != nullptr && info->dims.empty());
    });
    if (all.rows == Way::kStepped && number) {
      result.set_rows(Way::kStepped, all.rows_from);
    } else if (all.rows == Way::kStepped) {
      found(found_.rows, all.rows_from, node, "what the rows of the batch hold, or from how many they are");
    }
    // Statistics over the rows of a batch.
    int rows_in = 0;
    for (const Value* input : node->inputs()) {
      const auto* info = is_tensor(input) && of(input).hidden ? tensor_info(input) : nullptr;
      if (info != nullptr && info->count(Kind::kUnknown) == 0) rows_in = std::max(rows_in, rows(info));
    }
    // clang-format off
    static const Names kStatistics{"sum",  "mean",   "var",       "std",    "norm", "max",  "min",       "amax",
                                   "amin", "median", "logsumexp", "any",    "all",  "prod", "batch_norm", "argmax",
                                   "var_mean", "std_mean", "linalg_vector_norm", "quantile", "sort", "topk"};
    // clang-format on
    const auto name = name_of(node);
    for (const Value* output : node->outputs()) {
      const auto* info = tensor_info(output);
      if (info == nullptr || info->count(Kind::kUnknown) > 0 || rows(info) >= rows_in) continue;
      if (kStatistics.count(name)) result.set_rows(Way::kStepped, node);
    }
    return result;
  }

  static std::string where(const Node* node) {
    std::string text = node->kind().toQualString();
    if (const auto range = node->sourceRange().file_line_col()) {
      const auto& [file, line, column] = *range;
      const auto slash = file.find_last_of('/');
      text += fmt::format(" at {}:{}", slash == std::string::npos ? file : file.substr(slash + 1), line);
    }
    return text;
  }

  static void found(std::string& text, const Node* from, const Node* at, const char* what) {
    if (!text.empty()) return;
    text = fmt::format("numbers follow from {}, by {}{}", what, from == nullptr ? "a step" : where(from),
                       at == nullptr || at == from ? "" : ", used by " + where(at));
  }

  void reaches_result(const Taint& taint, const Node* at) {
    if (taint.length == Way::kStepped) {
      found(found_.length, taint.length_from, at, "the length of the sequence, or from all of its tokens together");
    }
    if (taint.source == Way::kStepped) {
      found(found_.source_length, taint.source_from, at, "the length that the source is padded to");
    }
    if (taint.rows == Way::kStepped)
      found(found_.rows, taint.rows_from, at, "what the rows of the batch hold, or from how many they are");
  }

  /// Numbers that an input is compared with.
  void note_comparison(const Node* node, std::string_view name) {
    static const Names kComparing{"eq", "ne", "lt", "le", "gt", "ge", "isin"};
    if (!kComparing.count(name) || node->inputs().size() < 2) return;
    for (const std::size_t side : {std::size_t{0}, std::size_t{1}}) {
      const Taint& own = of(node->input(side));
      if (own.inputs == 0) continue;
      for (const std::int64_t number : numbers(node->input(1 - side))) {
        for (std::size_t a = 0; a < inputs_; ++a) {
          auto& known = found_.compared[a];
          if (!(own.inputs >> std::min<std::size_t>(a, 63) & 1U) || known.size() >= kMostNumbers) continue;
          if (std::find(known.begin(), known.end(), number) == known.end()) known.push_back(number);
        }
      }
    }
  }

  /// The whole numbers that a constant or an attribute holds, if these are few.
  [[nodiscard]] std::vector<std::int64_t> numbers(const Value* value) const {
    auto held = torch::jit::toIValue(value);
    if (!held) {
      const auto tensor = attribute_tensor(value, analysis_.flat.self(), analysis_.module);
      if (tensor.defined()) held = tensor;
    }
    if (!held) return {};
    if (held->isInt()) return {held->toInt()};
    if (held->isDouble()) return {static_cast<std::int64_t>(std::clamp(held->toDouble(), -1e9, 1e9))};
    if (!held->isTensor() || !held->toTensor().defined() || held->toTensor().numel() > 16) return {};
    const auto all = held->toTensor().cpu().to(at::kLong).reshape({-1}).contiguous();
    return {all.const_data_ptr<std::int64_t>(), all.const_data_ptr<std::int64_t>() + all.numel()};
  }

  static constexpr std::size_t kMostNumbers = 16;

  const Analysis& analysis_;
  const std::size_t inputs_;
  std::unordered_map<const Value*, Taint> taints_;
  Dependence found_;
};

}  // namespace

Dependence find_dependence(const Analysis& analysis) { return Follower(analysis).run(); }

}  // namespace llmcache::ts
