// Token reuse in encoders: what the model computes anew, what comes from a cached sequence, and how it comes out.
#include "reuse/token_reuse/token_reuse.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>

#include "execute/wrap.h"
#include "llmcache/model/torchscript.h"
#include "model/tensors_of.h"
#include "support.h"

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;

/// A wrapped model, with what probing found, beside a plain one.
struct Encoder {
  explicit Encoder(const std::string& name) : Encoder(model_info(name), load_model(name), load_model(name)) {}
  Encoder(ModelInfo about, const Module& module, Module other)
      : info(std::move(about)), plain(std::move(other)), wrapped([&] {
          const c10::NoGradGuard no_grad;
          return wrap(wrap_torchscript(module, options), options);
        }()) {}

  [[nodiscard]] std::unique_ptr<TokenReuse> reuse(TokenReuseOptions chosen = {},
                                                  std::size_t capacity = std::size_t{64} << 20) const {
    return std::make_unique<TokenReuse>(wrapped, std::move(chosen), capacity);
  }
  [[nodiscard]] Batch batch(const Request& request) const {
    return check_batch(request.inputs, wrapped.inputs, wrapped.profile, wrapped.model->device());
  }

  ModelInfo info;
  Options options;
  Module plain;
  WrappedModel wrapped;
};

Encoder& encoder(const std::string& name) {
  static std::map<std::string, std::unique_ptr<Encoder>> made;
  auto& slot = made[name];
  if (!slot) slot = std::make_unique<Encoder>(name);
  return *slot;
}

/// Rows of these tokens, right-padded; further inputs follow from the ids.
Request request_of(const ModelInfo& info, const std::vector<Tokens>& rows, std::size_t width = 1) {
  for (const Tokens& row : rows) width = std::max(width, row.size());
  std::vector<Span> spans;
  for (const Tokens& row : rows) spans.push_back({0, static_cast<std::int64_t>(row.size())});
  Request request = make_request(info, spans, static_cast<std::int64_t>(width), 1);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    auto row = request.ids()[static_cast<std::int64_t>(r)];
    if (!rows[r].empty()) row.narrow(0, 0, spans[r].tokens).copy_(at::tensor(rows[r], row.options()));
    for (std::size_t i = 2; i < request.inputs.size(); ++i) {
      request.inputs[i].toTensor()[static_cast<std::int64_t>(r)].copy_(row.remainder(2));
    }
  }
  return request;
}

Tokens random_tokens(std::mt19937_64& random, const ModelInfo& info, std::size_t count) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) {
    tokens.push_back(10 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(info.vocab - 10)));
  }
  return tokens;
}

enum class Edit { kNone, kSubstitute, kAppend, kInsert, kDelete, kMove };

Tokens edited(std::mt19937_64& random, const ModelInfo& info, Tokens tokens, Edit edit) {
  const auto fresh = random_tokens(random, info, 3);
  const auto at = tokens.begin() + static_cast<std::ptrdiff_t>(tokens.size() / 2);
  switch (edit) {
    case Edit::kNone:
      break;
    case Edit::kSubstitute:
      std::copy(fresh.begin(), fresh.end(), at);
      break;
    case Edit::kAppend:
      tokens.insert(tokens.end(), fresh.begin(), fresh.end());
      break;
    case Edit::kInsert:
      tokens.insert(at, fresh.begin(), fresh.end());
      break;
    case Edit::kDelete:
      tokens.erase(at, at + 3);
      break;
    case Edit::kMove:
      std::rotate(tokens.begin() + 4, tokens.begin() + 14, tokens.begin() + 34);
      break;
  }
  return tokens;
}

/// Settings that compute as little as they can, whatever the edit.
TokenReuseSettings eager(std::int64_t samples = 4) {
  return {.samples = samples, .max_edit_fraction = 1, .max_computed_fraction = 1};
}

/// Runs in full, and keeps.
void fill(TokenReuse& reuse, const Encoder& encoder, const std::vector<Tokens>& rows, const std::string& tenant = "") {
  const c10::NoGradGuard no_grad;
  ForwardReport report;
  auto result = reuse.run(encoder.batch(request_of(encoder.info, rows)), {}, {}, tenant, true, report);
  reuse.keep(std::move(result.computed));
}

