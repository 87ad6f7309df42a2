// The mode of the LLMCache paper (Fidelity::kThreshold): what it keeps, and how similar a request must be.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "llmcache/bank/eviction.h"
#include "llmcache/fingerprint/options.h"

namespace llmcache {

/// Settings of Fidelity::kThreshold, the mode of the LLMCache paper (arXiv 2512.16843).
///
/// For each cached layer there is a bank of (fingerprint, output of that layer for all tokens). A
/// sequence that is not known is fingerprinted at each of `fingerprint_layers` as its pass reaches
/// it, and the banks of the layers that have not run yet are asked, the deepest first. The first
/// entry with a similarity of at least tau takes the sequence's place: the remaining layers and the
/// head run on the entry's state, with the entry's inputs and length. A sequence without a hit runs
/// through, and its states are kept.
///
/// What comes back has the shape that was asked for. An output with one entry a sequence is the
/// entry's. An output with one entry a token has the entry's, token by token: aligned at the first
/// token for a bidirectional model, at the last one for a causal model; where the entry is shorter,
/// its nearest token is repeated.
struct ThresholdOptions {
  /// Least similarity of a hit, -1 to 1. Default: where the paper's mode first costs little accuracy on
  /// short queries (raw cosine; docs/paper-mode.md).
  double tau = 0.90;

  /// Instead of `tau`, one for each cached layer, in the order of `cache_layers`. Empty (default): tau
  /// for all.
  std::vector<double> layer_taus = {};

  /// What a fingerprint is made of.
  FingerprintOptions fingerprint = {};

  /// States that are fingerprinted: 0 is the embedding output, k the output of the first k layers.
  /// Ascending, below the number of layers. Empty (default): {0}, before any layer has run, where a hit
  /// saves most.
  std::vector<std::int64_t> fingerprint_layers = {};

  /// Layers whose output is kept, counted from 0, ascending. Each must lie behind at least one of
  /// `fingerprint_layers`. Empty (default): all of them.
  std::vector<std::int64_t> cache_layers = {};

  /// How the capacity is split among the cached layers: shares above 0, one each, of any sum. Empty
  /// (default): evenly.
  std::vector<double> capacity_split = {};

  /// Part of Options::capacity_bytes that the banks of the layers get, 0 to 1; the rest keeps whole
  /// outputs for requests of the other fidelities. Default 0.9.
  double capacity_share = 0.9;

  /// Which entry goes when room is needed. Each bank has its own policy.
  EvictionOptions eviction = {};

  /// Seconds that an entry lives, above 0. Default: forever.
  double ttl_seconds = std::numeric_limits<double>::infinity();

  /// Throws Error(kInvalidOptions) that names the field at fault. `layers`: of the model, 0 if not known.
  void validate(std::int64_t layers = 0) const;
};

}  // namespace llmcache
