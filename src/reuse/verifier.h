// Answers beside the plain model's: which are compared, when, and what follows if they differ.
#pragma once

#include <ATen/core/ivalue.h>

#include <functional>
#include <memory>

#include "llmcache/options.h"
#include "refresh/verification.h"
#include "reuse/answers.h"
#include "reuse/background_jobs.h"
#include "reuse/call.h"

namespace llmcache {

/// Thread-safe.
class Verifier {
 public:
  /// What it needs of the cache that it belongs to. Called from any thread.
  struct Cache {
    std::function<std::uint64_t()> check_weights;  ///< throws if they have changed; else the epoch
    std::function<void()> drop;                    ///< all that is kept
  };

  /// References must outlive it.
  Verifier(const WrappedModel& wrapped, const Options& options, Verification& verification, Cache cache);

  /// The answer to return: `result`, or the plain model's, if the two were compared within the call and differ. What
  /// the call would have kept is not kept then.
  [[nodiscard]] c10::IValue verified(const Call& call, Answers& answers, c10::IValue result);

  void fill(VerificationStats& stats) const;

 private:
  struct Comparison;
  [[nodiscard]] c10::IValue plain_answer(const Comparison& comparison) const;
  /// True if they agree. Closes what an answer that does not came from.
  bool compare(const Comparison& comparison, const c10::IValue& result, const c10::IValue& plain);
  void verify_later(const Call& call, Comparison comparison, const c10::IValue& result);

  const WrappedModel& wrapped_;
  const bool only_layers_;  ///< the plain model is run layer by layer too
  const Cache cache_;
  Verification& verification_;
  std::unique_ptr<BackgroundJobs> jobs_;  ///< null: answers are compared within the call. Uses all above
};

/// How far an answer may be off the plain one, of the largest magnitude in a row: sums in another order, over many
/// layers and tokens. Above what probes of tiny sequences allow.
double answer_tolerance(at::ScalarType dtype);

}  // namespace llmcache
