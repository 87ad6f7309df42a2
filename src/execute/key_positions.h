// What the keys of a model have to do with the positions of their tokens, found by running it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llmcache/model/layered_model.h"
#include "model/rotary.h"

namespace llmcache {

/// Can keys be used at another position than the one they were computed at, and how?
struct KeyPositions {
  bool movable = false;
  std::string why;                     ///< it is not movable: the reason
  std::int64_t positions = 0;          ///< how many of them were looked at
  std::vector<KeyRotation> rotations;  ///< that differ
  /// By layer, attention operator and key-side tensor: index into rotations; -1: stays as it is at every position
  /// (values; keys of models that see positions elsewhere, as with ALiBi, arXiv 2108.12409).
  std::vector<std::vector<std::vector<int>>> rotation_of;
};

/// Runs a causal model that packs on sequences of one repeated token each. Every token then attends to equal values
/// only, so that the state that enters a layer is the same at every position, and its keys differ by nothing but the
/// position, in every layer. Learned positions show as values that differ: not movable. Also not movable: rotations
/// that change with the length of the sequence (dynamic scaling), attention that does not sum to one (sinks).
KeyPositions find_key_positions(const Model& model, const InputSpec& spec);

}  // namespace llmcache
