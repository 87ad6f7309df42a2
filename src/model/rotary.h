// Rotary position embedding (RoPE, arXiv 2104.09864) as cached keys show it: found numerically, and applied to keys
// that move to other positions. Knows no model.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace llmcache {

/// How keys angles with the position of their token. Pair i of channels (a, b) at position p is the pair at position 0,
/// turned by p * frequencies[i]: (a cos - b sin, b cos + a sin). Channels behind the last pair stay as they are.
struct KeyRotation {
  enum class Layout {
    kHalves,       ///< pairs (i, i + number of pairs): Llama, GPT-NeoX
    kInterleaved,  ///< pairs (2 i, 2 i + 1): GPT-J
  };
  Layout layout = Layout::kHalves;
  std::vector<double> frequencies;  ///< radians a token, one a pair
};

/// Token and channel dimension of a key tensor.
struct KeyDims {
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
};

/// The channel dimension of keys whose tokens run along `token_dim`: the last one, or the one before where tokens are
/// last.
KeyDims key_dims_of(const at::Tensor& keys, std::int64_t token_dim);

/// How far keys may be from what a rotation foretells, of their largest magnitude: a model's own cosines are float32 of
/// p * frequency, or rounded to half precision.
double key_tolerance(at::ScalarType type);

/// True if the keys of one and the same token, at the positions 0, 1, ... along dims.tokens, are equal up to the
/// rounding of their type.
bool same_at_all_positions(const at::Tensor& keys, std::int64_t token_dim);

/// The rotation of keys of one and the same token at the positions 0, 1, ...: at least 16 of them. Frequencies come
/// from the first half of the positions; the rotation must then foretell the keys of all. A factor that is the same at
/// all positions (attention scaling) does not matter. Empty with the reason in `why` if there is none: learned or
/// sinusoidal positions, or another convention.
std::optional<KeyRotation> find_rotation(const at::Tensor& keys, std::int64_t token_dim, std::string& why);

/// Does this rotation foretell the keys of one and the same token at the positions 0, 1, ...?
bool foretells(const KeyRotation& rotation, const at::Tensor& keys, std::int64_t token_dim);

/// Cosines and sines of a move, float32 `[tokens, pairs]` on the keys' device.
struct RotationAngles {
  at::Tensor cos, sin;
};

/// `moves`: how far each token's position changes, on the CPU.
RotationAngles angles_of(const KeyRotation& rotation, const std::vector<std::int64_t>& moves, at::Device device);

/// Turns keys in place, in float32 whatever their type. Tokens that do not move keep their bits.
void rotate_(at::Tensor& keys, std::int64_t token_dim, const KeyRotation& rotation, const RotationAngles& angles);

}  // namespace llmcache
