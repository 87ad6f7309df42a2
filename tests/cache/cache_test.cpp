// LayerCache as a cache: what is found, what is not, and what it may cost in memory.
#include <map>
#include <random>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;

class Cache : public ::testing::Test {
 protected:
  explicit Cache(const std::string& name = "tiny-scripted", const Options& options = {})
      : model_(subject(name)), cache_(cache_of(name, options)) {}

  [[nodiscard]] Request right(const std::vector<std::int64_t>& lengths, std::uint64_t seed,
                              std::int64_t width = 0) const {
    return right_padded(model_.info, lengths, seed, width);
  }
  c10::IValue plain(const Inputs& inputs) { return run_plain(model_.plain, inputs); }
  c10::IValue identical(const Inputs& inputs) { return cache_.forward(inputs, {.fidelity = Fidelity::kIdentical}); }
  c10::IValue lossless(const Inputs& inputs) { return cache_.forward(inputs, {.fidelity = Fidelity::kLossless}); }

  /// Where the rows of the latest call came from.
  [[nodiscard]] std::vector<Source> sources() const {
    std::vector<Source> found;
    for (const SequenceReport& sequence : cache_.last_report().sequences) found.push_back(sequence.source);
    return found;
  }
  /// Rows of several requests side by side, padded on the right to `width`.
  static Inputs batch_of(const std::vector<Request>& rows, std::int64_t width) {
    Inputs inputs;
    for (std::size_t i = 0; i < rows[0].inputs.size(); ++i) {
      std::vector<at::Tensor> parts;
      for (const Request& row : rows) {
        const auto own = row.inputs[i].toTensor();
        parts.push_back(at::constant_pad_nd(own, {0, width - own.size(1)}, 0));
      }
      inputs.emplace_back(at::cat(parts, 0));
    }
    return inputs;
  }

  static constexpr Source kNew = Source::kComputed;
  static constexpr Source kOld = Source::kIdentical;

  Subject& model_;
  LayerCache<Module> cache_;
};

TEST_F(Cache, IdenticalRequestIsFound) {
  const auto request = right({9, 9, 9}, 1);
  const auto want = plain(request.inputs);
  EXPECT_TRUE(same_bits(identical(request.inputs), want));
  EXPECT_THAT(sources(), ElementsAre(kNew, kNew, kNew));
  EXPECT_EQ(cache_.stats().insertions, 3U);
  EXPECT_TRUE(same_bits(identical(copy_of(request.inputs)), want));
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld, kOld));
  const auto report = cache_.last_report();
  EXPECT_EQ(report.execution, Execution::kNone);
  EXPECT_EQ(report.computed_fraction(), 0);
  EXPECT_EQ(report.sequences[1].similarity, 1);
  EXPECT_EQ(report.sequences[1].layers[2].reused, 9);
  EXPECT_EQ(report.sequences[1].layers[2].computed, 0);
  const auto stats = cache_.stats();
  EXPECT_EQ(stats.requests, 2U);
  EXPECT_EQ(stats.sequences, 6U);
  EXPECT_EQ(stats.identical_hits, 3U);
  EXPECT_EQ(stats.hit_rate(), 0.5);
  EXPECT_EQ(stats.tokens, 54U);
  EXPECT_EQ(stats.tokens_computed, 27U);
  EXPECT_EQ(stats.entries, 3U);
  EXPECT_EQ(stats.insertions, 3U);
}

