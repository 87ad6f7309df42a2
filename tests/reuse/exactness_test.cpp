// What a report calls exact is what the plain model gives, whatever strategy served it and however states are held; and
// nothing is closed for good around a model that has not changed.
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "budget_support.h"
#include "encoder_decoder_support.h"
#include "passages.h"

namespace llmcache::test {
namespace {

using Requests = std::vector<Request>;

struct Strategy {
  std::string name;
  std::string model;
  Options options;                                              ///< but for the format
  std::function<std::vector<Inputs>(const ModelInfo&)> sample;  ///< to calibrate on; none: it is not calibrated
  std::function<Requests(const Subject&)> traffic;
  std::set<Source> sources;  ///< that the traffic is to meet, where nothing is rounded
};

void PrintTo(const Strategy& strategy, std::ostream* out) { *out << strategy.name; }

// --- traffic ----------------------------------------------------------------------------------------------

Request request_of_ids(const std::vector<at::Tensor>& rows) {
  PaddedBatch batch = pad([&] {
    std::vector<Ids> all;
    for (const at::Tensor& row : rows) {
      const auto* const ids = row.const_data_ptr<std::int64_t>();
      all.emplace_back(ids, ids + row.numel());
    }
    return all;
  }());
  Request request{{batch.ids, batch.mask}, {}, batch.ids.size(1)};
  for (const at::Tensor& row : rows) request.spans.push_back({0, row.numel()});
  return request;
}

/// Prompts of passages, prompts that go on from one before, prompts that come again, alone and with others in a batch.
Requests prompts(const Subject& model) {
  PassagePrompts next(model.info);
  Requests all;
  at::Tensor before;
  for (int i = 0; i < 8; ++i) {
    const auto ids = next()[0].toTensor()[0].contiguous();
    all.push_back(request_of_ids({ids}));
    const auto more = right_padded(model.info, {9}, 500 + static_cast<std::uint64_t>(i)).ids()[0];
    const auto longer = at::cat({ids, more});
    all.push_back(request_of_ids({longer}));
    all.push_back(request_of_ids({i % 2 == 0 ? longer : ids.narrow(0, 0, 60).contiguous()}));
    if (before.defined()) all.push_back(request_of_ids({at::cat({before, more}), longer, more}));
    before = ids;
  }
  return all;
}

std::vector<Inputs> sample_of_prompts(const ModelInfo& info) { return PassagePrompts(info).sample(120); }

/// Edited documents, each of which comes again.
Requests texts(const Subject& model) {
  Requests all;
  for (const Request& one : documents(model.info, 24, 9000)) {
    all.push_back(one);
    all.push_back(one);
  }
  return all;
}

std::vector<Inputs> sample_of_texts(const ModelInfo& info) { return inputs_of(documents(info, 150, 100)); }

Requests queries(const Subject& /*model*/) {
  Traffic traffic(11);
  Requests all;
  for (int i = 0; i < 12; ++i) {
    all.push_back(traffic.next());
    all.push_back(all.back());
  }
  return all;
}

/// Rows of few sources with ever other targets.
Requests translations(const Subject& model) {
  std::mt19937 random(3);
  std::vector<Ids> sources;
  for (const std::size_t tokens : {9, 14, 4}) sources.push_back(random_ids(random, tokens));
  Requests all;
  for (int i = 0; i < 20; ++i) {
    std::vector<Row> rows;
    for (const Ids& source : sources) rows.push_back({source, random_ids(random, 5)});
    all.push_back(request_of(model.cache.profile(), rows));
    if (i % 4 == 3) all.push_back(all.back());
  }
  return all;
}

// --- strategies -------------------------------------------------------------------------------------------

Options exit_budget() {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, 0.15, 0.1};
  options.budget.scores = classes;
  options.budget.exit_layers = {0, 1, 2};  // a tiny model's layers take no longer than looking for an answer
  options.budget.audit_rate = 0.1;
  return options;
}

Options similar_states() {
  Options options{.fidelity = Fidelity::kThreshold};
  options.threshold.tau = 0.9;
  return options;
}

std::vector<Strategy> strategies() {
  using enum Source;
  std::vector<Strategy> all;
  for (const char* name : {"tiny-llama-sdpa", "tiny-llama-sdpa-bf16", "tiny-gpt2-sdpa"}) {
    all.push_back({std::string("segments_") + name,
                   name,
                   passage_budget(0.1),
                   sample_of_prompts,
                   prompts,
                   {kPrefix, kPartial, kComputed}});
    all.push_back({std::string("prefixes_") + name, name, {}, nullptr, prompts, {kPrefix, kComputed}});
  }
  all.push_back(
      {"budget_without_calibration", "tiny-llama-sdpa", passage_budget(), nullptr, prompts, {kPrefix, kComputed}});
  for (const char* name : {"tiny-bert-sdpa", "tiny-bert-cls"}) {
    all.push_back({std::string("token_states_") + name,
                   name,
                   token_options(/*audit_rate=*/0.1),
                   sample_of_texts,
                   texts,
                   {kIdentical, kPartial, kComputed}});
  }
  all.push_back({"early_exits",
                 kModel,
                 exit_budget(),
                 [](const ModelInfo& /*info*/) { return Traffic(1).sample(500); },
                 queries,
                 {kEarlyExit, kComputed}});
  all.push_back({"identical_alone",
                 "tiny-bert-sdpa",
                 {.fidelity = Fidelity::kIdentical},
                 nullptr,
                 texts,
                 {kIdentical, kComputed}});
  all.push_back({"similar_states", "tiny-bert-sdpa", similar_states(), nullptr, texts, {kSimilar, kComputed}});
  all.push_back({"sources", "seq2seq-bart", {}, nullptr, translations, {kIdentical, kComputed}});
  return all;
}

using Case = std::pair<Strategy, BankFormat>;

/// Each in each format, where the format decides anything.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Strategy& strategy : strategies()) {
    for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16}) {
      if (strategy.sample) all.emplace_back(strategy, format);
    }
    all.emplace_back(strategy, BankFormat::kInt8);
  }
  return all;
}

