// How a LayerCache answers: what is known, what has to be computed and by which way, what is kept, what is checked.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "answer_check.h"
#include "background_audits.h"
#include "bank/memory.h"
#include "budget_reuse.h"
#include "execute/batch.h"
#include "execute/run_model.h"
#include "execute/thread_state.h"
#include "fallbacks.h"
#include "kept_later.h"
#include "known_outputs.h"
#include "llmcache/layer_cache.h"
#include "model/probe.h"
#include "prefix_reuse.h"
#include "refresh/verification.h"
#include "threshold_reuse.h"

namespace llmcache {

struct LayerCacheBase::Impl {
  Impl(std::unique_ptr<Model> wrapped, Options chosen);
  ~Impl();

  /// LayerCacheBase::forward(), without time and thread's report.
  c10::IValue forward(const Inputs& given, const RequestOptions& request, ForwardReport& report);
  void weights_changed();
  /// Drops all that is kept. What running calls compute is not kept.
  void drop();
  void check_made_for_budget() const;
  [[nodiscard]] Stats stats() const;

  std::unique_ptr<Model> model;
  Options options;
  InputSpec inputs;
  MemoryAccount memory;  ///< all that is kept; the accounts of the banks are parts of it
  ModelProfile profile;
  OutputSpec output;
  Verification verification;
  std::unique_ptr<KnownOutputs> outputs;
  std::unique_ptr<PrefixReuse> prefix;  ///< null unless the cache was made for kLossless and the model allows it
  std::unique_ptr<BudgetReuse> budget;  ///< null unless the cache was made for kBudget
  std::unique_ptr<ThresholdReuse> threshold;  ///< null unless the cache was made for kThreshold
  std::shared_ptr<const int> identity = std::make_shared<const int>(0);

 private:
  /// One call on its way. What it leaves behind it leaves at its end.
  struct Call {
    const Batch& batch;
    const RequestOptions& request;
    Fidelity fidelity;
    ForwardReport& report;
    std::uint64_t first_number = 0;
    std::uint64_t epoch = 0;
    KeptLater kept = {};
    CallFallbacks fallbacks = {};
    std::vector<PrefixUse> prefix_uses = {};  ///< by the rows that were run, then by those of the batch
    std::int64_t padding_skipped = 0;
  };
  /// What was run for the missing rows.
  struct Computed {
    c10::IValue result;
    bool packed = false;
    bool keep = true;
    bool cut = false;  ///< the result is already that of the tokens asked for
  };

  void wrap();
  void make_prefix_reuse(std::size_t& capacity);
  [[nodiscard]] bool can_pack(const Batch& batch) const;
  [[nodiscard]] std::string plain_reason(const Batch& batch) const;
  void check_request(const RequestOptions& request, Fidelity fidelity);
  std::uint64_t check_weights();
  void warn_uncalibrated();

  c10::IValue answer(Call& call);
  c10::IValue answer_plainly(Call& call, const std::string& reason);
  std::optional<c10::IValue> answer_by_similarity(Call& call);
  c10::IValue answer_exactly(Call& call);
  c10::IValue run_threshold(Call& call);
  Computed compute(Call& call, const Batch& part, bool prefixes, ForwardReport& report);
  Computed compute_within_budget(Call& call, const Batch& part, ForwardReport& report);
  Computed compute_plainly(Call& call, const Batch& part, const char* mechanism, const std::exception& error,
                           ForwardReport& report);

  /// Compares the answer with the plain one, if it is due; gives back the one to return.
  c10::IValue verified(Call& call, const KnownRows& known, c10::IValue result);
  void verify_later(Call& call, Verification::Due due, AnswerSizes sizes, const c10::IValue& result);
  /// True if they agree. Closes what an answer that does not came from.
  bool compare(const Batch& batch, Output wanted, const ForwardReport& report, Verification::Due due,
               const AnswerSizes& sizes, const c10::IValue& result, const c10::IValue& plain);
  [[nodiscard]] c10::IValue plain_answer(const Batch& batch, Output wanted, const ForwardReport& report) const;

  void finish(Call& call);
  void count(const Call& call);

  NumericState wrapped_under_;
  std::shared_mutex weights_mutex_;  ///< exclusive: the weights are taken as they are now
  std::shared_mutex kept_mutex_;     ///< exclusive: all is dropped
  std::atomic<std::uint64_t> epoch_{0};  ///< raised by each drop(): what was begun before is not kept
  std::once_flag told_uncalibrated_;
  Fallbacks fallbacks_;
  std::atomic<std::uint64_t> weight_checks_{0}, next_number_{0}, requests_{0}, sequences_{0}, hits_{0}, prefix_hits_{0},
      tokens_{0}, tokens_reused_{0}, tokens_computed_{0}, padding_skipped_{0};
  std::unique_ptr<BackgroundAudits> verifying_;  ///< null: answers are compared within the call. Uses all above
};

}  // namespace llmcache