struct Answer {
  c10::IValue value;
  TokenReuse::Matches matches;
  ForwardReport report;
  std::vector<std::vector<SampleShift>> shifts;
};

Answer ask(TokenReuse& reuse, const Encoder& encoder, const Request& request, const TokenReuseSettings& settings,
           bool keep = false) {
  const c10::NoGradGuard no_grad;
  Answer answer;
  const Batch batch = encoder.batch(request);
  answer.matches = reuse.find(batch, "");
  auto result = reuse.run(batch, answer.matches, settings, "", keep, answer.report);
  answer.value = result.value;
  answer.shifts = std::move(result.shifts);
  reuse.keep(std::move(result.computed));
  return answer;
}

/// Mean relative L2 distance of the real entries, over the tensors.
double distance(const c10::IValue& got, const c10::IValue& want) {
  double sum = 0;
  const auto a = leaves(got);
  const auto b = leaves(want);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = a[i].to(at::kDouble);
    const auto y = b[i].to(at::kDouble);
    sum += (x - y).norm().item<double>() / y.norm().item<double>();
  }
  return sum / static_cast<double>(a.size());
}

/// Without the one whose output is read where an input says: its random marks decide what is computed.
std::vector<std::string> encoders() {
  auto names = wrappable_names({"tiny-bert-", "tiny-distilbert-"});
  std::erase(names, "tiny-bert-pooling-mask");
  return names;
}

class TokenReuseModels : public ::testing::TestWithParam<std::string> {};

TEST_P(TokenReuseModels, AnIdenticalSequenceComesOutAsPlain) {
  Encoder& subject = encoder(GetParam());
  const auto reuse = subject.reuse();
  EXPECT_TRUE(reuse->supports_shift());
  std::mt19937_64 random(1);
  const auto tokens = random_tokens(random, subject.info, 40);
  const auto request = request_of(subject.info, {tokens});
  EXPECT_FALSE(ask(*reuse, subject, request, eager()).matches[0].has_value());
  fill(*reuse, subject, {tokens});
  const auto answer = ask(*reuse, subject, request, eager());
  ASSERT_TRUE(answer.matches[0].has_value());
  EXPECT_EQ(answer.matches[0]->edit_fraction, 0);
  EXPECT_EQ(answer.report.sequences[0].source, Source::kPartial);
  EXPECT_EQ(answer.report.sequences[0].similarity, 1);
  for (const LayerTokens& layer : answer.report.sequences[0].layers) {
    EXPECT_EQ(layer.computed, 6);  // the first, the last, and the samples
    EXPECT_EQ(layer.reused, 34);
  }
  EXPECT_NEAR(reuse->computed_fraction(*answer.matches[0], eager()), 6.0 / 40, 1e-12);
  EXPECT_TRUE(
      close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, tolerance_of(subject.info)));
}

TEST(TokenReuse, AnExportedPoolingMaskSaysWhereTheOutputIsRead) {
  Encoder& subject = encoder("tiny-bert-pooling-mask");
  const auto reuse = subject.reuse();
  EXPECT_EQ(reuse->output_positions().read, OutputRead::kMaskedOnes);
  std::mt19937_64 random(11);
  const auto first = random_tokens(random, subject.info, 60);
  auto second = first;
  std::copy_n(random_tokens(random, subject.info, 8).begin(), 8, second.end() - 8);
  const auto marked = [&](const auto& tokens) {
    auto request = request_of(subject.info, {tokens});
    request.inputs[2].toTensor().zero_().narrow(1, 52, 8).fill_(1);
    return request;
  };
  const auto known = marked(first);
  const auto asked = marked(second);
  ask(*reuse, subject, known, eager(), true);
  const auto answer = ask(*reuse, subject, asked, eager());
  ASSERT_TRUE(answer.matches[0].has_value());
  EXPECT_LT(answer.report.computed_fraction(), 0.5);
  const auto want = run_plain(subject.plain, asked.inputs);
  EXPECT_LT(distance(answer.value, want), 0.2 * distance(run_plain(subject.plain, known.inputs), want));
}

