// The chain of strategies: a new one is a class and a line in the table.
#include "reuse/chain.h"

#include <array>
#include <map>
#include <mutex>

#include "execute/wrap.h"
#include "reuse/prefix/prefix_reuse.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// Keeps the output of every row whose first token is even, and answers rows that are the same to the last byte.
class EvenRows final : public ReuseStrategy {
 public:
  explicit EvenRows(const WrappedModel& wrapped) : wrapped_(wrapped) {}

  std::string name() const override { return "even rows"; }
  bool accepts(const Call& call) const override { return call.batch.contiguous; }
  void serve(const Call& call, Answers& answers) override {
    if (fails) throw std::runtime_error("even rows are out of order");
    const std::lock_guard lock(mutex_);
    for (std::int64_t row = 0; row < call.batch.rows; ++row) {
      const auto known = rows_.find(call.batch.whole_key(row, call.request.tenant, true));
      if (known != rows_.end()) answers.put_known(row, known->second, {}, nullptr);
    }
  }
  void store(const Call& call, Answers& answers) override {
    for (const Answers::Pass& pass : answers.passes()) {
      for (std::size_t k = 0; k < pass.rows.size(); ++k) {
        const RowSpan& span = call.batch.spans[static_cast<std::size_t>(pass.rows[k])];
        const auto first = call.batch.on_host[0][pass.rows[k]][span.first].item<std::int64_t>();
        if (first % 2 != 0) continue;
        auto tensors = row_of(pass.result.value, wrapped_.output, static_cast<std::int64_t>(k), span.first, span.tokens,
                              call.batch.padded_length);
        for (at::Tensor& tensor : tensors) tensor = tensor.clone();
        answers.writes().add([this, key = call.batch.whole_key(pass.rows[k], call.request.tenant, true), tensors] {
          const std::lock_guard lock(mutex_);
          rows_.emplace(key, tensors);
        });
      }
    }
  }
  void clear() override {
    const std::lock_guard lock(mutex_);
    rows_.clear();
  }
  void add_to(Stats& stats) const override {
    const std::lock_guard lock(mutex_);
    stats.entries += rows_.size();
  }

  inline static bool fails = false;

 private:
  const WrappedModel& wrapped_;
  mutable std::mutex mutex_;
  std::map<std::string, std::vector<at::Tensor>> rows_;
};

/// Puts the strategy in front of the others for as long as it lives.
class WithEvenRows {
 public:
  WithEvenRows() {
    strategy_table().insert(strategy_table().begin(),
                            {.chains = {Fidelity::kLossless},
                             .wanted = [](const StrategyContext&) { return true; },
                             .share = [](const Options&) { return 0.0; },
                             .make = [](const StrategyContext& context, std::size_t) -> std::unique_ptr<ReuseStrategy> {
                               return std::make_unique<EvenRows>(context.wrapped);
                             }});
  }
  ~WithEvenRows() {
    strategy_table().erase(strategy_table().begin());
    EvenRows::fails = false;
  }
};

Request even_and_odd() {
  Request request = right_padded(model_info("tiny-bert-sdpa"), {6, 9, 4}, 3);
  const std::array firsts = {10, 11, 12};
  for (std::int64_t row = 0; row < 3; ++row) request.ids()[row][0] = firsts[static_cast<std::size_t>(row)];
  return request;
}

TEST(ChainOfStrategies, TakesOneMoreByALineInTheTable) {
  const WithEvenRows with;
  LayerCache<Module> cache = cache_of("tiny-bert-sdpa", {.capacity_bytes = 0});  // no other bank keeps anything
  Module plain = load_model("tiny-bert-sdpa");
  const auto request = even_and_odd();
  const auto want = run_plain(plain, request.inputs);
  const auto tolerance = tolerance_of(model_info("tiny-bert-sdpa"));
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance)) << "turn " << turn;
    std::vector<Source> sources;
    for (const auto& sequence : cache.last_report().sequences) sources.push_back(sequence.source);
    if (turn == 0) {
      EXPECT_THAT(sources, ElementsAre(Source::kComputed, Source::kComputed, Source::kComputed));
    } else {
      EXPECT_THAT(sources, ElementsAre(Source::kIdentical, Source::kComputed, Source::kIdentical));
    }
  }
  EXPECT_EQ(cache.stats().entries, 2U);
  EXPECT_EQ(cache.stats().identical_hits, 4U);
  cache.clear();
  EXPECT_EQ(cache.stats().entries, 0U);
}

TEST(ChainOfStrategies, GoesOnBehindOneThatFails) {
  const WithEvenRows with;
  LayerCache<Module> cache = cache_of("tiny-bert-sdpa");
  Module plain = load_model("tiny-bert-sdpa");
  const auto request = even_and_odd();
  EvenRows::fails = true;
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request,
                            tolerance_of(model_info("tiny-bert-sdpa"))));
  EXPECT_THAT(cache.last_report().fallback, HasSubstr("even rows: even rows are out of order"));
  ASSERT_EQ(cache.stats().fallbacks.size(), 1U);
  EXPECT_EQ(cache.stats().fallbacks[0].mechanism, "even rows");
  EvenRows::fails = false;
  cache.forward(request.inputs);
  EXPECT_THAT(cache.last_report().fallback, ::testing::IsEmpty());
}

WrappedModel wrap_for(const char* model, const Options& options) {
  const c10::NoGradGuard no_grad;
  WrappedModel wrapped = wrap(ModelTraits<Module>::wrap(load_model(model), options), options);
  find_prefix_reuse(wrapped);
  return wrapped;
}

/// The order in which requests of each fidelity ask.
TEST(ChainOfStrategies, HaveTheirOrder) {
  const auto names = [](Fidelity fidelity, const char* model) {
    Options options{.fidelity = fidelity};
    WrappedModel wrapped = wrap_for(model, options);
    MemoryAccount memory(options.capacity_bytes);
    const Verification verification(0);
    const StrategyChains chains({wrapped, options, verification, memory});
    std::vector<std::string> all;
    for (const ReuseStrategy* one : chains.of(fidelity)) all.push_back(one->name());
    return all;
  };
  EXPECT_THAT(names(Fidelity::kIdentical, "tiny-gpt2-sdpa"), ElementsAre("exact match", "dense"));
  EXPECT_THAT(names(Fidelity::kLossless, "tiny-gpt2-sdpa"), ElementsAre("exact match", "prefix", "packed", "dense"));
  EXPECT_THAT(names(Fidelity::kLossless, "tiny-bert-sdpa"), ElementsAre("exact match", "packed", "dense"));
  EXPECT_THAT(names(Fidelity::kBudget, "tiny-gpt2-sdpa"),
              ElementsAre("exact match", "budget", "prefix", "packed", "dense"));
  EXPECT_THAT(names(Fidelity::kThreshold, "tiny-bert-sdpa"),
              ElementsAre("similarity", "exact match", "packed", "dense"));
}

}  // namespace
}  // namespace llmcache::test
