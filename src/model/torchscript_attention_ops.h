// Attention attention operators of a layer: where its graph mixes the tokens of a sequence. Internal to
// model/torchscript*.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// What an input of an attention region is, seen from one sequence.
enum class Role {
  kQuery,   ///< per token; cut to the active tokens
  kKey,     ///< per token; covers all tokens of the sequence
  kSide,    ///< does not depend on hidden states: masks, biases, tables; cut to the sequence
  kLength,  ///< an integer that follows from batch and tokens
  kFixed,   ///< anything else; the same for all sequences
};

struct AttentionInput {
  const Value* value = nullptr;
  Role role = Role::kFixed;
  int token_dim = -1;             ///< of query and key inputs
  int batch_dim = -1;             ///< of side inputs
  std::int64_t batch_factor = 1;  ///< entries a row of the batch has there (heads merged with batch)
  int query_dim = -1;             ///< of side inputs: dimension that runs over active tokens
  int key_dim = -1;               ///< of side inputs: dimension that runs over all tokens
  Label length;                   ///< of kLength
  bool length_of_keys = true;     ///< kLength counts keys, else queries
};

/// A part of a layer's graph in which tokens meet: scores are made, normalised and applied.
struct Region {
  std::vector<Node*> nodes;
  const Node* sdpa = nullptr;   ///< the scaled_dot_product_attention, if the region is that and what prepares its keys
  const Value* keys = nullptr;  ///< of sdpa, before heads are repeated
  const Value* values = nullptr;  ///< likewise
  std::vector<AttentionInput> inputs;
  const Value* output = nullptr;
  int output_dim = -1;
  bool partial = false;  ///< works with fewer queries than keys
};

/// Scalars that are made inside an attention region and used outside it are replaced there by their
/// twins made from the input.
void detach_region_scalars(Analysis& analysis);

/// Why parts of a batch must not be run although every probe may agree, empty if nothing was found: the graph chooses
/// its way by a size or by the values of hidden states, or cuts sequences at a fixed length. Packed rows may then do
/// otherwise than the padded batch does, on lengths that no probe tries. Asked before sizes are detached.
std::string find_obstacle(const Analysis& analysis);

/// Does the graph choose its way by the number of rows, or by ids or hidden states, which all rows decide together? A
/// row may then be another one in another batch, whatever the probes say.
bool rows_may_meet(const Analysis& analysis);

/// Does the node accumulate over the tokens? What it makes may be no more than compared with some limit (the capacity
/// of an expert), so that no probe shows it.
bool accumulates_over_tokens(const Analysis& analysis, const Node* node);

/// The nodes of layer `part` that work on hidden states, split at its attention regions:
/// pieces[0], regions[0], pieces[1], ... Empty optional with a reason if the layer cannot be split.
struct SplitLayer {
  std::vector<std::vector<Node*>> pieces;
  std::vector<Region> regions;
};
std::optional<SplitLayer> split_layer(const Analysis& analysis, std::int64_t part, std::string& reason);

}  // namespace llmcache::ts