TEST_P(TokenReuseModels, WithAllTokensActiveAnEditedSequenceComesOutAsPlain) {
  Encoder& subject = encoder(GetParam());
  std::mt19937_64 random(2);
  const auto tokens = random_tokens(random, subject.info, 40);
  const auto reuse = subject.reuse();
  fill(*reuse, subject, {tokens});
  for (const Edit edit : {Edit::kNone, Edit::kSubstitute, Edit::kAppend}) {
    const auto request = request_of(subject.info, {edited(random, subject.info, tokens, edit)});
    const auto answer = ask(*reuse, subject, request, eager(1000));
    ASSERT_TRUE(answer.matches[0].has_value());
    EXPECT_EQ(answer.report.computed_fraction(), 1);
    EXPECT_TRUE(
        close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, tolerance_of(subject.info)));
  }
}

TEST_P(TokenReuseModels, EditedSequencesComeOutNearAndFarBetterThanTheCachedOne) {
  Encoder& subject = encoder(GetParam());
  std::mt19937_64 random(3);
  for (const Edit edit : {Edit::kSubstitute, Edit::kAppend, Edit::kInsert, Edit::kDelete, Edit::kMove}) {
    SCOPED_TRACE(static_cast<int>(edit));
    double reused = 0;
    double other = 0;
    double fraction = 0;
    for (int turn = 0; turn < 5; ++turn) {
      const auto reuse = subject.reuse();
      const auto tokens = random_tokens(random, subject.info, 100);
      fill(*reuse, subject, {tokens});
      const auto request = request_of(subject.info, {edited(random, subject.info, tokens, edit)});
      const auto answer = ask(*reuse, subject, request, eager(8));
      ASSERT_TRUE(answer.matches[0].has_value());
      ASSERT_LT(answer.matches[0]->edit_fraction, 0.1);
      const auto plain = run_plain(subject.plain, request.inputs);
      reused += distance(answer.value, plain) / 5;
      fraction += answer.report.computed_fraction() / 5;
      const auto unrelated = random_tokens(random, subject.info, request.ids().size(1));
      other += distance(run_plain(subject.plain, request_of(subject.info, {unrelated}).inputs), plain) / 5;
    }
    EXPECT_LT(fraction, 0.25);
    // In random weights the place of a token counts for as much as the token, and moved blocks keep their places.
    const bool moves = edit == Edit::kInsert || edit == Edit::kDelete || edit == Edit::kMove;
    EXPECT_LT(reused, (moves ? 0.8 : 0.3) * other) << "of unrelated text: " << other;
    RecordProperty("error" + std::to_string(static_cast<int>(edit)), std::to_string(reused / other));
  }
}

TEST_P(TokenReuseModels, RowsOfABatchDoNotSeeEachOther) {
  Encoder& subject = encoder(GetParam());
  std::mt19937_64 random(4);
  const auto reuse = subject.reuse();
  const auto a = random_tokens(random, subject.info, 60);
  const auto b = random_tokens(random, subject.info, 33);
  fill(*reuse, subject, {a, b});
  const std::vector<Tokens> rows{edited(random, subject.info, a, Edit::kInsert),
                                 random_tokens(random, subject.info, 45),
                                 edited(random, subject.info, b, Edit::kSubstitute),
                                 random_tokens(random, subject.info, 5),
                                 {},
                                 a};
  const auto request = request_of(subject.info, rows, 70);
  const auto together = ask(*reuse, subject, request, eager());
  ASSERT_EQ(together.matches.size(), rows.size());
  const auto plain = run_plain(subject.plain, request.inputs);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    SCOPED_TRACE(r);
    const bool matched = r == 0 || r == 2 || r == 5;
    EXPECT_EQ(together.matches[r].has_value(), matched);
    EXPECT_EQ(together.report.sequences[r].source, matched ? Source::kPartial : Source::kComputed);
    if (rows[r].empty()) continue;
    const auto cut = [&](const c10::IValue& value, std::int64_t row, std::int64_t width) {
      return row_of(value, subject.wrapped.output, row, 0, static_cast<std::int64_t>(rows[r].size()), width);
    };
    const auto got = cut(together.value, static_cast<std::int64_t>(r), 70);
    const auto alone_request = request_of(subject.info, {rows[r]});
    const auto want = matched ? cut(ask(*reuse, subject, alone_request, eager()).value, 0, alone_request.padded_length)
                              : cut(plain, static_cast<std::int64_t>(r), 70);
    ASSERT_EQ(got.size(), want.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      const auto scale = want[i].to(at::kDouble).abs().max().item<double>();
      EXPECT_LE((got[i].to(at::kDouble) - want[i].to(at::kDouble)).abs().max().item<double>(),
                tolerance_of(subject.info) * scale);
    }
  }
}

