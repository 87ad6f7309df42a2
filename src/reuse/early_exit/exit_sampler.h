// Runs the requests of a calibration sample in full, and keeps what early exits are fitted on.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "execute/batch.h"
#include "refresh/exit_calibration.h"

namespace llmcache {

/// Takes batches that can be packed, one after another. Not thread-safe; shares nothing.
class ExitSampler {
 public:
  /// `model` has one pooled output a sequence, and must outlive this.
  explicit ExitSampler(const Model& model);

  /// Runs the sequences that were not seen before. Throws Error(kModelFailed) with what the model raised, and
  /// Error(kNotAvailable) if its output is not [batch, values].
  void add(const Batch& batch);
  /// What was run. Called once, with one sequence at least.
  [[nodiscard]] std::shared_ptr<const ExitSample> finish();
  /// Held so far.
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  [[nodiscard]] std::vector<std::int64_t> fresh_rows(const Batch& batch);

  const Model& model_;
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen_;  ///< hashes of all that decides a sequence's output
  std::vector<std::vector<at::Tensor>> states_;             ///< by layer
  std::vector<at::Tensor> outputs_;
  std::vector<std::int64_t> tokens_;            ///< of each sequence
  std::vector<double> together_ms_, alone_ms_;  ///< by layer: requests as they come, and some of their sequences alone
  std::int64_t ran_ = 0;
  std::int64_t alone_ = 0;
  std::size_t bytes_ = 0;
};

/// Mean over the tokens of each `[1, tokens, hidden]`, float32 `[n, hidden]`.
at::Tensor means_of(const std::vector<at::Tensor>& states);

}  // namespace llmcache
