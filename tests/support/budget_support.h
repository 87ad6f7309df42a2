// What tests of Fidelity::kBudget share: traffic, and how it is decided.
#pragma once

#include <c10/util/Exception.h>

#include <chrono>
#include <random>
#include <thread>

#include "support.h"

namespace llmcache::test {

inline constexpr const char* kModel = "tiny-bert-pooled";

/// Queries on `topics` topics: each has tokens of its own, of which a query has a few, in any order, and some that all
/// have in common. `first_topic`: others are drifted traffic.
class Traffic {
 public:
  explicit Traffic(std::uint64_t seed, std::int64_t first_topic = 0, std::int64_t topics = 12)
      : generator_(seed), first_topic_(first_topic), topics_(topics) {}

  Request batch(const std::vector<std::int64_t>& lengths) {
    Request request = right_padded(model_info(kModel), lengths, 1);
    for (std::size_t row = 0; row < lengths.size(); ++row) {
      const std::int64_t topic = first_topic_ + below(topics_);
      auto ids = request.ids()[static_cast<std::int64_t>(row)];
      for (std::int64_t t = 0; t < lengths[row]; ++t) {
        ids[t] = below(6) == 0 ? below(8) : 8 + topic * 5 + below(5);
      }
    }
    return request;
  }
  Request next() { return batch({4 + below(9), 4 + below(9), 4 + below(9), 4 + below(9)}); }

  std::vector<Inputs> sample(int batches) {
    std::vector<Inputs> all;
    for (int i = 0; i < batches; ++i) all.push_back(next().inputs);
    return all;
  }

 private:
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(generator_() % static_cast<std::uint64_t>(n)); }

  std::mt19937_64 generator_;
  std::int64_t first_topic_, topics_;
};

/// Eight classes of the tiny model's output, centred so that all are used.
inline at::Tensor classes(const at::Tensor& outputs) {
  const auto weights = at::sin(at::arange(outputs.size(1) * 8, at::kFloat)).view({outputs.size(1), 8});
  return at::mm(outputs, weights.to(outputs.device()));
}

/// Token states alone, which a calibration chooses without looking at the clock.
inline Options token_options(double audit_rate = 0) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = audit_rate;
  return options;
}

/// Documents of 40 tokens of which one is changed from request to request, now and then a new one.
inline std::vector<Request> documents(const ModelInfo& info, int requests, std::uint64_t seed) {
  std::vector<Request> all;
  auto current = right_padded(info, {40}, seed);
  for (int i = 0; i < requests; ++i) {
    if (i % 12 == 0) current = right_padded(info, {40}, seed + static_cast<std::uint64_t>(i));
    Request next = current;
    next.inputs = copy_of(current.inputs);
    next.ids()[0][5 + i % 30] = 10 + (i * 7) % 200;
    all.push_back(next);
  }
  return all;
}

inline std::vector<Inputs> inputs_of(const std::vector<Request>& requests) {
  std::vector<Inputs> all;
  for (const Request& request : requests) all.push_back(request.inputs);
  return all;
}

/// Counts warnings of the library, in the thread that made it the handler.
class Warnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("llmcache") == std::string::npos) return;
    ++count;
    texts += warning.msg() + "\n";
  }
  int count = 0;
  std::string texts;
};

/// Until no audit is waiting, or for ten seconds.
inline void wait_for_audits(const LayerCacheBase& cache) {
  for (int waited = 0; cache.stats().budget->audits_waiting > 0 && waited < 1000; ++waited) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace llmcache::test