TEST_F(Cache, RowsAreFoundInAnotherBatchOrderAndWidth) {
  const auto a = right({9}, 1);
  const auto b = right({4}, 2);
  const auto c = right({12}, 3);
  const auto d = right({6}, 4);
  const auto first = identical(batch_of({a, b, c}, 12)).toTensor();
  const auto second = identical(batch_of({c, d, b}, 20)).toTensor();
  EXPECT_THAT(sources(), ElementsAre(kOld, kNew, kOld));
  EXPECT_TRUE(same_bits(second[0].narrow(0, 0, 12), first[2].narrow(0, 0, 12)));
  EXPECT_TRUE(same_bits(second[2].narrow(0, 0, 4), first[1].narrow(0, 0, 4)));
  EXPECT_TRUE(padding_is_zero(second, {{}, {{0, 12}, {0, 20}, {0, 4}}, 20})) << "of rows that were found";
  const auto all = batch_of({c, d, b}, 20);
  EXPECT_TRUE(close_on_real(second, plain(all), {all, {{0, 12}, {0, 6}, {0, 4}}, 20}, 1e-4));
  EXPECT_TRUE(same_bits(identical(a.inputs), first.narrow(0, 0, 1).narrow(1, 0, 9))) << "alone, without padding";
  EXPECT_THAT(sources(), ElementsAre(kOld));
}

TEST_F(Cache, TheSameRowTwiceInOneBatch) {
  const auto a = right({9}, 1);
  const auto inputs = batch_of({a, a, a}, 9);
  EXPECT_TRUE(same_bits(lossless(inputs), plain(inputs)));
  EXPECT_EQ(cache_.stats().entries, 1U);
  EXPECT_TRUE(close_on_real(lossless(inputs), plain(inputs), {inputs, {{0, 9}, {0, 9}, {0, 9}}, 9}, 1e-5));
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld, kOld));
}

TEST_F(Cache, OneTokenDifferentIsAMiss) {
  const auto request = right({9}, 1);
  identical(request.inputs);
  for (std::int64_t position = 0; position < 9; ++position) {
    auto other = Inputs(copy_of(request.inputs));
    auto cell = other[0].toTensor()[0][position];
    cell.fill_(cell.item<std::int64_t>() == 50 ? 51 : 50);
    EXPECT_TRUE(same_bits(identical(other), plain(other)));
    EXPECT_THAT(sources(), ElementsAre(kNew)) << position;
  }
  // A prefix, and one token more.
  const auto shorter = right({9}, 1);
  Inputs prefix;
  for (const auto& input : shorter.inputs) prefix.emplace_back(input.toTensor().narrow(1, 0, 8));
  EXPECT_TRUE(same_bits(identical(prefix), plain(prefix)));
  EXPECT_THAT(sources(), ElementsAre(kNew));
  EXPECT_EQ(cache_.stats().identical_hits, 0U);
}

TEST_F(Cache, TenantsAreApart) {
  const auto request = right({9}, 1);
  const std::string with_zero("a\0b", 3);
  for (const std::string& tenant :
       {std::string(), std::string("a"), std::string("b"), with_zero, std::string("a\0", 2)}) {
    cache_.forward(request.inputs, {.tenant = tenant});
    EXPECT_THAT(sources(), ElementsAre(kNew)) << "tenant '" << tenant << "'";
    cache_.forward(request.inputs, {.tenant = tenant});
    EXPECT_THAT(sources(), ElementsAre(kOld)) << "tenant '" << tenant << "'";
  }
  EXPECT_EQ(cache_.stats().entries, 5U);
}

TEST_F(Cache, OtherMaskIsAMiss) {
  const auto request = right({9}, 1);
  lossless(request.inputs);
  for (const std::int64_t masked : {0, 4, 8}) {
    auto other = Inputs(copy_of(request.inputs));
    other[1].toTensor()[0][masked].fill_(0);
    const auto want = plain(other);
    EXPECT_TRUE(close_on_real(lossless(other), want, {other, {{masked == 0 ? 1 : 0, masked == 4 ? 4 : 8}}, 9}, 1e-4));
    EXPECT_THAT(sources(), ElementsAre(kNew)) << masked;
  }
}

