// The correction of reused states against the formula, written out number by number.
#include "execute/corrected_states.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <memory>
#include <random>

namespace llmcache {
namespace {

constexpr std::int32_t kLayers = 4;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kWidth = 3;
constexpr std::int64_t kHidden = 5;

/// One attention operator a layer with keys [1, heads, tokens, width] and values [1, tokens, heads, width].
class FakeModel final : public TokenLevelModel {
 public:
  std::int64_t attention_ops(std::int64_t) const override { return 1; }
  const std::vector<std::int64_t>& query_dims(std::int64_t, std::int64_t) const override { return dims_; }
  const std::vector<std::int64_t>& key_dims(std::int64_t, std::int64_t) const override { return dims_; }
  std::int64_t output_dim(std::int64_t, std::int64_t) const override { return 2; }
  bool partial() const override { return true; }
  bool self_contained() const override { return true; }
  bool head_tokenwise() const override { return true; }
  std::unique_ptr<TokenRun> start(const Activations&, const PackedLayout&) const override { return nullptr; }

 private:
  std::vector<std::int64_t> dims_{2, 1};
};

class FakeDonor final : public CachedStates {
 public:
  FakeDonor(std::int64_t tokens, std::vector<std::int32_t> kept) : tokens_(tokens) {
    for (std::int32_t l = 0; l < kLayers; ++l) {
      keys_[{l, 0}] = at::randn({tokens, 1, kHeads, kWidth});
      keys_[{l, 1}] = at::randn({tokens, 1, kHeads, kWidth});
    }
    for (const std::int32_t l : kept) hidden_[l] = at::randn({tokens, kHidden});
  }
  std::int64_t tokens() const override { return tokens_; }
  at::Tensor keys(std::int32_t layer, std::int64_t, std::size_t input) const override {
    return keys_.at({layer, static_cast<int>(input)});
  }
  at::Tensor hidden(std::int32_t layer) const override {
    const auto it = hidden_.find(layer);
    return it == hidden_.end() ? at::Tensor() : it->second;
  }

 private:
  std::int64_t tokens_;
  std::map<std::pair<std::int32_t, int>, at::Tensor> keys_;
  std::map<std::int32_t, at::Tensor> hidden_;
};

double value(const at::Tensor& rows, std::int64_t row, std::int64_t column) {
  return rows[row].flatten()[column].item<double>();
}

/// All tokens' rows by the formula: fresh where active, else cached + a * mu. `fresh` and `cached`: row by row.
std::vector<std::vector<double>> expected(const ReusedSequence& sequence, const at::Tensor& fresh,
                                          const at::Tensor& cached, double* shrinkage = nullptr) {
  const auto& active = sequence.set.active;
  const auto columns = cached[0].numel();
  const auto row_of = [&](std::int64_t token) {
    return static_cast<std::int64_t>(std::lower_bound(active.begin(), active.end(), token) - active.begin());
  };
  const auto samples = static_cast<double>(sequence.set.samples.size());
  std::vector<double> mu(static_cast<std::size_t>(columns), 0);
  double trace = 0;
  double length = 0;
  for (std::int64_t c = 0; c < columns && samples >= 2; ++c) {
    double sum = 0;
    std::vector<double> off;
    for (const auto t : sequence.set.samples) {
      off.push_back(value(fresh, row_of(t), c) -
                    value(cached, sequence.donor_positions[static_cast<std::size_t>(t)], c));
      sum += off.back();
    }
    const double mean = sum / samples;
    mu[static_cast<std::size_t>(c)] = mean;
    length += mean * mean;
    for (const double d : off) trace += (d - mean) * (d - mean) / (samples - 1);
  }
  const double a = samples >= 2 ? std::max(0.0, 1 - trace / samples / length) : 0;
  if (shrinkage != nullptr) *shrinkage = a;
  std::vector<std::vector<double>> rows;
  for (std::size_t t = 0; t < sequence.donor_positions.size(); ++t) {
    const auto token = static_cast<std::int64_t>(t);
    auto& row = rows.emplace_back();
    const bool runs = std::binary_search(active.begin(), active.end(), token);
    for (std::int64_t c = 0; c < columns; ++c) {
      row.push_back(runs ? value(fresh, row_of(token), c)
                         : value(cached, sequence.donor_positions[t], c) + a * mu[static_cast<std::size_t>(c)]);
    }
  }
  return rows;
}

void compare(const at::Tensor& got, const std::vector<std::vector<double>>& want) {
  ASSERT_EQ(got.size(0), static_cast<std::int64_t>(want.size()));
  for (std::size_t t = 0; t < want.size(); ++t) {
    for (std::size_t c = 0; c < want[t].size(); ++c) {
      ASSERT_NEAR(value(got, static_cast<std::int64_t>(t), static_cast<std::int64_t>(c)), want[t][c], 1e-5)
          << "token " << t << ", number " << c;
    }
  }
}

class CorrectedStatesTest : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(1); }

