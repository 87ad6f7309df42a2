// Fidelity::kThreshold: similarity look-up as in the LLMCache paper (arXiv 2512.16843) on a wrapped model. Brings
// together fingerprints, banks, the packed engine and the divergence monitor.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bank/layer_bank.h"
#include "llmcache/fingerprint/fingerprint.h"
#include "refresh/divergence_monitor.h"
#include "reuse/strategy.h"

namespace llmcache {

/// Thread-safe.
class SimilarityReuse final : public ReuseStrategy {
 public:
  /// Throws Error(kNotAvailable) with the reason if the model cannot go on from a kept state, and
  /// Error(kInvalidOptions) if the options name layers that it does not have. `wrapped` must outlive it. `total`: the
  /// account that those of the banks are part of; null: of none.
  SimilarityReuse(const WrappedModel& wrapped, const Options& options, std::size_t capacity_bytes,
                  MemoryAccount* total = nullptr);
  ~SimilarityReuse() override;

  std::string name() const override { return "similarity"; }
  bool accepts(const Call& call) const override { return call.packable; }
  void serve(const Call& call, Answers& answers) override;
  void clear() override;
  void each_bank(const BankVisitor& visit) override {
    for (const auto& bank : banks_) visit(*bank->entries);
  }
  void add_to(Stats& stats) const override;
  void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) override;
  bool exact() const override { return false; }

 private:
  class Pass;
  struct Bank {
    std::int64_t layer = 0;
    std::vector<std::size_t> fingerprints;  ///< which of fingerprinters_ it can be asked by
    std::unique_ptr<LayerBank> entries;
    std::atomic<std::uint64_t> hits{0};
  };
  /// A sequence that goes on from another one's state.
  struct Hit {
    std::size_t sequence = 0;  ///< of the plan
    std::size_t bank = 0;
    LayerBank::Hit found;
  };
  /// What a pass saw of one sequence.
  struct SequenceCapture {
    std::uint64_t number = 0;
    std::vector<std::int64_t> ids;
    std::vector<std::vector<float>> states;                ///< one a fingerprint layer; empty: not reached
    std::vector<std::optional<Fingerprint>> fingerprints;  ///< of these
    std::vector<float> attention;                          ///< attention_statistics()
    std::vector<at::Tensor> kept;                          ///< one a bank; undefined: not reached
    bool found = false;
    MissReason miss = MissReason::kNew;  ///< of one that was not found
  };

  void choose_layers();
  std::int64_t check_resuming(const InputSpec& spec);
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<SequenceCapture> start(const Batch& batch, const Plan& plan, std::uint64_t first_number,
                                                   const std::vector<std::int64_t>& rows) const;
  [[nodiscard]] MissReason why_missed(std::uint64_t key) const;
  void keep(const Batch& batch, const Plan& plan, const std::string& partition, std::vector<SequenceCapture>& captures,
            const ForwardReport& report, double now_s, DeferredWrites& writes);
  struct Served {
    std::vector<at::Tensor> leaves;   ///< the result, cut to the entry's tokens
    std::vector<LayerTokens> layers;  ///< what was computed for it
  };
  std::vector<Served> resume_all(const std::vector<Hit>& hits, ForwardReport& report);
  void audit(const Call& call, const std::vector<std::int64_t>& open, const Batch& batch, const Plan& plan,
             const std::vector<Hit>& hits, PassResult& answer, double now_s, DeferredWrites& writes);
  [[nodiscard]] std::vector<at::Tensor> fitted(std::vector<at::Tensor> leaves, std::int64_t from,
                                               std::int64_t to) const;

  const WrappedModel& wrapped_;
  const Model& model_;
  const ThresholdOptions options_;
  const RefreshOptions refresh_;
  std::vector<std::unique_ptr<Fingerprinter>> fingerprinters_;  ///< one a fingerprint layer
  std::vector<std::unique_ptr<Bank>> banks_;                    ///< shallow to deep
  std::unique_ptr<DivergenceMonitor> monitor_;
  std::atomic<std::uint64_t> hits_{0}, unusable_{0};
};

}  // namespace llmcache