TEST_F(Cache, MaskValuesAreComparedToo) {
  // What is not 0 is real, but this model makes something else of a 2 than of a 1.
  const auto request = right({9}, 1);
  auto other = Inputs(copy_of(request.inputs));
  other[1].toTensor()[0][3].fill_(2);
  const auto want = plain(request.inputs);
  const auto want_other = plain(other);
  ASSERT_FALSE(same_bits(want_other, want));
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(same_bits(lossless(request.inputs), want));
    EXPECT_TRUE(same_bits(lossless(other), want_other));
  }
}

TEST_F(Cache, TypesOfInputsAreNotConfused) {
  const auto request = right({9, 5}, 1);
  for (int turn = 0; turn < 2; ++turn) {
    for (const auto ids : {at::kLong, at::kInt}) {
      for (const auto mask : {at::kLong, at::kInt, at::kBool, at::kByte}) {
        const Inputs inputs{request.ids().to(ids), request.mask().to(mask)};
        EXPECT_TRUE(close_on_real(lossless(inputs), plain(request.inputs), request, 1e-4));
      }
    }
  }
  // The same bytes, read as other numbers: two int64 and four int32.
  const Inputs wide{at::tensor({20, 30}, at::kLong).view({1, 2}), at::ones({1, 2}, at::kLong)};
  const Inputs narrow{at::tensor({20, 0, 30, 0}, at::kInt).view({1, 4}), at::ones({1, 4}, at::kLong)};
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(same_bits(lossless(wide), plain(wide)));
    EXPECT_TRUE(same_bits(lossless(narrow), plain(narrow)));
  }
}

TEST_F(Cache, PaddingIsLeftOutWhereThatPays) {
  struct PaddedCase {
    std::vector<std::int64_t> lengths;
    std::int64_t cost;
    Execution expected;
  };
  const std::vector<PaddedCase> cases{
      {{10, 9, 10, 9}, 6, Execution::kDense},   {{10, 9, 10, 9}, 0, Execution::kPacked},
      {{10, 2}, 6, Execution::kPacked},         {{10, 5}, 6, Execution::kDense},
      {{10, 10}, 0, Execution::kDense},         {{60, 54, 60, 60}, 6, Execution::kDense},
      {{60, 42, 60, 60}, 6, Execution::kPacked}};
  for (const auto& [lengths, cost, expected] : cases) {
    LayerCache<Module> cache = cache_of("tiny-scripted", {.packing_cost_tokens = cost});
    const auto request = right(lengths, 5);
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), plain(request.inputs), request, 1e-4));
    EXPECT_EQ(cache.last_report().execution, expected) << ::testing::PrintToString(lengths) << " at " << cost;
  }
  EXPECT_THAT([] { cache_of("tiny-scripted", {.packing_cost_tokens = -1}); },
              ThrowsError(ErrorCode::kInvalidOptions, "packing_cost_tokens is -1"));
}

TEST_F(Cache, PackedEntriesAreNotServedAsIdentical) {
  const auto ragged = right({9, 2}, 1);
  const auto want = plain(ragged.inputs);
  EXPECT_TRUE(close_on_real(lossless(ragged.inputs), want, ragged, 1e-4));
  ASSERT_EQ(cache_.last_report().execution, Execution::kPacked);
  EXPECT_TRUE(close_on_real(lossless(ragged.inputs), want, ragged, 1e-4));
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld)) << "lossless may have them";
  EXPECT_TRUE(same_bits(identical(ragged.inputs), want));
  EXPECT_THAT(sources(), ElementsAre(kNew, kNew)) << "identical may not";
  const auto again = identical(ragged.inputs);
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld)) << "but has what it computed itself";
  EXPECT_EQ(real_difference(again, want, ragged), 0);
  lossless(ragged.inputs);
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld)) << "and lossless may have either";
  EXPECT_EQ(cache_.stats().entries, 2U);
}

