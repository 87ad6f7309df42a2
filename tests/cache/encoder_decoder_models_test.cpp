// Encoder-decoders made here, unlike those that are exported: of their own, wrong, failing.
#include <random>
#include <set>
#include <stdexcept>

#include "encoder_decoder_support.h"
#include "execute/batch.h"
#include "llmcache/generate.h"

namespace llmcache::test {

/// Gives kept sources of more than 64 tokens a wrong value, and is right as a whole.
struct WrongOnLongSources {};
/// Its layers fail on targets of 9 tokens; as a whole it does not.
struct FailingLayers {};

}  // namespace llmcache::test

template <>
struct llmcache::ModelTraits<llmcache::test::WrongOnLongSources> {
  static std::unique_ptr<llmcache::Model> wrap(llmcache::test::WrongOnLongSources model,
                                               const llmcache::Options& options);
};

template <>
struct llmcache::ModelTraits<llmcache::test::FailingLayers> {
  static std::unique_ptr<llmcache::Model> wrap(llmcache::test::FailingLayers model, const llmcache::Options& options);
};

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

struct SmallModel {
  std::string scale = "2.0";  ///< an expression that what the encoder gives is multiplied by
  std::string keys = "k";     ///< another of the keys `k` of a layer's attention to the source
  std::string mask = "attention_mask: Tensor, ";
  std::string bias = "(1.0 - attention_mask.unsqueeze(1).unsqueeze(1).to(memory.dtype)) * -1.0e9";
};

/// A small encoder-decoder of its own.
Module small_model(const SmallModel& own) {
  const c10::NoGradGuard no_grad;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  const auto weight = [&](std::int64_t rows, double size) {
    return at::randn({rows, 32}, generator, at::TensorOptions()).mul(size);
  };
  const auto unit = std::make_shared<torch::jit::CompilationUnit>();
  Module model(c10::QualifiedName("__torch__.Small"), unit);
  model.register_parameter("table", weight(300, 1), false);
  model.register_parameter("places", weight(256, 0.5), false);
  model.register_parameter("mix", weight(32, 0.12), false);
  for (const char* name : {"l0", "l1"}) {
    Module layer(c10::QualifiedName("__torch__.SmallLayer"), unit, /*shouldMangle=*/true);
    for (const char* weight_of : {"wq", "wk", "wv", "xq", "xk", "xv", "up"}) {
      layer.register_parameter(weight_of, weight(32, 0.12), false);
    }
    layer.define(R"(
def forward(self, y: Tensor, memory: Tensor, bias: Tensor, earlier: Tensor) -> Tensor:
    heads = y.unsqueeze(1)
    own = torch.scaled_dot_product_attention(torch.matmul(heads, self.wq), torch.matmul(heads, self.wk), torch.matmul(heads, self.wv), earlier)
    y = y + own.squeeze(1)
    k = torch.matmul(memory, self.xk)
    k = ()" + own.keys +
                 R"().unsqueeze(1)
    v = torch.matmul(memory, self.xv).unsqueeze(1)
    of_source = torch.scaled_dot_product_attention(torch.matmul(y, self.xq).unsqueeze(1), k, v, bias)
    y = y + of_source.squeeze(1)
    return y + torch.tanh(torch.matmul(y, self.up))
)");
    model.register_module(name, layer);
  }
  model.define(R"(
def forward(self, input_ids: Tensor, )" +
               own.mask + R"(decoder_input_ids: Tensor) -> Tensor:
    memory = torch.embedding(self.table, input_ids) + torch.embedding(self.places, torch.arange(input_ids.size(1)))
    memory = torch.tanh(torch.matmul(memory, self.mix)) * ()" +
               own.scale + R"()
    bias = )" + own.bias +
               R"(
    y = torch.embedding(self.table, decoder_input_ids) + torch.embedding(self.places, torch.arange(decoder_input_ids.size(1)))
    places = torch.arange(decoder_input_ids.size(1))
    earlier = places.unsqueeze(0) <= places.unsqueeze(1)
    y = self.l0.forward(y, memory, bias, earlier)
    y = self.l1.forward(y, memory, bias, earlier)
    return torch.tanh(y)
)");
  return model;
}

TEST(EncoderDecoderModels, OneOfItsOwnIsTakenApart) {
  Module plain = small_model({});
  LayerCache<Module> cache(small_model({}));
  const ModelProfile& profile = cache.profile();
  EXPECT_EQ(profile.granularity, Granularity::kTokens) << profile.to_string();
  EXPECT_TRUE(profile.prefix_reuse && profile.source_reuse) << profile.to_string();
  EXPECT_EQ(profile.source_mask_argument, 1);
  std::mt19937 random(22);
  const Ids source = random_ids(random, 60);
  for (const std::size_t other : {70, 90, 120}) {
    const auto request =
        request_of(profile, {{source, random_ids(random, 5)}, {random_ids(random, other), random_ids(random, 5)}});
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, 1e-4));
  }
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(60, 0));
  EXPECT_EQ(cache.stats().verification.mismatches, 0U);
}

