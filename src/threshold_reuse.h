// Fidelity::kThreshold: the LLMCache paper (arXiv 2512.16843) on a wrapped model. Brings together
// fingerprints, banks, the packed engine and the divergence monitor.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bank/layer_bank.h"
#include "execute/batch.h"
#include "kept_later.h"
#include "llmcache/fingerprint/fingerprint.h"
#include "llmcache/options.h"
#include "llmcache/report.h"
#include "model/probe.h"
#include "refresh/divergence_monitor.h"

namespace llmcache {

/// Thread-safe.
class ThresholdReuse {
 public:
  /// Throws Error(kNotAvailable) with the reason if the model cannot go on from a kept state, and
  /// Error(kInvalidOptions) if the options name layers that it does not have. `total`: the account that those of the
  /// banks are part of; null: of none.
  ThresholdReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output, const ModelProfile& profile,
                 const Options& options, std::size_t capacity_bytes, MemoryAccount* total = nullptr);
  ~ThresholdReuse();

  struct Answer {
    c10::IValue computed;  ///< the model's result for the whole batch; None if no row needed it
    /// By row: the tensors of a result that did not come out of that, batch dimension 1, token
    /// dimension cut to the row's real tokens. Empty: it did.
    std::vector<std::vector<at::Tensor>> rows;
    std::uint64_t hits = 0;
    std::int64_t tokens_computed = 0;
  };

  /// `batch` can be packed and has a real token. `first_number`: of its first row. Fills `report`. What it computed,
  /// and what checks of hits found, is the call's own, until `kept` is committed.
  Answer run(const Batch& batch, const RequestOptions& request, std::uint64_t first_number, ForwardReport& report,
             KeptLater& kept);

  void clear();
  void fill(Stats& stats) const;

 private:
  class Pass;
  struct Bank {
    std::int64_t layer = 0;
    std::vector<std::size_t> fingerprints;  ///< which of fingerprinters_ it can be asked by
    std::unique_ptr<LayerBank> entries;
    std::atomic<std::uint64_t> hits{0};
  };
  struct Found {
    std::size_t sequence = 0;  ///< of the plan
    std::size_t bank = 0;
    LayerBank::Hit hit;
  };
  /// What a pass learnt about one sequence.
  struct Learnt {
    std::uint64_t number = 0;
    std::vector<std::int64_t> ids;
    std::vector<std::vector<float>> states;                ///< one a fingerprint layer; empty: not reached
    std::vector<std::optional<Fingerprint>> fingerprints;  ///< of these
    std::vector<float> attention;                          ///< attention_statistics()
    std::vector<at::Tensor> kept;                          ///< one a bank; undefined: not reached
    bool found = false;
  };

  void choose_layers();
  std::int64_t check_resuming(const std::vector<std::int64_t>& vocabulary);
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<Learnt> start(const Batch& batch, const Plan& plan) const;
  void keep(const Batch& batch, const Plan& plan, const std::string& space, std::vector<Learnt>& learnt,
            const ForwardReport& report, double now_s, KeptLater& kept);
  struct Served {
    std::vector<at::Tensor> leaves;   ///< the result, cut to the entry's tokens
    std::vector<LayerTokens> layers;  ///< what was computed for it
  };
  std::vector<Served> serve(const std::vector<Found>& found, ForwardReport& report);
  void shadow(const Batch& batch, const Plan& plan, const std::string& space, const std::vector<Found>& found,
              std::uint64_t first_number, Answer& answer, ForwardReport& report, double now_s, KeptLater& kept);
  [[nodiscard]] std::vector<at::Tensor> fitted(std::vector<at::Tensor> leaves, std::int64_t from,
                                               std::int64_t to) const;

  const Model& model_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const ThresholdOptions options_;
  const RefreshOptions refresh_;
  std::vector<std::unique_ptr<Fingerprinter>> fingerprinters_;  ///< one a fingerprint layer
  std::vector<std::unique_ptr<Bank>> banks_;                    ///< shallow to deep
  std::unique_ptr<DivergenceMonitor> monitor_;
  std::atomic<std::uint64_t> hits_{0}, unusable_{0};
};

}  // namespace llmcache
