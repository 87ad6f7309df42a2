// Layers that do with their input what the layer before does with its own: one run tells of all. Internal to
// model/torchscript*.
#pragma once

#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model/torchscript_graph.h"

namespace llmcache::ts {

/// All layers but the first two repeat the second, operator by operator, on weights of the same shapes.
struct RepeatedLayers {
  /// What a value of a later layer is in the second, and one of the second in the first.
  std::unordered_map<const Value*, const Value*> in_second, in_first;
  /// What enters the first layer, and what enters the second in its place.
  std::vector<std::pair<const Value*, const Value*>> entering;
};

/// Nothing: they do not, or some operator's shapes follow from its data.
std::optional<RepeatedLayers> find_repetition(const FlatGraph& flat, const Module& module);

/// As label_values() of runs of the whole graph, with all runs in `runs`: those go through the first two layers only.
/// Nothing if labels do not repeat as the layers do.
std::optional<ValueInfos> label_repeated(const FlatGraph& flat, const Module& module, const std::vector<Inputs>& inputs,
                                         bool with_source, std::vector<Values>& runs);

}  // namespace llmcache::ts
