// What the caller chooses, once per cache (Options) and per call (RequestOptions).
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace llmcache {

/// How much may be reused, and what is promised in return.
enum class Fidelity {
  /// Whole outputs of identical requests: all token-level inputs are compared, never a hash alone.
  /// A request that is not known runs exactly as the plain model runs it, padding included, so the
  /// result is bit-identical to what the model returned when that request was first computed.
  kIdentical,
  /// As kIdentical, and the rows of a padded batch are packed so that padding is never computed.
  /// Equal to the plain model up to floating-point rounding; bit-identical where nothing is padded and
  /// no row is known from a batch that was.
  kLossless,
  /// Reuse within a calibrated error budget. Not available in this version: refused.
  kBudget,
  /// Whole hidden states above a similarity threshold (LLMCache, arXiv 2512.16843). Not available
  /// in this version: refused.
  kThreshold,
};

const char* to_string(Fidelity fidelity) noexcept;
/// The inverse of to_string ("identical", "lossless", "budget", "threshold").
/// Throws Error(kInvalidOptions) for any other text.
Fidelity fidelity_from_string(const std::string& text);

/// Settings of a LayerCache. A plain struct: set what differs from the default.
struct Options {
  /// What a request gets that does not name its own. Default: the strongest promise that still
  /// saves work on every padded batch.
  Fidelity fidelity = Fidelity::kLossless;

  /// Upper bound in bytes for everything the cache keeps: tensors, keys and index together. The
  /// bound is enforced before memory is taken, so it holds at every moment. 0 keeps nothing.
  /// An entry that is larger than this is not kept (counted in Stats::rejected).
  /// Default 256 MiB: about 680 outputs of BERT-base at 128 tokens.
  std::size_t capacity_bytes = std::size_t{256} << 20;

  /// Dotted path of the module that contains the chain of layers, as in named_modules(), e.g.
  /// "model.bert.encoder.layer". Empty (default): found by data flow.
  std::string layers = {};

  /// Position of the attention mask among the model's inputs (0 is input_ids). Unset (default):
  /// found by probing. -1: the model takes no mask, every token is real.
  std::optional<int> mask_argument = {};

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// Settings of one call.
struct RequestOptions {
  /// Overrides Options::fidelity for this call.
  std::optional<Fidelity> fidelity = {};

  /// Requests of different tenants never see each other's entries. Any bytes; default: one tenant
  /// for all who name none.
  std::string tenant = {};
};

}  // namespace llmcache