TEST_P(TokenReuseModels, SequencesThatAMonitorStopsAreComputedInFullAndCanBeKept) {
  Encoder& subject = encoder(GetParam());
  std::mt19937_64 random(5);
  const auto reuse = subject.reuse();
  const auto a = random_tokens(random, subject.info, 60);
  const auto b = random_tokens(random, subject.info, 40);
  fill(*reuse, subject, {a, b});
  auto settings = eager();
  settings.stop_shift = 1e-3;
  // The second is the cached one: its samples do not shift.
  const auto request = request_of(subject.info, {edited(random, subject.info, a, Edit::kSubstitute), b});
  const auto before = reuse->counters().insertions;
  const auto answer = ask(*reuse, subject, request, settings, true);
  EXPECT_EQ(answer.report.sequences[0].source, Source::kComputed);
  if (subject.info.dtype == "float32") {
    EXPECT_EQ(answer.report.sequences[1].source, Source::kPartial);
    EXPECT_EQ(reuse->counters().insertions, before + 1);
  }
  for (const LayerTokens& layer : answer.report.sequences[0].layers) EXPECT_GE(layer.computed, 60);
  EXPECT_TRUE(
      close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, tolerance_of(subject.info)));
}

TEST_P(TokenReuseModels, LastLayersRunInFull) {
  Encoder& subject = encoder(GetParam());
  const auto layers = static_cast<std::int32_t>(subject.info.layers);
  std::mt19937_64 random(6);
  const auto reuse = subject.reuse({.kept_layers = {1, layers - 1}});
  const auto tokens = random_tokens(random, subject.info, 60);
  fill(*reuse, subject, {tokens});
  auto settings = eager();
  settings.full_layers = 1;
  const auto same = request_of(subject.info, {tokens});
  EXPECT_TRUE(close_on_real(ask(*reuse, subject, same, settings).value, run_plain(subject.plain, same.inputs), same,
                            tolerance_of(subject.info)));
  const auto request = request_of(subject.info, {edited(random, subject.info, tokens, Edit::kSubstitute)});
  const auto plain = run_plain(subject.plain, request.inputs);
  const auto answer = ask(*reuse, subject, request, settings);
  const auto& counted = answer.report.sequences[0].layers;
  EXPECT_EQ(counted.back().computed, 60);
  EXPECT_LT(counted.front().computed, 30);
  EXPECT_NEAR(reuse->computed_fraction(*answer.matches[0], settings), answer.report.computed_fraction(), 1e-9);
  EXPECT_LT(distance(answer.value, plain), distance(run_plain(subject.plain, same.inputs), plain));

  // Widened where a kept layer begins; nothing can have shifted in layer 0.
  settings = eager();
  settings.widen_shift = 0;
  settings.first_watched = 0;
  const auto widened = ask(*reuse, subject, request, settings);
  const auto& wide = widened.report.sequences[0].layers;
  for (std::size_t l = 0; l < wide.size(); ++l) EXPECT_EQ(wide[l].computed, l < 2 ? counted[0].computed : 60);

  settings.full_layers = layers;
  EXPECT_THAT([&] { ask(*reuse, subject, request, settings); }, ThrowsError(ErrorCode::kInvalidOptions, "full_layers"));
  settings.full_layers = layers - 1;
  const auto keeps_none = subject.reuse();
  EXPECT_THAT([&] { ask(*keeps_none, subject, request, settings); },
              ThrowsError(ErrorCode::kInvalidOptions, "kept_layers"));
}