  /// Twelve tokens; donor of fifteen: 0-4 stand at 0-4, 5 and 6 are new, 7-11 stand at 9-13.
  ReusedSequence sequence(std::vector<std::int64_t> samples, std::int32_t widened = kLayers) {
    ReusedSequence made;
    made.donor = donor_;
    made.donor_positions = {0, 1, 2, 3, 4, -1, -1, 9, 10, 11, 12, 13};
    made.set.active = {0, 2, 4, 5, 6, 7, 9, 10, 11};
    made.set.samples = std::move(samples);
    made.widened = widened;
    return made;
  }
  CorrectedStates states(CorrectedStates::Monitor monitor = {}) {
    return {model_, kLayers, sequences_, at::kCPU, std::move(monitor)};
  }
  /// Rows of the nine active tokens, off from those cached by about `shift`.
  at::Tensor fresh(const at::Tensor& cached, double shift) {
    auto sizes = cached.sizes().vec();
    sizes[0] = 9;
    auto rows = at::randn(sizes);
    for (std::int64_t r = 0; r < 9; ++r) {
      const auto position = sequences_[0].donor_positions[static_cast<std::size_t>(sequences_[0].set.active[r])];
      if (position >= 0) rows[r].copy_(cached[position] + shift + 0.1 * at::randn(cached[0].sizes()));
    }
    return rows;
  }

  FakeModel model_;
  std::shared_ptr<const FakeDonor> donor_ = std::make_shared<FakeDonor>(15, std::vector<std::int32_t>{0, 2, kLayers});
  std::vector<ReusedSequence> sequences_;
};

TEST_F(CorrectedStatesTest, FollowTheFormulaAtEverySite) {
  for (const std::vector<std::int64_t>& samples : {std::vector<std::int64_t>{2, 9, 10}, {2, 9}, {2}, {}}) {
    for (const double shift : {0.0, 0.02, 0.3, 3.0}) {
      sequences_ = {sequence(samples)};
      auto states = this->states();
      for (std::int32_t l = 1; l < kLayers; ++l) {
        const auto keys = fresh(donor_->keys(l, 0, 0), shift);
        const auto values = fresh(donor_->keys(l, 0, 1), -shift);
        const auto segments = states.keys(0, l, 0, {keys.movedim(0, 2), values.movedim(0, 1)});
        ASSERT_EQ(segments.size(), 1u);
        EXPECT_EQ(segments[0].tokens, 12);
        double a = 0;
        double b = 0;
        compare(segments[0].keys[0].movedim(2, 0), expected(sequences_[0], keys, donor_->keys(l, 0, 0), &a));
        compare(segments[0].keys[1].movedim(1, 0), expected(sequences_[0], values, donor_->keys(l, 0, 1), &b));
        EXPECT_NEAR(states.shifts(0)[static_cast<std::size_t>(l)].shrinkage, (a + b) / 2, 1e-4);
        if (samples.size() > 1 && shift == 3.0) {
          EXPECT_GT(a, 0.9);
          EXPECT_GT(states.shifts(0)[static_cast<std::size_t>(l)].relative, 1);
        }
      }
      const auto last = fresh(donor_->hidden(kLayers), shift);
      states.finished(0, last.unsqueeze(0));
      const auto want = expected(sequences_[0], last, donor_->hidden(kLayers));
      compare(states.final_states(0, 0, 12)[0], want);
      compare(states.final_states(0, 3, 8)[0], {want.begin() + 3, want.begin() + 8});
    }
  }
}

TEST_F(CorrectedStatesTest, LeaveTheDonorAndLayerZeroAlone) {
  sequences_ = {sequence({2, 9, 10})};
  auto states = this->states();
  const auto before = donor_->keys(0, 0, 0).clone();
  const auto keys = fresh(before, 3);
  const auto got = states.keys(0, 0, 0, {keys.movedim(0, 2), keys.movedim(0, 1)})[0].keys[0].movedim(2, 0);
  EXPECT_TRUE(at::equal(got[1], before[1]));
  EXPECT_TRUE(at::equal(got[8], before[10]));
  EXPECT_TRUE(at::equal(got[5], keys[3]));
  EXPECT_TRUE(at::equal(donor_->keys(0, 0, 0), before));
}

TEST_F(CorrectedStatesTest, EmbedKnownTokensAsTheDonorDid) {
  sequences_ = {sequence({}), {}};
  auto states = this->states();
  const auto own = at::randn({1, 9, kHidden});
  auto rows = own.clone();
  states.embedded(0, rows);
  const std::int64_t positions[] = {0, 2, 4, -1, -1, 9, 11, 12, 13};
  for (std::int64_t r = 0; r < 9; ++r) {
    EXPECT_TRUE(at::equal(rows[0][r], positions[r] < 0 ? own[0][r] : donor_->hidden(0)[positions[r]])) << r;
  }
  rows = own.clone();
  states.embedded(1, rows);
  EXPECT_TRUE(at::equal(rows, own));
}