TEST_F(Cache, PackedRowsBesideKnownOnes) {
  const auto a = right({9}, 1);
  lossless(a.inputs);
  const auto inputs = batch_of({right({3}, 2), a, right({7}, 3)}, 9);
  const Request whole{inputs, {{0, 3}, {0, 9}, {0, 7}}, 9};
  const auto got = lossless(inputs);
  EXPECT_THAT(sources(), ElementsAre(kNew, kOld, kNew));
  EXPECT_EQ(cache_.last_report().execution, Execution::kPacked);
  EXPECT_TRUE(close_on_real(got, plain(inputs), whole, 1e-4));
  EXPECT_TRUE(padding_is_zero(got, whole));
  EXPECT_EQ(cache_.stats().tokens_computed, 19U);
  EXPECT_EQ(cache_.stats().padding_skipped, 8U);
}

TEST_F(Cache, ClearForgetsAndCountersStay) {
  const auto request = right({9, 5}, 1);
  lossless(request.inputs);
  cache_.clear();
  const auto stats = cache_.stats();
  EXPECT_EQ(stats.entries, 0U);
  EXPECT_EQ(stats.bytes, 0U);
  EXPECT_EQ(stats.insertions, 2U);
  EXPECT_GT(stats.peak_bytes, 0U);
  EXPECT_TRUE(close_on_real(lossless(request.inputs), plain(request.inputs), request, 1e-4));
  EXPECT_THAT(sources(), ElementsAre(kNew, kNew));
}

TEST_F(Cache, ResultsAreTheCallersOwn) {
  const auto request = right({9, 9}, 1);
  const auto want = plain(request.inputs).toTensor().clone();
  auto first = identical(request.inputs).toTensor();  // computed
  first.fill_(1e9);
  auto second = identical(request.inputs).toTensor();  // found
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld));
  EXPECT_TRUE(same_bits(second, want));
  second.fill_(-1e9);
  EXPECT_TRUE(same_bits(identical(request.inputs), want));
  const auto one = right({9}, 5);
  const auto want_one = plain(one.inputs).toTensor().clone();
  identical(one.inputs).toTensor().zero_();
  identical(one.inputs).toTensor().zero_();
  EXPECT_TRUE(same_bits(identical(one.inputs), want_one)) << "a batch of one row";
}

TEST_F(Cache, InputsAreTheCallersOwn) {
  auto request = right({9, 4}, 1);
  const auto before = copy_of(request.inputs);
  const auto ids_version = request.ids()._version();
  lossless(request.inputs);
  lossless(request.inputs);
  EXPECT_TRUE(same_bits(request.ids(), before[0]));
  EXPECT_TRUE(same_bits(request.mask(), before[1]));
  EXPECT_EQ(request.ids()._version(), ids_version);
  // Changed after the call: nothing of what is kept may follow.
  request.ids()[0][2].fill_(77);
  EXPECT_TRUE(close_on_real(lossless(request.inputs), plain(request.inputs), request, 1e-4));
  EXPECT_THAT(sources(), ElementsAre(kNew, kOld));
  EXPECT_TRUE(close_on_real(lossless(before), plain(before), request, 1e-4));
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld));
}

TEST_F(Cache, ResultsNeedNoGradient) {
  const auto request = right({9}, 1);
  EXPECT_FALSE(lossless(request.inputs).toTensor().requires_grad());
  EXPECT_FALSE(lossless(request.inputs).toTensor().requires_grad());
}

TEST_F(Cache, ReportsTellWhatWasDone) {
  const auto request = right({9, 4, 0}, 1);
  lossless(request.inputs);
  const auto report = cache_.last_report();
  EXPECT_EQ(report.execution, Execution::kPacked);
  ASSERT_EQ(report.sequences.size(), 3U);
  EXPECT_EQ(report.sequences[0].tokens, 9);
  EXPECT_EQ(report.sequences[2].tokens, 0);
  for (const LayerTokens& layer : report.sequences[1].layers) {
    EXPECT_EQ(layer.computed, 4);
    EXPECT_EQ(layer.reused, 0);
  }
  ASSERT_EQ(report.layer_ms.size(), 3U);
  double parts = report.lookup_ms + report.embed_ms + report.head_ms + report.store_ms;
  for (const double ms : report.layer_ms) {
    EXPECT_GT(ms, 0);
    parts += ms;
  }
  EXPECT_LE(parts, report.total_ms * 1.001);
  EXPECT_EQ(cache_.stats().padding_skipped, 14U);
}