TEST_P(TokenReuseModels, SharedBeginningsAreAveraged) {
  Encoder& subject = encoder(GetParam());
  const c10::NoGradGuard no_grad;
  std::mt19937_64 random(7);
  const auto reuse = subject.reuse();
  const auto passage = random_tokens(random, subject.info, 40);
  const auto last = static_cast<std::int32_t>(subject.info.layers);
  at::Tensor sum;
  std::shared_ptr<const TokenEntry> held;
  at::Tensor held_states;
  for (int turn = 1; turn <= 3; ++turn) {
    auto tokens = passage;
    const auto question = random_tokens(random, subject.info, 8 + static_cast<std::size_t>(turn));
    tokens.insert(tokens.end(), question.begin(), question.end());
    const Batch batch = subject.batch(request_of(subject.info, {tokens}));
    ForwardReport report;
    auto result = reuse->run(batch, {}, {}, "", true, report);
    ASSERT_EQ(result.computed.size(), 1u);
    const auto own = result.computed[0].states->final_states().narrow(0, 0, 40).clone();
    sum = sum.defined() ? sum + own.to(at::kDouble) : own.to(at::kDouble);
    reuse->keep(std::move(result.computed));
    EXPECT_EQ(reuse->counters().entries, 1u);
    const auto match = reuse->find(batch, "")[0];
    ASSERT_TRUE(match.has_value());
    const auto mean = match->donor->hidden(last).narrow(0, 0, 40).to(at::kDouble);
    EXPECT_LE((mean - sum / turn).abs().max().item<double>(),
              tolerance_of(subject.info) * sum.abs().max().item<double>());
    EXPECT_EQ(match->donor->count(0), turn);
    EXPECT_EQ(match->donor->count(match->donor->tokens() - 1), 1);
    EXPECT_TRUE(!held || at::equal(held->hidden(last), held_states)) << "an entry changed under a running pass";
    held = match->donor;
    held_states = held->hidden(last).clone();
  }
  EXPECT_EQ(reuse->counters().averaged, 2u);
}

INSTANTIATE_TEST_SUITE_P(Tiny, TokenReuseModels, ::testing::ValuesIn(encoders()), test_name);

TEST(TokenReuse, TenantsDoNotSeeEachOther) {
  Encoder& subject = encoder("tiny-bert-sdpa");
  const c10::NoGradGuard no_grad;
  std::mt19937_64 random(8);
  const auto reuse = subject.reuse();
  const auto tokens = random_tokens(random, subject.info, 40);
  fill(*reuse, subject, {tokens}, "a");
  const Batch batch = subject.batch(request_of(subject.info, {tokens}));
  EXPECT_TRUE(reuse->find(batch, "a")[0].has_value());
  EXPECT_FALSE(reuse->find(batch, "b")[0].has_value());
  EXPECT_FALSE(reuse->find(batch, "")[0].has_value());
  reuse->clear();
  EXPECT_FALSE(reuse->find(batch, "a")[0].has_value());
  EXPECT_EQ(reuse->counters().bytes, 0u);
}

TEST(TokenReuse, TypesThatDifferAreNotAligned) {
  Encoder& subject = encoder("tiny-bert-types-sdpa");
  const c10::NoGradGuard no_grad;
  std::mt19937_64 random(9);
  const auto reuse = subject.reuse();
  const auto tokens = random_tokens(random, subject.info, 40);
  fill(*reuse, subject, {tokens});
  auto request = request_of(subject.info, {tokens});
  auto types = request.inputs[2].toTensor();
  types.narrow(1, 25, 15).copy_(1 - types.narrow(1, 25, 15));
  const auto match = reuse->find(subject.batch(request), "")[0];
  ASSERT_TRUE(match.has_value());
  EXPECT_EQ(match->alignment.aligned(), 25);
}

TEST(TokenReuse, NeverHoldsMoreThanItsCapacity) {
  Encoder& subject = encoder("tiny-distilbert-sdpa");
  for (const std::size_t capacity : {std::size_t{0}, std::size_t{200} << 10, std::size_t{400} << 10}) {
    SCOPED_TRACE(capacity);
    std::mt19937_64 random(capacity);
    const auto reuse = subject.reuse({}, capacity);
    std::vector<Tokens> pool{random_tokens(random, subject.info, 50)};
    std::uint64_t matched = 0;
    for (int step = 0; step < 80; ++step) {
      std::vector<Tokens> rows;
      for (std::uint64_t r = 0; r < 1 + random() % 3; ++r) {
        rows.push_back(random() % 2 == 0 ? random_tokens(random, subject.info, 20 + random() % 60)
                                         : edited(random, subject.info, pool[random() % pool.size()],
                                                  static_cast<Edit>(random() % 6)));
      }
      const auto request = request_of(subject.info, rows);
      const auto answer = ask(*reuse, subject, request, eager(), true);
      const auto counters = reuse->counters();
      ASSERT_LE(counters.bytes, capacity);
      ASSERT_LE(counters.peak_bytes, capacity);
      for (std::size_t r = 0; r < rows.size(); ++r) {
        matched += answer.matches[r].has_value() ? 1 : 0;
        for (const at::Tensor& leaf : leaves(answer.value)) ASSERT_TRUE(leaf.isfinite().all().item<bool>());
        if (rows[r].size() >= 40 && rows[r].size() < 90) pool.push_back(rows[r]);
      }
    }
    const auto counters = reuse->counters();
    EXPECT_EQ(matched > 0, capacity > 0);
    EXPECT_EQ(counters.evictions > 0, capacity > 0);
    EXPECT_TRUE(counters.rejected > 0 || capacity > 0);
    reuse->clear();
    EXPECT_EQ(reuse->counters().bytes, 0u);
  }
}