/// Right wherever probes look, which are shorter than 48 tokens.
TEST(EncoderDecoderModels, WhatFollowsFromThePaddingOfSourcesIsKnownWithIt) {
  const std::string scale = "48.0 / float(max(input_ids.size(1), 48))";
  Module plain = small_model({.scale = scale});
  LayerCache<Module> cache(small_model({.scale = scale}), {.verify_rate = 0});
  EXPECT_EQ(cache.profile().source_mask_argument, -1) << cache.profile().to_string();
  EXPECT_THAT(cache.profile().to_string(), HasSubstr("sources are known with the padding behind them only"));
  std::mt19937 random(23);
  const std::vector<Row> row{{random_ids(random, 60), random_ids(random, 5)}};
  for (const std::int64_t padding : {0, 30, 5, 30}) {
    const auto request = request_of(cache.profile(), row, padding);
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, 1e-4));
  }
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 5);
}

/// What is kept of a source must be what the layers get, not what they make of it.
TEST(EncoderDecoderModels, LayersMayWriteToWhatFollowsFromASource) {
  for (const char* keys : {"k.mul_(3.0)", "k.mul_(3.0).add_(0.25)", "k.relu_()"}) {
    Module plain = small_model({.keys = keys});
    LayerCache<Module> cache(small_model({.keys = keys}), {.verify_rate = 0});
    std::mt19937 random(26);
    const Ids source = random_ids(random, 12);
    for (const std::size_t target : {5, 7, 6}) {
      const auto request = request_of(cache.profile(), {{source, random_ids(random, target)}});
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, 1e-4))
          << keys << ", " << target << " tokens\n"
          << cache.profile().to_string();
    }
    EXPECT_EQ(cache.stats().verification.mismatches, 0U);
  }
}

TEST(EncoderDecoderModels, SourcesAreCheckedWhereThereIsNoTarget) {
  LayerCache<Module> cache(small_model({}));
  const auto empty = at::zeros({1, 0}, at::kLong);
  const auto source_of = [](std::int64_t id) { return at::full({1, 3}, id, at::kLong); };
  EXPECT_THAT(
      [&] {
        (void)cache.forward({source_of(300), at::ones({1, 3}, at::kLong), empty});
      },
      ThrowsError(ErrorCode::kInvalidInput, "'input_ids' holds 300"));
  EXPECT_THAT(
      [&] {
        (void)cache.forward({at::zeros({1, 257}, at::kLong), at::ones({1, 257}, at::kLong), empty});
      },
      ThrowsError(ErrorCode::kInvalidInput, "source 0 has 257 tokens"));
  EXPECT_EQ(cache.forward({source_of(5), at::ones({1, 3}, at::kLong), empty}).toTensor().size(1), 0);
}

TEST(EncoderDecoderModels, AnEmptySourceIsRefusedByName) {
  const LayerCache<Module> cache(small_model({}));
  EXPECT_THAT(
      [&] {
        (void)pad({{5, 6}}).inputs(cache.profile(), PaddedBatch{});
      },
      ThrowsError(ErrorCode::kInvalidInput, "the source is empty"));
}

TEST(EncoderDecoderModels, TextsOfUnlikeSourcesGrowWithoutAMask) {
  const SmallModel unmasked{.mask = "", .bias = "torch.zeros(1, 1, 1, 1)"};
  Module plain = small_model(unmasked);
  LayerCache<Module> cache(small_model(unmasked));
  ASSERT_EQ(cache.profile().source_arguments, std::vector<int>{0}) << cache.profile().to_string();
  std::mt19937 random(27);
  const std::vector<Ids> sources{random_ids(random, 8), random_ids(random, 5), random_ids(random, 8)};
  const std::vector<Ids> prompts(3, Ids{11, 12});
  const auto all = generate_batch(cache, prompts, {.max_new_tokens = 6, .sources = sources});
  ASSERT_EQ(all.size(), 3U);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    Ids want = prompts[i];
    for (int step = 0; step < 6; ++step) {
      const auto logits = run_plain(plain, {at::tensor(sources[i]).unsqueeze(0), at::tensor(want).unsqueeze(0)});
      want.push_back(logits.toTensor().select(1, -1).argmax().item<std::int64_t>());
    }
    EXPECT_EQ(all[i].tokens, Ids(want.begin() + 2, want.end())) << i;
  }
}