class CacheOfPairs : public Cache {
 protected:
  CacheOfPairs() : Cache("tiny-bert-types-sdpa") {}
};

TEST_F(CacheOfPairs, FurtherInputsAreCompared) {
  const auto request = right({9, 5}, 1);
  lossless(request.inputs);
  auto other = Inputs(copy_of(request.inputs));
  auto cell = other[2].toTensor()[0][4];
  cell.copy_(1 - cell);
  EXPECT_TRUE(close_on_real(lossless(other), plain(other), request, 1e-4));
  EXPECT_THAT(sources(), ElementsAre(kNew, kOld));
}

TEST_F(CacheOfPairs, TuplesAreFound) {
  const auto request = right({9, 9}, 1);
  const auto want = plain(request.inputs);
  identical(request.inputs);
  const auto got = identical(request.inputs);
  EXPECT_THAT(sources(), ElementsAre(kOld, kOld));
  EXPECT_TRUE(got.isTuple());
  EXPECT_TRUE(same_bits(got, want));
}

// Ids at padding positions decide positions of some models; the key must not leave them out.
TEST(CacheOfPositions, IdsInFrontOfTheFirstRealToken) {
  Subject& model = subject("zoo-roberta");
  LayerCache<Module> cache = cache_of("zoo-roberta");
  auto padded = left_padded(model.info, {6, 11}, 1);
  padded.ids().masked_fill_(padded.mask().eq(0), 1);  // its padding id: positions start behind it
  auto other = padded;
  other.inputs = copy_of(padded.inputs);
  other.ids().masked_fill_(other.mask().eq(0), 5);  // not its padding id: positions count it
  ASSERT_GT(real_difference(run_plain(model.plain, padded.inputs), run_plain(model.plain, other.inputs), padded), 1e-2);
  for (int turn = 0; turn < 2; ++turn) {
    for (const auto* request : {&padded, &other}) {
      EXPECT_TRUE(
          close_on_real(cache.forward(request->inputs), run_plain(model.plain, request->inputs), *request, 1e-4))
          << cache.last_report().to_string();
    }
  }
}

TEST(CacheOfPositions, IdsBehindTheLastRealToken) {
  // As classifiers do that look for the last id that is not padding, whatever the mask says.
  Script script;
  script.forward = Script::with(script.forward, "return torch.tanh(x)",
                                "return x[torch.arange(x.size(0)), torch.clamp(torch.sum(input_ids != 0, 1) - 1, 0)]");
  Module plain = make_module(script);
  LayerCache<Module> cache(make_module(script));
  const auto padded = right_padded(script_info(script), {6, 11}, 1);
  auto other = padded;
  other.inputs = copy_of(padded.inputs);
  other.ids()[0][8].fill_(5);
  ASSERT_FALSE(same_bits(run_plain(plain, padded.inputs), run_plain(plain, other.inputs)));
  for (int turn = 0; turn < 2; ++turn) {
    // The row that ends in padding is compared only where the plain model looks at a real token.
    EXPECT_TRUE(close_on_real(cache.forward(padded.inputs), run_plain(plain, padded.inputs), padded, 1e-4));
    const auto got = cache.forward(other.inputs);
    EXPECT_TRUE(close_on_real(got, run_plain(plain, other.inputs), other, 1e-4)) << cache.last_report().to_string();
  }
}

// --- capacity ---------------------------------------------------------------------------------------

class CacheOfNothing : public Cache {
 protected:
  CacheOfNothing() : Cache("tiny-scripted", {.capacity_bytes = 0}) {}
};

