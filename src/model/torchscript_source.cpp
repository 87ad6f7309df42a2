#include "model/torchscript_source.h"

#include <algorithm>
#include <cstdint>
#include <exception>

#include "model/probe.h"

namespace llmcache::ts {
namespace {

/// Does the graph take source and target of these lengths?
bool takes_lengths(const Analysis& analysis, const InputSpec& spec, std::int64_t batch, std::int64_t tokens) {
  const Node* made = analysis.flat.graph->outputs()[0]->node();
  try {
    const auto inputs = llmcache::probe_inputs(spec, analysis.device, batch, tokens);
    (void)run_some(analysis.flat, analysis.module, inputs, [&](const Node* node) { return node == made; });
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

/// Both the longer and the shorter one, and several.
bool takes_division(const Analysis& analysis, const std::vector<bool>& source) {
  InputSpec spec;
  spec.vocabulary = analysis.vocabulary;
  spec.source = source;
  return takes_lengths(analysis, spec, 2, 5) && takes_lengths(analysis, spec, 1, probe_source_tokens(1) + 2) &&
         takes_lengths(analysis, spec, 3, probe_source_tokens(3));
}

/// What follows from the ids of one side.
std::unordered_set<const Value*> following_from(const Analysis& analysis, bool source) {
  std::unordered_set<const Value*> all;
  for (std::size_t i = 0; i < analysis.vocabulary.size(); ++i) {
    if (analysis.vocabulary[i] == 0 || analysis.source[i] != source) continue;
    const auto own = dependants(analysis.flat, analysis.flat.input(i));
    all.insert(own.begin(), own.end());
  }
  return all;
}

}  // namespace

int source_argument(const Analysis& analysis) {
  for (std::size_t i = 0; i < analysis.source.size(); ++i) {
    if (analysis.source[i] && analysis.vocabulary[i] > 0) return static_cast<int>(i);
  }
  return -1;
}

std::vector<std::vector<bool>> source_candidates(const Analysis& analysis) {
  constexpr std::size_t kMostInputs = 8;  // their divisions are tried one by one
  const std::size_t inputs = analysis.vocabulary.size();
  const auto ids =
      std::count_if(analysis.vocabulary.begin(), analysis.vocabulary.end(), [](std::int64_t rows) { return rows > 0; });
  if (ids < 2 || inputs > kMostInputs) return {};
  std::vector<std::vector<bool>> found;
  // The last input is on the second side: each division once.
  for (std::uint32_t bits = 1; bits < 1U << (inputs - 1); ++bits) {
    std::vector<bool> source(inputs);
    std::int64_t own_ids = 0;
    for (std::size_t i = 0; i < inputs; ++i) {
      source[i] = (bits >> i & 1U) != 0;
      own_ids += source[i] && analysis.vocabulary[i] > 0 ? 1 : 0;
    }
    if (own_ids == 0 || own_ids == ids || !takes_division(analysis, source)) continue;
    if (!found.empty()) return {};
    found.push_back(source);
    source.flip();
    found.push_back(source);
  }
  return found;
}

bool layers_read_both_sides(const Analysis& analysis) {
  const auto of_source = following_from(analysis, true);
  const auto of_target = following_from(analysis, false);
  const auto& nodes = analysis.flat.graph->nodes();
  return std::any_of(nodes.begin(), nodes.end(), [&](const Node* node) {
    const int part = analysis.flat.part.at(node);
    if (part < 1 || part > analysis.flat.layers) return false;
    const auto outputs = node->outputs();
    return std::any_of(outputs.begin(), outputs.end(),
                       [&](const Value* v) { return of_source.count(v) > 0 && of_target.count(v) > 0; });
  });
}

}  // namespace llmcache::ts