class WhatIsCalledExact : public ::testing::TestWithParam<Case> {
 protected:
  struct Met {
    std::set<Source> sources;
    int exact = 0;  ///< rows that were compared
  };
  /// Serves the traffic, asking for one output after another; rows that are called exact are the plain model's.
  Met serve(LayerCache<Module>& cache) const {
    Met met;
    std::size_t number = 0;
    for (const Request& request : GetParam().first.traffic(model_)) {
      const bool cuts = cache.profile().causal && cache.profile().head_tokenwise;
      const Output output = !cuts             ? Output::kAll
                            : number % 7 == 6 ? Output::kNewTokens
                            : number % 2 == 0 ? Output::kLastToken
                                              : Output::kAll;
      SCOPED_TRACE("request " + std::to_string(number++) + ", output " + std::to_string(static_cast<int>(output)));
      const auto got = cache.forward(request.inputs, {.output = output});
      const ForwardReport report = cache.last_report();
      EXPECT_FALSE(report.replaced) << report.to_string();
      EXPECT_EQ(report.fallback, "");
      const auto want = run_plain(model_.plain, request.inputs);
      for (std::size_t row = 0; row < request.spans.size(); ++row) {
        const SequenceReport& told = report.sequences[row];
        met.sources.insert(told.source);
        if (told.source != Source::kComputed && told.source != Source::kIdentical && told.source != Source::kPrefix)
          continue;
        ++met.exact;
        EXPECT_LE(difference(got, want, request, row, output, told.reused_tokens), tolerance_of(model_.info))
            << "row " << row << "\n"
            << report.to_string();
      }
    }
    return met;
  }
  /// One calibration serves in each format: the budget is not what is tested, and calibrating takes longest.
  std::optional<CalibrationProfile> calibration() const {
    static std::map<std::string, CalibrationProfile> made;
    const auto& [strategy, format] = GetParam();
    if (!strategy.sample) return std::nullopt;
    if (!made.contains(strategy.name)) {
      auto cache = model_.cache.with_options(strategy.options);
      made.emplace(strategy.name, cache.calibrate(strategy.sample(model_.info)));
    }
    CalibrationProfile profile = made.at(strategy.name);
    EXPECT_TRUE(profile.reuses()) << profile.to_string();
    if (profile.reuse) profile.reuse->format = format;
    return profile;
  }
  /// Of a row, relative to the largest magnitude.
  static double difference(const c10::IValue& got, const c10::IValue& want, const Request& request, std::size_t row,
                           Output output, std::int64_t known) {
    const auto at = static_cast<std::int64_t>(row);
    auto a = leaves(got)[0][at].to(at::kDouble);
    auto b = leaves(want)[0][at].to(at::kDouble);
    if (b.dim() == 2) {  // one entry a token
      const std::int64_t all = request.spans[row].tokens;
      const std::int64_t tokens = output == Output::kLastToken ? 1 : output == Output::kNewTokens ? all - known : all;
      if (tokens == 0) return 0;
      a = a.narrow(0, 0, tokens);
      b = b.narrow(0, all - tokens, tokens);
    }
    return (a - b).abs().max().item<double>() / b.abs().max().item<double>();
  }

  Subject& model_ = subject(GetParam().first.model);
};

TEST_P(WhatIsCalledExact, IsThePlainModelsAndNothingIsClosed) {
  const auto& [strategy, format] = GetParam();
  Options options = strategy.options;
  options.budget.format = format;
  const auto profile = calibration();
  for (const double rate : {0.0, 1.0}) {  // of answers that are compared by the cache itself, and replaced
    SCOPED_TRACE(rate);
    options.verify_rate = rate;
    auto cache = model_.cache.with_options(options);
    if (profile) cache.use_calibration(*profile);
    const Met met = serve(cache);
    // A beginning that was rounded is never called a prefix.
    const bool rounded = profile && format != BankFormat::kAsComputed &&
                         !(format == BankFormat::kBFloat16 && model_.info.dtype == "bfloat16");
    for (const Source source : strategy.sources) {
      if (rounded && source == Source::kPrefix) continue;
      EXPECT_TRUE(met.sources.contains(source)) << to_string(source);
    }
    EXPECT_GT(met.exact, 5);
    const VerificationStats verified = cache.stats().verification;
    EXPECT_EQ(verified.mismatches, 0U);
    EXPECT_TRUE(verified.closed.empty()) << verified.closed[0];
    // In the paper's mode nothing is compared.
    EXPECT_EQ(verified.checks > 0, rate > 0 && options.fidelity != Fidelity::kThreshold);
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, WhatIsCalledExact, ::testing::ValuesIn(cases()), [](const auto& param) {
  return test_name({param.param.first.name + "_" + to_string(param.param.second), 0});
});

}  // namespace
}  // namespace llmcache::test