TEST_F(CorrectedStatesTest, SequencesWithoutADonorPassThrough) {
  sequences_ = {{}};
  auto states = this->states([](auto, auto, const auto&) { return LayerAction::kStop; });
  const auto keys = at::randn({1, kHeads, 7, kWidth});
  const auto segments = states.keys(0, 1, 0, {keys, keys.transpose(1, 2)});
  EXPECT_EQ(segments[0].tokens, 7);
  EXPECT_TRUE(at::equal(segments[0].keys[0], keys));
  EXPECT_EQ(states.before_layer(0, 1, at::randn({1, 7, kHidden})), LayerAction::kGoOn);
  EXPECT_FALSE(states.stopped(0));
  const auto last = at::randn({1, 7, kHidden});
  states.finished(0, last);
  EXPECT_TRUE(at::equal(states.final_states(0, 2, 5), last.narrow(1, 2, 3)));
}

TEST_F(CorrectedStatesTest, AllTokensEnterAPlannedLayerCorrected) {
  sequences_ = {sequence({2, 9, 10}, 2)};
  auto states = this->states();
  const auto rows = fresh(donor_->hidden(2), 0.5);
  EXPECT_EQ(states.before_layer(0, 1, at::randn({1, 9, kHidden})), LayerAction::kGoOn);
  EXPECT_EQ(states.before_layer(0, 2, rows.unsqueeze(0)), LayerAction::kGoOn);
  const auto want = expected(sequences_[0], rows, donor_->hidden(2));
  for (const std::int64_t t : {1, 3, 8}) {
    const auto i = static_cast<std::ptrdiff_t>(t);
    compare(states.entering(0, 2, t, t + 1)[0], {want.begin() + i, want.begin() + i + 1});
  }
  // From there on everything is fresh.
  const auto keys = at::randn({1, kHeads, 12, kWidth});
  EXPECT_TRUE(at::equal(states.keys(0, 2, 0, {keys, keys.transpose(1, 2)})[0].keys[0], keys));
  const auto last = at::randn({1, 12, kHidden});
  states.finished(0, last);
  EXPECT_TRUE(at::equal(states.final_states(0, 0, 12), last));
}

TEST_F(CorrectedStatesTest, MonitorsStopAndWiden) {
  sequences_ = {sequence({2, 9, 10})};
  const auto rows = at::randn({1, 9, kHidden});
  std::vector<std::int32_t> asked;
  auto widening = states([&](std::size_t, std::int32_t l, const SampleShift& shift) {
    asked.push_back(l);
    EXPECT_EQ(shift.relative > 1, l == 2);
    return LayerAction::kComputeAll;
  });
  // The states that enter layer 1 are not kept.
  EXPECT_EQ(widening.before_layer(0, 1, rows), LayerAction::kGoOn);
  const auto keys = fresh(donor_->keys(1, 0, 0), 5);
  (void)widening.keys(0, 1, 0, {keys.movedim(0, 2), keys.movedim(0, 1)});
  EXPECT_EQ(widening.before_layer(0, 2, rows), LayerAction::kComputeAll);
  EXPECT_EQ(widening.before_layer(0, 3, rows), LayerAction::kGoOn);
  EXPECT_THAT(asked, ::testing::ElementsAre(1, 2));
  EXPECT_FALSE(widening.stopped(0));

  auto stopping = states([](auto, auto, const auto&) { return LayerAction::kStop; });
  EXPECT_EQ(stopping.before_layer(0, 1, rows), LayerAction::kStop);
  EXPECT_TRUE(stopping.stopped(0));

  // Planned where the donor has no states: it cannot go on.
  sequences_ = {sequence({2, 9, 10}, 3)};
  auto lacking = states();
  EXPECT_EQ(lacking.before_layer(0, 2, rows), LayerAction::kGoOn);
  EXPECT_EQ(lacking.before_layer(0, 3, rows), LayerAction::kStop);
}

TEST_F(CorrectedStatesTest, ReportWhatIsNotFinite) {
  sequences_ = {sequence({2, 9, 10})};
  auto states = this->states();
  auto keys = fresh(donor_->keys(1, 0, 0), 0.1);
  keys[1].fill_(std::nan(""));
  const auto got = states.keys(0, 1, 0, {keys.movedim(0, 2), keys.movedim(0, 1)});
  EXPECT_TRUE(std::isnan(states.shifts(0)[1].relative));
  EXPECT_TRUE(at::equal(got[0].keys[0].movedim(2, 0)[3], donor_->keys(1, 0, 0)[3])) << "nothing is added";
}

}  // namespace
}  // namespace llmcache