/// Which input a row's source came in is part of what its target is known by.
TEST(EncoderDecoderModels, TheSameNumbersInAnotherInputAreAnotherSource) {
  InputSpec spec{{"ids", "marks", "segments", "target"}, {false, true, true, false}, {300, 0, 0, 300}};
  spec.source = {true, true, true, false};
  ModelProfile profile;
  profile.inputs = spec.names;
  profile.ids_argument = 3;
  profile.source_arguments = {0, 1, 2};
  const auto ids = at::tensor({5, 6, 7, 8}, at::kLong).unsqueeze(0);
  const auto numbers = at::tensor({1, 1, 1, 0}, at::kLong).unsqueeze(0);
  const auto batch = [&](const c10::IValue& marks, const c10::IValue& segments) {
    return check_batch({ids, marks, segments, ids}, spec, profile, at::kCPU);
  };
  const auto partition = [](const Batch& one, const std::string& tenant) {
    return one.keys(tenant, {}).at(0).partition;
  };
  const c10::IValue none;
  const std::vector<Batch> batches{batch(numbers, none), batch(none, numbers), batch(numbers, numbers),
                                   batch(none, none), batch(numbers.to(at::kBool), none)};
  std::set<std::string> partitions;
  std::set<std::string> sources;
  for (const Batch& one : batches) {
    partitions.insert(partition(one, "t"));
    sources.insert(one.source_key(0, "t"));
  }
  EXPECT_EQ(partitions.size(), batches.size());
  EXPECT_EQ(sources.size(), batches.size());
  // Tenants whose names complete what stands beside them.
  for (const Batch& one : batches) {
    for (const Batch& other : batches) {
      const std::string tail = partition(other, "").substr(sizeof(std::int64_t));
      EXPECT_TRUE(&one == &other || partition(one, "") != partition(other, tail));
    }
  }
}

class WrongModel : public TwoLayers {
 public:
  class Sources final : public SourceModel {
   public:
    explicit Sources(const at::Tensor& table) : table_(table) {}
    std::vector<at::Tensor> run(const Inputs& inputs) const override {
      const auto states = at::embedding(table_, inputs.at(0).toTensor()).cumsum(1);
      return {states.size(1) > 64 ? states + 1 : states};
    }
    const std::vector<int>& token_dims() const override { return dims_; }
    bool shareable() const override { return true; }

   private:
    const at::Tensor& table_;
    std::vector<int> dims_{1};
  };

  Activations embed(const Inputs& inputs) const override {
    const auto states =
        inputs.size() > 2 ? inputs[2].toTensorVector().at(0) : at::embedding(table_, inputs.at(0).toTensor()).cumsum(1);
    return {at::embedding(table_, inputs.at(1).toTensor()) + states.mean(1, /*keepdim=*/true), nullptr};
  }
  std::string digest() const override { return "wrong on long sources"; }
  const SourceModel* source() const override { return &sources_; }

 private:
  at::Tensor table_ = at::arange(300 * 8, at::kFloat).view({300, 8}).sin();
  Sources sources_{table_};
};

TEST(EncoderDecoderModels, KeptSourcesThatAreWrongBeyondTheProbesAreClosed) {
  LayerCache<WrongOnLongSources> cache(WrongOnLongSources{});
  ASSERT_TRUE(cache.profile().source_reuse) << cache.profile().to_string();
  const WrongModel plain;
  std::mt19937 random(24);
  const auto inputs_of = [&](std::size_t source) -> Inputs {
    return {at::tensor(random_ids(random, source)).unsqueeze(0), at::tensor(random_ids(random, 5)).unsqueeze(0)};
  };
  for (const std::size_t tokens : {12, 12, 70, 70, 12}) {
    const auto inputs = inputs_of(tokens);
    EXPECT_TRUE(at::allclose(cache.forward(inputs).toTensor(), plain.plain(inputs).toTensor()));
  }
  const auto verification = cache.stats().verification;
  EXPECT_EQ(verification.mismatches, 1U);
  ASSERT_EQ(verification.closed.size(), 1U);
  EXPECT_THAT(verification.closed[0], ::testing::StartsWith("source: "));
}

/// As above, but for the sources; its layers fail where a target has 9 tokens.
class FailingModel final : public WrongModel {
 public:
  void layer(std::int64_t i, Activations& activations) const override {
    if (activations.hidden.size(1) == 9) throw std::runtime_error("no memory for nine tokens");
    WrongModel::layer(i, activations);
  }
  c10::IValue plain(const Inputs& inputs) const override {
    Activations activations = embed(inputs);
    for (std::int64_t l = 0; l < layers(); ++l) WrongModel::layer(l, activations);
    return head(activations);
  }
};