TEST(TokenReuse, StatesThatAreNotFiniteAreNeitherKeptNorUsed) {
  const auto info = model_info("tiny-bert-sdpa");
  Module module = load_model("tiny-bert-sdpa");
  constexpr std::int64_t kBad = 299;
  {
    const c10::NoGradGuard no_grad;
    bool found = false;
    for (const auto& parameter : module.named_parameters()) {
      if (parameter.name.find("word_embeddings") == std::string::npos) continue;
      parameter.value[kBad].fill_(std::numeric_limits<float>::quiet_NaN());
      found = true;
    }
    ASSERT_TRUE(found);
  }
  Encoder subject(info, module, module);
  std::mt19937_64 random(10);
  const auto reuse = subject.reuse();
  auto good = random_tokens(random, info, 40);
  for (std::int64_t& token : good) token = std::min(token, kBad - 1);
  auto bad = good;
  bad[20] = kBad;
  fill(*reuse, subject, {bad});
  EXPECT_EQ(reuse->counters().entries, 0u);
  EXPECT_EQ(reuse->counters().bytes, 0u);
  fill(*reuse, subject, {good});
  EXPECT_EQ(reuse->counters().entries, 1u);
  const auto request = request_of(info, {bad, good});
  const auto answer = ask(*reuse, subject, request, eager());
  EXPECT_EQ(answer.report.sequences[0].source, Source::kComputed);
  EXPECT_EQ(answer.report.sequences[1].source, Source::kPartial);
  EXPECT_TRUE(close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, tolerance_of(info)));
}

// Whatever mode a pass runs in, what it computed can be kept, averaged and reused in another.
TEST(TokenReuse, ModesOfAutogradMayDiffer) {
  Encoder& subject = encoder("tiny-bert-pooled");
  std::mt19937_64 random(16);
  const auto reuse = subject.reuse();
  const auto passage = random_tokens(random, subject.info, 40);
  const auto with_question = [&] {
    auto tokens = passage;
    const auto question = random_tokens(random, subject.info, 6);
    tokens.insert(tokens.end(), question.begin(), question.end());
    return request_of(subject.info, {tokens});
  };
  const auto compute = [&](const Request& request) {
    ForwardReport report;
    return reuse->run(subject.batch(request), {}, {}, "", true, report);
  };
  TokenReuse::Result first;
  {
    const c10::InferenceMode inference;
    first = compute(with_question());
  }
  auto second = compute(with_question());
  reuse->keep(std::move(second.computed));
  reuse->keep(std::move(first.computed));
  EXPECT_EQ(reuse->counters().averaged, 1u);
  const Batch batch = subject.batch(with_question());
  ForwardReport report;
  const auto matches = reuse->find(batch, "");
  ASSERT_TRUE(matches[0].has_value());
  const auto outside = reuse->run(batch, matches, eager(), "", false, report).value.toTensor();
  EXPECT_FALSE(outside.requires_grad());
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::allclose(reuse->run(batch, matches, eager(), "", false, report).value.toTensor(), outside));
}

