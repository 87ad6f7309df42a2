// What is found in the graph of a TorchScript module before it is a Model. Internal to model/torchscript*.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "llmcache/options.h"
#include "model/graph_findings.h"
#include "model/torchscript_dependence.h"
#include "model/torchscript_graph.h"
#include "model/torchscript_token_choice.h"

namespace llmcache::ts {

/// What follows from the source of an encoder-decoder alone (model/torchscript_source_part.h).
struct SourcePart {
  std::vector<Node*> nodes;             ///< that compute it, in front of the layers, in order
  std::unordered_set<const Node*> own;  ///< of these, those that nothing else needs
  std::vector<const Value*> values;     ///< what the rest takes of it; empty: there is no such part
  std::string obstacle;                 ///< why; empty: there is no source
};

/// What analysis of the graph found; shared by whole-layer and token-level operation.
struct Analysis {
  Module module;
  std::shared_ptr<torch::jit::CompilationUnit> code;  ///< of the module as it was given: what is raised names its parts
  std::shared_ptr<GraphFindings> findings;            ///< of runs of the graph
  at::Device device = at::kCPU;
  FlatGraph flat;
  ValueInfos infos;
  std::optional<std::vector<ValueInfo>> result;       ///< of each tensor in the result; none: their number varies
  std::unordered_set<const Value*> dependent;         ///< on the hidden state that enters the first layer
  std::unordered_map<const Value*, Value*> detached;  ///< dependent scalars and their twins made from the input
  std::vector<Value*> hidden;                         ///< hidden[l] enters layer l; hidden[L] is the final state
  std::vector<std::int64_t> hidden_argument;
  std::int64_t hidden_size = 0;          ///< of the hidden state
  std::string path;                      ///< of the container of the layers
  std::vector<std::int64_t> vocabulary;  ///< per input
  std::vector<bool> source;              ///< per input: InputSpec::source; empty: there is none
  std::int64_t max_tokens = 0;           ///< that tables of positions have room for; 0: unknown
  std::int64_t max_source_tokens = 0;    ///< likewise
  int ids_argument = 0;
  std::string obstacle;  ///< why parts of a batch cannot be run, found in the graph; empty: nothing was
  SourcePart source_part;
  TokenChoice choice;      ///< by the head, if it reads one token a row
  Dependence dependence;   ///< of numbers on lengths, rows and ids
  bool rows_meet = false;  ///< the graph chooses its way by what all rows of a batch hold, or by how many they are

  /// Top-level nodes of a part, in order. Part 0 holds all that does not depend on hidden states.
  [[nodiscard]] std::vector<Node*> nodes(std::int64_t part) const;
  /// Values of `defined` that are used by nodes outside it or returned.
  [[nodiscard]] std::vector<const Value*> escaping(const std::vector<Node*>& defined) const;
};

/// Deterministic token-level inputs for probing: in range for every embedding, masks all ones.
Inputs probe_inputs(const Analysis& analysis, std::int64_t batch, std::int64_t tokens);

/// Runs nothing if the findings are known; fills them otherwise. Throws Error(kUnsupportedModel) with the reason, and
/// anything where known findings do not fit the module.
Analysis analyse(const Module& module, const Options& options, std::shared_ptr<GraphFindings> findings);

/// Drops nodes whose values nobody uses, and all that is known of them.
void remove_dead(Analysis& analysis);

}  // namespace llmcache::ts