TEST(EncoderDecoderModels, ASourceThatWasComputedBeforeAFailureIsKept) {
  LayerCache<FailingLayers> cache(FailingLayers{}, {.verify_rate = 0});
  ASSERT_TRUE(cache.profile().source_reuse) << cache.profile().to_string();
  const FailingModel plain;
  std::mt19937 random(28);
  const auto source = at::tensor(random_ids(random, 20)).unsqueeze(0);
  const auto ask = [&](std::size_t target) {
    const Inputs inputs{source, at::tensor(random_ids(random, target)).unsqueeze(0)};
    EXPECT_TRUE(at::allclose(cache.forward(inputs).toTensor(), plain.plain(inputs).toTensor()));
    return cache.last_report();
  };
  const auto failed = ask(9);
  EXPECT_THAT(failed.fallback, HasSubstr("no memory for nine tokens"));
  EXPECT_EQ(failed.sequences.at(0).source_reused, 0);
  EXPECT_EQ(ask(5).sequences.at(0).source_reused, 20);
  EXPECT_EQ(ask(9).sequences.at(0).source_reused, 0) << "the plain model computed it again";
}

TEST(EncoderDecoderModels, PackedWeightsChangeNothingOfIt) {
  const LayerCache<Module> wrapped(load_model("seq2seq-bart"), {.weights = Weights::kPackedFp32});
  auto cache = wrapped.with_options({.weights = Weights::kPackedFp32});
  EXPECT_TRUE(cache.profile().source_reuse && cache.profile().prefix_reuse) << cache.profile().to_string();
  std::mt19937 random(25);
  std::vector<Row> row{{random_ids(random, 9), random_ids(random, 5)}};
  for (int step = 0; step < 3; ++step) {
    const auto request = request_of(cache.profile(), row);
    const auto want = run_plain(subject("seq2seq-bart").plain, request.inputs);
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, 1e-4));
    row[0].target.push_back(20 + step);
  }
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(9));
}

TEST(EncoderDecoderModels, ManyThreadsAtOnce) {
  auto& model = subject("seq2seq-bart-masked");
  auto cache = model.cache.with_options({.capacity_bytes = std::size_t{400} << 10});
  std::mt19937 random(26);
  std::vector<Request> requests;
  std::vector<c10::IValue> wanted;
  std::vector<Ids> sources;
  for (const std::size_t length : {5, 9, 14}) sources.push_back(random_ids(random, length));
  for (std::size_t i = 0; i < 12; ++i) {
    requests.push_back(
        request_of(cache.profile(), {{sources[i % 3], random_ids(random, 1 + i)}, {sources[i / 4], {0, 11}}}));
    wanted.push_back(run_plain(model.plain, requests.back().inputs));
  }
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (std::size_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 2 * requests.size(); ++i) {
        const std::size_t k = (i * 5 + t * 7) % requests.size();
        if (!close_on_real(cache.forward(requests[k].inputs), wanted[k], requests[k], 1e-4)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(cache.stats().verification.mismatches, 0U);
  EXPECT_LE(cache.stats().peak_bytes, cache.options().capacity_bytes);
}

TEST(EncoderDecoderModels, WhatDoesNotKnowSourcesSaysSo) {
  auto& model = subject("seq2seq-t5");
  auto budget = model.cache.with_options({.fidelity = Fidelity::kBudget});
  std::mt19937 random(27);
  const auto request = request_of(budget.profile(), {{random_ids(random, 9), random_ids(random, 5)}});
  EXPECT_TRUE(close_on_real(budget.forward(request.inputs), run_plain(model.plain, request.inputs), request, 1e-4));
  EXPECT_THAT([&] { (void)model.cache.with_options({.fidelity = Fidelity::kThreshold}); },
              ThrowsError(ErrorCode::kNotAvailable, "states of an encoder-decoder belong to their source too"));
  EXPECT_THAT(
      [&] {
        (void)pad({{11, 12}}).inputs(model.cache.profile());
      },
      ThrowsError(ErrorCode::kInvalidInput, "computes a target from a source"));
}

}  // namespace
}  // namespace llmcache::test

std::unique_ptr<llmcache::Model> llmcache::ModelTraits<llmcache::test::WrongOnLongSources>::wrap(
    llmcache::test::WrongOnLongSources /*model*/, const llmcache::Options& /*options*/) {
  return std::make_unique<llmcache::test::WrongModel>();
}

std::unique_ptr<llmcache::Model> llmcache::ModelTraits<llmcache::test::FailingLayers>::wrap(
    llmcache::test::FailingLayers /*model*/, const llmcache::Options& /*options*/) {
  return std::make_unique<llmcache::test::FailingModel>();
}