TEST(TokenReuse, LimitsAreKept) {
  Encoder& subject = encoder("tiny-bert-pooled");
  std::mt19937_64 random(11);
  const auto reuse = subject.reuse();
  const auto tokens = random_tokens(random, subject.info, 60);
  fill(*reuse, subject, {tokens});
  const auto request = request_of(subject.info, {edited(random, subject.info, tokens, Edit::kSubstitute)});
  auto settings = eager();
  EXPECT_EQ(ask(*reuse, subject, request, settings).report.sequences[0].source, Source::kPartial);
  settings.max_edit_fraction = 0.04;
  EXPECT_EQ(ask(*reuse, subject, request, settings).report.sequences[0].source, Source::kComputed);
  settings = eager(30);
  settings.max_computed_fraction = 0.5;
  EXPECT_EQ(ask(*reuse, subject, request, settings).report.sequences[0].source, Source::kComputed);
  settings.samples = -1;
  EXPECT_THAT([&] { ask(*reuse, subject, request, settings); }, ThrowsError(ErrorCode::kInvalidOptions, "samples"));
  EXPECT_THAT(
      [&] {
        (void)subject.reuse({.kept_layers = {2, 1}});
      },
      ThrowsError(ErrorCode::kInvalidOptions, "kept_layers"));
  EXPECT_THAT([&] { (void)subject.reuse({.kept_layers = {static_cast<std::int32_t>(subject.info.layers)}}); },
              ThrowsError(ErrorCode::kInvalidOptions, "kept_layers"));
}

TEST(TokenReuse, CausalModelsAreRefused) {
  Encoder& subject = encoder("tiny-gpt2-sdpa");
  EXPECT_THAT([&] { (void)subject.reuse(); }, ThrowsError(ErrorCode::kNotAvailable, "causal"));
}

// Architectures that nothing was written for: they come out right, or are refused with a reason.
class TokenReuseZoo : public ::testing::TestWithParam<std::string> {};

TEST_P(TokenReuseZoo, WorksOrSaysWhyNot) {
  std::unique_ptr<TokenReuse> reuse;
  try {
    reuse = encoder(GetParam()).reuse();
  } catch (const Error& error) {
    ASSERT_THAT(error.code(), ::testing::AnyOf(ErrorCode::kNotAvailable, ErrorCode::kUnsupportedModel));
    ASSERT_GT(std::string(error.what()).size(), 30u);
    // Whole layers only, or refused altogether (xlnet): docs/architecture.md says so.
    ASSERT_THAT(GetParam(), ::testing::AnyOf("zoo-convbert", "zoo-fnet", "zoo-xlnet"));
    return;
  }
  Encoder& subject = encoder(GetParam());
  std::mt19937_64 random(15);
  const auto tokens = random_tokens(random, subject.info, 50);
  fill(*reuse, subject, {tokens});
  for (const auto& [edit, samples] : {std::pair{Edit::kNone, 8}, std::pair{Edit::kSubstitute, 1000}}) {
    const auto request = request_of(subject.info, {edited(random, subject.info, tokens, edit)}, 60);
    const auto answer = ask(*reuse, subject, request, eager(samples));
    ASSERT_TRUE(answer.matches[0].has_value());
    EXPECT_TRUE(
        close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, tolerance_of(subject.info)));
  }
  const auto moved = request_of(subject.info, {edited(random, subject.info, tokens, Edit::kMove)});
  EXPECT_EQ(ask(*reuse, subject, moved, eager()).matches[0]->shifted > 0, reuse->supports_shift());
}

std::vector<std::string> zoo() {
  std::vector<std::string> names;
  for (const std::string& name : wrappable_names({"zoo-"})) {
    if (model_info(name).family == "encoder") names.push_back(name);
  }
  return names;
}

INSTANTIATE_TEST_SUITE_P(Zoo, TokenReuseZoo, ::testing::ValuesIn(zoo()), test_name);

