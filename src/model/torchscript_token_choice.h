// Heads that read one token a row, at a place that follows from the inputs: the last that is not padding, the first
// separator. Internal to model/torchscript*.
#pragma once

#include <vector>

#include "model/torchscript_graph.h"

namespace llmcache::ts {

struct Analysis;

/// Behind the layers, one entry a row goes on of what has one a token: `states[arange(rows), position]`, or gather()
/// with the same position throughout.
struct TokenChoice {
  Node* node = nullptr;             ///< that chooses from its first input, `[rows, tokens, ...]`; null: there is none
  const Value* position = nullptr;  ///< whole numbers `[rows]`, or one for all; below 0: counted from the end
  bool keeps_dimension = false;     ///< the result is `[rows, 1, ...]`, not `[rows, ...]`

  [[nodiscard]] const Value* states() const { return node->input(0); }
};

/// The only choice of the head whose position follows from the model's inputs by pure operators. To be asked before
/// sizes are detached, of a model without a source.
TokenChoice find_token_choice(const Analysis& analysis);

/// The nodes that compute the position, in order.
std::vector<Node*> nodes_of_position(const FlatGraph& flat, const TokenChoice& choice);

/// The work behind the layers, cut at the choice.
struct SplitHead {
  std::vector<Node*> before;  ///< token by token, up to the states that are chosen from
  std::vector<Node*> behind;  ///< row by row, from what was chosen on
};

/// False where the two cannot be told apart: something of other tokens goes past the choice.
bool split_head(const Analysis& analysis, SplitHead& split);

}  // namespace llmcache::ts
