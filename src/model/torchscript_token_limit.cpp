// The longest sequence that a model has positions for, read off from runs of three shapes.
#include <torch/csrc/jit/ir/ir.h>

#include <algorithm>
#include <array>
#include <optional>

#include "model/probe.h"
#include "model/torchscript_graph.h"

namespace llmcache::ts {
namespace {

using Runs = std::vector<Values>;
using Lengths = std::array<std::int64_t, 3>;  // by run

/// How far the largest number of an integer tensor is above the number of tokens, if it is as far in all runs.
std::optional<std::int64_t> above_tokens(const Runs& runs, const Lengths& lengths, const Value* value) {
  std::optional<std::int64_t> above;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto found = runs[i].find(value);
    if (found == runs[i].end() || !found->second.isTensor()) return std::nullopt;
    const at::Tensor& tensor = found->second.toTensor();
    if (!tensor.defined() || tensor.numel() == 0 || !at::isIntegralType(tensor.scalar_type(), false))
      return std::nullopt;
    const std::int64_t here = tensor.max().item<std::int64_t>() - lengths[i];
    if (above && *above != here) return std::nullopt;
    above = here;
  }
  return above;
}

/// Positions that an embedding has rows for: its indices are the tokens' places, from some number on.
std::int64_t of_embedding(const Node& node, const FlatGraph& flat, const Module& module, const Runs& runs,
                          const Lengths& lengths) {
  constexpr std::int64_t kMostAbove = 8;  // places count from 0, or from behind a padding id
  const auto weight = attribute_tensor(node.input(0), flat.self(), module);
  const auto above = above_tokens(runs, lengths, node.input(1));
  if (!weight.defined() || weight.dim() != 2 || !above || *above < -1 || *above > kMostAbove) return 0;
  return weight.size(0) - 1 - *above;
}

/// Size of a table of which as many entries are taken as there are tokens.
std::int64_t of_slice(const Node& node, const Runs& runs, const Lengths& lengths) {
  std::array<at::Tensor, 2> tensors[3];
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const Value* values[] = {node.input(0), node.output()};
    for (std::size_t j = 0; j < 2; ++j) {
      const auto found = runs[i].find(values[j]);
      if (found == runs[i].end() || !found->second.isTensor() || !found->second.toTensor().defined()) return 0;
      tensors[i][j] = found->second.toTensor();
      if (tensors[i][j].is_nested() || tensors[i][j].dim() != tensors[0][0].dim()) return 0;
    }
  }
  for (std::int64_t d = 0; d < tensors[0][0].dim(); ++d) {
    const std::int64_t whole = tensors[0][0].size(d);
    bool follows = true;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      follows = follows && tensors[i][0].size(d) == whole && tensors[i][1].size(d) == lengths[i];
    }
    if (follows && whole > std::ranges::max(lengths)) return whole;
  }
  return 0;
}

/// The least room that a table of places of `lengths` has; 0: there is no such table.
std::int64_t least_room(const FlatGraph& flat, const Module& module, const Runs& runs, const Lengths& lengths) {
  std::int64_t least = 0;
  for (const Node* node : flat.graph->nodes()) {
    const std::int64_t limit = node->kind() == c10::aten::embedding ? of_embedding(*node, flat, module, runs, lengths)
                               : node->kind() == c10::aten::slice   ? of_slice(*node, runs, lengths)
                                                                    : 0;
    if (limit > 0) least = least == 0 ? limit : std::min(least, limit);
  }
  return least;
}

}  // namespace

TokenLimits token_limits(const FlatGraph& flat, const Module& module, const Runs& runs, bool with_source) {
  Lengths tokens{};
  Lengths source_tokens{};
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = kLabelShapes[i][1];
    source_tokens[i] = probe_source_tokens(kLabelShapes[i][0]);
  }
  return {least_room(flat, module, runs, tokens), with_source ? least_room(flat, module, runs, source_tokens) : 0};
}

}  // namespace llmcache::ts
