// What wrapping found out about a model, by data flow and by probing it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "llmcache/model/verified_envelope.h"

namespace llmcache {

/// How much of a model can be run on a part of its tokens.
enum class Granularity {
  kWholeLayers,  ///< each layer runs on the whole padded batch or not at all
  kPacked,       ///< padding is left out; a sequence runs whole
  kTokens,       ///< each layer can run on any subset of a sequence's tokens
};

const char* to_string(Granularity granularity) noexcept;

/// One place where a layer mixes tokens.
struct AttentionOp {
  std::int64_t layer = 0;
  std::string kind;              ///< "sdpa" (scaled_dot_product_attention) or "eager" (a region of the graph)
  std::size_t query_inputs = 0;  ///< tensors that are cut to the active tokens
  std::size_t key_inputs = 0;    ///< tensors that cover all tokens (keys, values)
};

/// The result of wrapping; printable. Plain data, safe to copy.
struct ModelProfile {
  std::string layers_path;                    ///< dotted path of the chain of layers
  std::int64_t layers = 0;                    ///< calls in the chain; a shared layer counts each time
  std::int64_t hidden = 0;                    ///< width of the hidden state
  std::vector<std::int64_t> hidden_argument;  ///< per layer: position of the hidden state among its arguments
  std::vector<AttentionOp> attention;
  std::vector<std::string> inputs;  ///< names of the model's inputs
  int ids_argument = 0;             ///< position of input_ids
  int mask_argument = -1;           ///< position of the attention mask; -1: none
  /// Positions of the inputs that are the source of an encoder-decoder, `[batch, source tokens]`; empty: it is none.
  /// input_ids, the mask and all that is said of tokens are the target's then.
  std::vector<int> source_arguments;
  bool source_reuse = false;           ///< what follows from a source alone is computed once for it, and kept
  int source_mask_argument = -1;       ///< of the mask of the source, if padding at its end changes nothing; -1: none
  std::int64_t vocabulary = 0;         ///< rows of the embedding that input_ids select from; 0: unknown
  std::int64_t max_tokens = 0;         ///< longest sequence that the model has positions for; 0: unknown, or no bound
  std::int64_t max_source_tokens = 0;  ///< likewise, of a source
  bool causal = false;                 ///< earlier tokens never depend on later ones
  bool head_tokenwise = false;         ///< the work behind the last layer can be done token by token
  bool head_chooses = false;           ///< it reads one token a row, whose place follows from the inputs
  bool rows_independent = false;       ///< a sequence's output does not depend on the rest of its batch
  bool per_row_output = false;         ///< every output tensor has one entry a sequence
  Granularity granularity = Granularity::kWholeLayers;
  bool prefix_reuse = false;       ///< causal, and reuse of a prefix in a longer sequence was verified
  bool left_padding = false;       ///< packing was verified for left padding too
  std::string prefix_obstacle;     ///< what makes the states of a sequence's first tokens depend on its length, or on
                                   ///< tokens behind them, by the model's graph; empty: nothing does
  std::string row_obstacle;        ///< what makes a row's result depend on its batch or padding; empty: nothing does
  std::vector<std::string> notes;  ///< why something is not available, one reason a line
  VerifiedEnvelope verified;       ///< what wrapping compared; Stats::verification has what was compared since
  at::ScalarType dtype = at::kFloat;
  std::string device;
  std::size_t weight_bytes = 0;           ///< parameters and buffers of the model, each storage once
  std::string weights;                    ///< how those of linear layers are held: a name of Weights, never "fastest"
  std::string weights_reason;             ///< why Weights::kFastest chose that, one sentence; empty: the caller did
  std::size_t packed_weights = 0;         ///< linear layers whose weights were packed
  std::size_t packed_weight_bytes = 0;    ///< what the packed weights take
  std::size_t released_weight_bytes = 0;  ///< of `weight_bytes`, what the library no longer holds because of packing
  std::string digest;                     ///< of structure and weights, hexadecimal
  double wrap_ms = 0;                     ///< time that finding, probing and checking took
  bool from_file = false;  ///< what probing finds was read from Options::profile_path: nothing was probed
  std::string file_note;  ///< what became of that file ("was read", "was written: there is no such file"); empty: there
                          ///< is none

  [[nodiscard]] std::string to_string() const;
};

}  // namespace llmcache