TEST(TokenReuse, ManyThreadsAtOnce) {
  Encoder& subject = encoder("tiny-bert-pooled");
  const auto reuse = subject.reuse({}, std::size_t{600} << 10);
  std::mt19937_64 random(12);
  std::vector<Request> requests;
  std::vector<c10::IValue> plain;
  const auto base = random_tokens(random, subject.info, 50);
  for (int i = 0; i < 12; ++i) {
    requests.push_back(request_of(subject.info, {edited(random, subject.info, base, static_cast<Edit>(i % 6)),
                                                 random_tokens(random, subject.info, 30)}));
    plain.push_back(run_plain(subject.plain, requests.back().inputs));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 24; ++i) {
        const std::size_t which = (i * 5 + t * 3) % requests.size();
        const auto answer = ask(*reuse, subject, requests[which], eager(8), true);
        if (!(distance(answer.value, plain[which]) < 0.5)) ++wrong;
        if (reuse->counters().peak_bytes > (std::size_t{600} << 10)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// --- where the output is read -------------------------------------------------------------------------

Encoder scripted(const std::string& pooling, bool mask = false) {
  Script script;
  script.forward = Script::with(script.forward, "return torch.tanh(x)", pooling);
  ModelInfo info = script_info(script);
  if (mask) {
    script.forward = Script::with(script.forward, "attention_mask: Tensor)", "attention_mask: Tensor, pool: Tensor)");
    info.inputs = 3;
  }
  return Encoder(info, make_module(script), make_module(script));
}

const char* const kPoolMarked =
    "weight = (attention_mask * pool).unsqueeze(-1).to(x.dtype)\n"
    "    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)";

TEST(OutputPositions, AreFoundByProbing) {
  const auto read = [](const Encoder& subject) {
    return output_positions(*subject.wrapped.model, subject.wrapped.inputs, subject.wrapped.output,
                            subject.wrapped.profile);
  };
  EXPECT_EQ(read(encoder("tiny-bert-sdpa")).read, OutputRead::kPerToken);
  EXPECT_EQ(read(encoder("tiny-distilbert-eager")).read, OutputRead::kPerToken);
  EXPECT_EQ(read(encoder("tiny-bert-pooled")).read, OutputRead::kAllTokens);
  EXPECT_EQ(read(encoder("tiny-bert-types-sdpa")).read, OutputRead::kAllTokens);
  EXPECT_EQ(read(scripted("return torch.tanh(x)")).read, OutputRead::kPerToken);
  EXPECT_EQ(read(scripted("return torch.tanh(x[:, 0])")).read, OutputRead::kFirstToken);
  EXPECT_EQ(read(scripted("return torch.tanh(x[:, -1])")).read, OutputRead::kLastToken);
  const auto marked = read(scripted(kPoolMarked, true));
  EXPECT_EQ(marked.read, OutputRead::kMaskedOnes) << marked.note;
  EXPECT_EQ(marked.mask_argument, 2);
  EXPECT_THAT(marked.head_only, ::testing::ElementsAre(false, false, true));
}

TEST(OutputPositions, TokensThatAPoolingMaskMarksAreComputed) {
  Encoder subject = scripted(kPoolMarked, true);
  const auto reuse = subject.reuse();
  std::mt19937_64 random(13);
  const auto tokens = random_tokens(random, subject.info, 60);
  fill(*reuse, subject, {tokens});
  auto request = request_of(subject.info, {tokens});
  auto pool = request.inputs[2].toTensor().zero_();
  pool.narrow(1, 30, 12).fill_(1);
  const auto answer = ask(*reuse, subject, request, eager());
  ASSERT_TRUE(answer.matches[0].has_value());
  EXPECT_EQ(answer.matches[0]->edit_fraction, 0) << "the pooling mask does not move states";
  EXPECT_EQ(answer.report.sequences[0].layers[0].computed, 2 + 12 + 4);
  EXPECT_TRUE(close_on_real(answer.value, run_plain(subject.plain, request.inputs), request, 1e-4));
  pool.fill_(1);
  EXPECT_EQ(ask(*reuse, subject, request, eager()).report.sequences[0].layers[0].computed, 2 + 4);
}

// Layers that look at places themselves: moved text is not reused, text in its place is.
TEST(OutputPositions, ModelsWhoseLayersLookAtPlacesReuseTextInItsPlaceOnly) {
  Script script;
  script.forward =
      Script::with(script.forward, "* -1.0e9",
                   "* -1.0e9 - 0.1 * (places.unsqueeze(0) - places.unsqueeze(1)).abs().to(x.dtype).unsqueeze(0)");
  Encoder subject(script_info(script), make_module(script), make_module(script));
  const auto reuse = subject.reuse();
  EXPECT_FALSE(reuse->supports_shift());
  std::mt19937_64 random(14);
  const auto tokens = random_tokens(random, subject.info, 60);
  fill(*reuse, subject, {tokens});
  const auto request = request_of(subject.info, {edited(random, subject.info, tokens, Edit::kInsert)});
  const auto match = reuse->find(subject.batch(request), "")[0];
  ASSERT_TRUE(match.has_value());
  EXPECT_EQ(match->shifted, 0);
  EXPECT_EQ(match->alignment.aligned(), 30);
}

}  // namespace
}  // namespace llmcache::test
