// A semantic cache of whole outputs: what the LLMCache paper compares itself with.
//
// The mean of a request's embedding output is fingerprinted; where an earlier request is as similar as asked for, its
// kept output is returned and the model does not run. Fingerprints and the bank are those of the library's fidelity
// threshold, so that it differs from LayerCache in what is kept and in nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "bank/layer_bank.h"
#include "llmcache/fingerprint/fingerprint.h"
#include "llmcache/fingerprint/options.h"
#include "outputs.h"

namespace llmcache::bench {

struct SemanticCacheOptions {
  FingerprintOptions fingerprint;
  double tau = 0.9;                ///< similarity from which on a kept output is returned, -1 to 1
  std::size_t capacity_bytes = 0;  ///< of all that is kept; the oldest used goes first
  std::int64_t hidden_size = 0;    ///< values of a state
  bool causal = false;             ///< how a kept output of another length is laid over the tokens, see forward()
  std::vector<bool> token_output;  ///< one an output: true for [batch, tokens, ...], false for [batch, ...]
};

/// For one thread.
class SemanticCache {
 public:
  /// Mean state of each row, [rows][hidden_size]. Called once for a request, unless only ids are fingerprinted.
  using States = std::function<std::vector<std::vector<float>>()>;
  /// Runs the model on some rows of the request (numbers, rising), padded on the right to the longest of these.
  using Forward = std::function<c10::IValue(const std::vector<std::size_t>& rows)>;

  explicit SemanticCache(SemanticCacheOptions options);

  /// The request's outputs: a tensor, or a flat tuple of them. Rows that no kept one is similar to are run and kept. A
  /// row of L tokens that gets the output of a kept one of K tokens: outputs of one entry a sequence as they are; of
  /// one entry a token: token t has the kept token t, and in a causal model t - L + K, so that the last tokens meet;
  /// the nearest one where there is none. Zero at padding.
  ///
  /// `label`: any number for the first row, one more for each next; served_from() gives it back.
  c10::IValue forward(const Rows& rows, std::int64_t label, const States& states, const Forward& run);

  /// Keeps the outputs of all rows, looking nothing up.
  void fill(const Rows& rows, std::int64_t label, const States& states, const Forward& run);

  /// Of the latest forward(), one a row: the label of the kept row whose output was returned; unset: none.
  [[nodiscard]] const std::vector<std::optional<std::int64_t>>& served_from() const { return served_from_; }

  [[nodiscard]] BankCounters counters() const { return bank_->counters(); }
  /// Forgets everything, the mean state too.
  void clear();

 private:
  [[nodiscard]] std::vector<at::Tensor> checked(const c10::IValue& output, std::size_t rows) const;
  [[nodiscard]] std::vector<std::vector<float>> states_of(const Rows& rows, const States& states) const;
  /// Takes all states into the mean, and keeps the `chosen` rows, whose outputs are the rows of `outputs`.
  void keep(const Rows& rows, std::int64_t label, const std::vector<std::vector<float>>& states,
            const std::vector<std::size_t>& chosen, const std::vector<at::Tensor>& outputs);
  [[nodiscard]] at::Tensor laid_over(const LayerEntry& entry, std::size_t output, std::int64_t tokens) const;

  const SemanticCacheOptions options_;
  std::unique_ptr<Fingerprinter> fingerprinter_;
  /// Its entries have a state without values, which tells the number of tokens, and as inputs the outputs: [...] or
  /// [tokens, ...].
  std::unique_ptr<LayerBank> bank_;
  std::vector<std::optional<std::int64_t>> served_from_;
  std::uint64_t kept_ = 0;  ///< makes keys, so that equal requests are kept as often as they come
};

}  // namespace llmcache::bench