TEST_F(CacheOfNothing, KeepsNothing) {
  const auto request = right({9, 4}, 1);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(close_on_real(lossless(request.inputs), plain(request.inputs), request, 1e-4));
    EXPECT_THAT(sources(), ElementsAre(kNew, kNew));
  }
  EXPECT_EQ(cache_.stats().entries, 0U);
  EXPECT_EQ(cache_.stats().peak_bytes, 0U);
}

class CacheOfOneKilobyte : public Cache {
 protected:
  CacheOfOneKilobyte() : Cache("tiny-scripted", {.capacity_bytes = 1024}) {}
};

TEST_F(CacheOfOneKilobyte, EntriesThatAreTooLargeAreNotKept) {
  const auto request = right({9, 9}, 1);  // 9 tokens of 64 floats are 2304 bytes
  const auto want = plain(request.inputs);
  for (int turn = 0; turn < 2; ++turn) EXPECT_TRUE(same_bits(lossless(request.inputs), want));
  const auto stats = cache_.stats();
  EXPECT_EQ(stats.entries, 0U);
  EXPECT_EQ(stats.rejected, 4U);
  EXPECT_EQ(stats.evictions, 0U);
  EXPECT_LE(stats.peak_bytes, 1024U);
}

TEST_F(Cache, BytesAreThoseOfTheTensorsAndLittleMore) {
  const auto request = right({40, 40, 40, 40}, 1);
  lossless(request.inputs);
  const std::size_t tensors = 4 * 40 * 64 * sizeof(float);
  const std::size_t keys = 4 * 40 * sizeof(std::int64_t);
  EXPECT_GE(cache_.stats().bytes, tensors + keys);
  EXPECT_LE(cache_.stats().bytes, tensors + 2 * keys + 4 * 1500);
}

class CacheUnderPressure : public Cache {
 protected:
  static constexpr std::size_t kCapacity = 24 << 10;
  CacheUnderPressure() : Cache("tiny-scripted", {.capacity_bytes = kCapacity}) {}
};

TEST_F(CacheUnderPressure, RandomRequests) {
  std::mt19937 random(11);
  const auto up_to = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n)(random); };
  std::vector<Request> pool;
  for (std::uint64_t i = 0; i < 14; ++i) pool.push_back(right({static_cast<std::int64_t>(1 + up_to(23))}, 20 + i));
  std::uint64_t sequences = 0;
  for (int round = 0; round < 150; ++round) {
    std::vector<Request> rows;
    Request whole;
    for (std::size_t n = 1 + up_to(3); n > 0; --n) {
      rows.push_back(pool[up_to(pool.size() - 1)]);
      whole.spans.push_back(rows.back().spans[0]);
      whole.padded_length = std::max(whole.padded_length, rows.back().padded_length);
    }
    whole.padded_length += static_cast<std::int64_t>(up_to(2));
    whole.inputs = batch_of(rows, whole.padded_length);
    const auto fidelity = up_to(1) == 0 ? Fidelity::kLossless : Fidelity::kIdentical;
    const auto got = cache_.forward(whole.inputs, {.fidelity = fidelity, .tenant = std::string(up_to(1), 't')});
    ASSERT_TRUE(close_on_real(got, plain(whole.inputs), whole, 1e-4)) << "round " << round;
    sequences += rows.size();
    const auto stats = cache_.stats();
    ASSERT_LE(stats.bytes, kCapacity);
    ASSERT_LE(stats.peak_bytes, kCapacity);
    ASSERT_EQ(stats.sequences, sequences);
    ASSERT_GE(stats.bytes, stats.entries * 64 * sizeof(float));
    if (round % 50 == 49) {
      cache_.clear();
      ASSERT_EQ(cache_.stats().bytes, 0U);
    }
  }
  EXPECT_GT(cache_.stats().evictions, 20U);
  EXPECT_GT(cache_.stats().identical_hits, 20U);
}

}  // namespace
}  // namespace llmcache::test
