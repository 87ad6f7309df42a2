// Fingerprints: options, centring, SimHash, PCA with its file, shingles.
#include "llmcache/fingerprint/fingerprint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <numbers>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "llmcache/error.h"
#include "llmcache/fingerprint/jaccard.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Floats = std::vector<float>;
using Ids = std::vector<std::int64_t>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr FingerprintKind kAllKinds[] = {FingerprintKind::kRaw,        FingerprintKind::kPca,
                                         FingerprintKind::kSimHash64,  FingerprintKind::kSimHash128,
                                         FingerprintKind::kSimHash256, FingerprintKind::kJaccard};

template <class Call>
void expect_refusal(ErrorCode code, const std::string& part, Call call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected one with '" << part << "'";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

Floats random_floats(std::mt19937_64& engine, std::size_t count, float mean = 0) {
  std::normal_distribution<float> normal(mean, 1);
  Floats values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

double cosine(const Floats& a, const Floats& b) {
  double ab = 0;
  double aa = 0;
  double bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * double{b[i]};
    aa += double{a[i]} * double{a[i]};
    bb += double{b[i]} * double{b[i]};
  }
  return ab / std::sqrt(aa * bb);
}

class FingerprintTest : public ::testing::Test {
 protected:
  std::mt19937_64 engine_{20251216};
};

TEST_F(FingerprintTest, NamesRoundTrip) {
  std::set<std::string> names;
  for (const auto kind : kAllKinds) {
    EXPECT_EQ(fingerprint_kind_from_string(to_string(kind)), kind);
    names.insert(to_string(kind));
  }
  EXPECT_THAT(names, ElementsAre("jaccard", "pca", "raw", "simhash128", "simhash256", "simhash64"));
  for (const auto centring : {Centring::kOff, Centring::kRunning, Centring::kFitted}) {
    EXPECT_EQ(centring_from_string(to_string(centring)), centring);
  }
  expect_refusal(ErrorCode::kInvalidOptions, "'simhash'", [] { fingerprint_kind_from_string("simhash"); });
  expect_refusal(ErrorCode::kInvalidOptions, "'on'", [] { centring_from_string("on"); });
}

TEST_F(FingerprintTest, OptionsNameTheFieldAtFault) {
  const auto refused = [](const FingerprintOptions& options, const std::string& field) {
    expect_refusal(ErrorCode::kInvalidOptions, "FingerprintOptions." + field, [&] { options.validate(); });
    expect_refusal(ErrorCode::kInvalidOptions, "FingerprintOptions." + field, [&] { Fingerprinter(options, 4); });
  };
  EXPECT_NO_THROW(FingerprintOptions{}.validate());
  refused({.kind = static_cast<FingerprintKind>(6)}, "kind");
  refused({.kind = static_cast<FingerprintKind>(-1)}, "kind");
  refused({.centring = static_cast<Centring>(3)}, "centring");
  refused({.shingle = 0}, "shingle");
  refused({.shingle = 1025}, "shingle");
  refused({.kind = FingerprintKind::kPca}, "pca");
  refused({.centring = Centring::kFitted}, "mean");
  refused({.centring = Centring::kFitted, .mean = {0, kNan, 0, 0}}, "mean[1]");
  const Floats rows = random_floats(engine_, 60);
  const auto pca = std::make_shared<const PcaModel>(PcaModel::fit(rows, 3, 2));
  expect_refusal(ErrorCode::kInvalidOptions, "FingerprintOptions.pca",
                 [&] { Fingerprinter({.kind = FingerprintKind::kPca, .pca = pca}, 4); });
  expect_refusal(ErrorCode::kInvalidOptions, "FingerprintOptions.mean", [&] {
    Fingerprinter({.centring = Centring::kFitted, .mean = {1, 2, 3}}, 4);
  });
  expect_refusal(ErrorCode::kInvalidOptions, "dims", [] { Fingerprinter({}, 0); });
  EXPECT_NO_THROW(Fingerprinter({.kind = FingerprintKind::kJaccard}, 0));
}

TEST_F(FingerprintTest, NothingIsMadeOfStatesWithoutMeaning) {
  const Floats rows = random_floats(engine_, 400);
  const auto pca = std::make_shared<const PcaModel>(PcaModel::fit(rows, 8, 4));
  for (const auto kind : kAllKinds) {
    if (kind == FingerprintKind::kJaccard) continue;
    SCOPED_TRACE(to_string(kind));
    Fingerprinter maker({.kind = kind, .pca = pca}, 8);
    EXPECT_TRUE(maker.needs_state());
    EXPECT_TRUE(maker.make(Floats(8, 1.0F), {}).has_value());
    EXPECT_FALSE(maker.make(Floats(8, 0.0F), {}).has_value());
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      Floats state(8, 1.0F);
      state[7] = bad;
      EXPECT_FALSE(maker.make(state, {}).has_value()) << bad;
      EXPECT_FALSE(maker.observe(state));
    }
    EXPECT_TRUE(maker.make(Floats(8, 1e37F), {}).has_value()) << "squares that overflow float";
    EXPECT_TRUE(maker.make(Floats(8, 1e-30F), {}).has_value() || kind == FingerprintKind::kPca);
    expect_refusal(ErrorCode::kInvalidInput, "7 values", [&] { (void)maker.make(Floats(7, 1.0F), {}); });
  }
  Fingerprinter maker({.kind = FingerprintKind::kJaccard}, 0);
  EXPECT_FALSE(maker.needs_state());
  EXPECT_FALSE(maker.make({}, {}).has_value());
  EXPECT_TRUE(maker.make({}, Ids{5}).has_value());
}

TEST_F(FingerprintTest, RawIsTheStateAtUnitLength) {
  const Fingerprinter maker({.kind = FingerprintKind::kRaw, .centring = Centring::kOff}, 2);
  const auto made = maker.make(Floats{3, -4}, {});
  ASSERT_TRUE(made);
  EXPECT_THAT(made->vector, ElementsAre(0.6F, -0.8F));
  EXPECT_TRUE(made->bits.empty());
  EXPECT_TRUE(made->shingles.empty());
}

TEST_F(FingerprintTest, SimilarityOfRawIsTheCosine) {
  for (const std::size_t dims : {1, 3, 31, 32, 33, 384, 769}) {
    const Fingerprinter maker({.kind = FingerprintKind::kRaw, .centring = Centring::kOff},
                              static_cast<std::int64_t>(dims));
    const Floats a = random_floats(engine_, dims);
    const Floats b = random_floats(engine_, dims);
    const double value = similarity(FingerprintKind::kRaw, *maker.make(a, {}), *maker.make(b, {}));
    EXPECT_NEAR(value, cosine(a, b), 2e-6) << dims;
    const double self = similarity(FingerprintKind::kRaw, *maker.make(a, {}), *maker.make(a, {}));
    EXPECT_NEAR(self, 1, 1e-6);
    EXPECT_LE(self, 1);
  }
}

TEST_F(FingerprintTest, FingerprintsOfOtherKindsAreNotCompared) {
  const Fingerprint vector{.vector = {1}};
  const Fingerprint bits{.bits = {1}};
  const Fingerprint wide{.bits = {1, 2}};
  expect_refusal(ErrorCode::kInvalidInput, "'raw'", [&] { (void)similarity(FingerprintKind::kRaw, vector, bits); });
  expect_refusal(ErrorCode::kInvalidInput, "'jaccard'",
                 [&] { (void)similarity(FingerprintKind::kJaccard, bits, bits); });
  expect_refusal(ErrorCode::kInvalidInput, "'simhash64'",
                 [&] { (void)similarity(FingerprintKind::kSimHash64, bits, wide); });
}

TEST_F(FingerprintTest, CentreChangesAtPowersOfTwoAndFreezes) {
  Fingerprinter maker({.kind = FingerprintKind::kRaw}, 3);
  std::vector<std::uint64_t> changes;
  for (std::uint64_t count = 1; count <= 10000; ++count) {
    if (maker.observe(random_floats(engine_, 3, 5))) changes.push_back(count);
    EXPECT_EQ(maker.generation(), changes.size());
  }
  EXPECT_THAT(changes, ElementsAre(16, 32, 64, 128, 256, 512, 1024, 2048, 4096));
  expect_refusal(ErrorCode::kInvalidInput, "2 values", [&] { maker.observe(Floats(2)); });
}

TEST_F(FingerprintTest, ForgettingStartsTheCentreAgain) {
  RunningCentre centre(2);
  const std::vector<float> early = {1, 0};
  const std::vector<float> late = {0, 3};
  centre.forget();
  EXPECT_EQ(centre.generation(), 0U) << "there was none";
  for (int i = 0; i < 40; ++i) centre.observe(early);
  EXPECT_EQ(centre.generation(), 2U);
  centre.forget();
  EXPECT_EQ(centre.centre(), nullptr);
  EXPECT_EQ(centre.generation(), 3U);
  EXPECT_EQ(centre.observations(), 0U);
  for (int i = 0; i < 15; ++i) EXPECT_FALSE(centre.observe(late));
  EXPECT_TRUE(centre.observe(late));
  EXPECT_EQ(*centre.centre(), late);
  EXPECT_EQ(centre.generation(), 4U);

  FingerprintOptions options;
  options.kind = FingerprintKind::kRaw;
  Fingerprinter running(options, 2);
  for (int i = 0; i < 16; ++i) running.observe(early);
  EXPECT_FALSE(running.make(early, {}).has_value()) << "it is the centre";
  running.forget();
  EXPECT_TRUE(running.make(early, {}).has_value());
  options.centring = Centring::kOff;
  Fingerprinter none(options, 2);
  none.forget();
  EXPECT_EQ(none.generation(), 0U);
}

TEST_F(FingerprintTest, CentreIsTheMeanOfUsableStates) {
  RunningCentre centre(2);
  EXPECT_EQ(centre.centre(), nullptr);
  for (int i = 0; i < 16; ++i) {
    EXPECT_FALSE(centre.observe(Floats{kNan, 1}));
    EXPECT_FALSE(centre.observe(Floats{0, 0}));
    EXPECT_EQ(centre.observe(Floats{static_cast<float>(i), 1}), i == 15);
  }
  EXPECT_THAT(*centre.centre(), ElementsAre(7.5F, 1.0F));
  EXPECT_EQ(centre.observations(), 16U);
  EXPECT_EQ(centre.generation(), 1U);
  expect_refusal(ErrorCode::kInvalidOptions, "dims is 0", [] { RunningCentre(0); });
}

TEST_F(FingerprintTest, RunningCentreTakesTheConeOff) {
  Fingerprinter maker({.kind = FingerprintKind::kRaw}, 64);
  const Floats a = random_floats(engine_, 64, 4);
  const Floats b = random_floats(engine_, 64, 4);
  const auto before_a = maker.make(a, {});
  EXPECT_GT(similarity(FingerprintKind::kRaw, *before_a, *maker.make(b, {})), 0.9);
  EXPECT_EQ(before_a->generation, 0U);
  for (int i = 0; i < 4096; ++i) maker.observe(random_floats(engine_, 64, 4));
  const auto after_a = maker.make(a, {});
  EXPECT_LT(std::abs(similarity(FingerprintKind::kRaw, *after_a, *maker.make(b, {}))), 0.5);
  EXPECT_EQ(after_a->generation, 9U);
}

TEST_F(FingerprintTest, AStateThatEqualsTheCentreHasNoFingerprint) {
  Fingerprinter running({.kind = FingerprintKind::kRaw}, 2);
  for (int i = 0; i < 16; ++i) running.observe(Floats{1, 2});
  EXPECT_FALSE(running.make(Floats{1, 2}, {}));
  EXPECT_FALSE(running.make(Floats{1, std::nextafter(2.0F, 3.0F)}, {})) << "a difference of one rounding";
  EXPECT_TRUE(running.make(Floats{1, 2.1F}, {}));
  const Fingerprinter fitted({.centring = Centring::kFitted, .mean = {1, 2}}, 2);
  EXPECT_FALSE(fitted.make(Floats{1, 2}, {}));
}

TEST_F(FingerprintTest, FittedCentreIsTheGivenMeanOrThatOfThePca) {
  Fingerprinter maker({.kind = FingerprintKind::kRaw, .centring = Centring::kFitted, .mean = {1, 1}}, 2);
  EXPECT_THAT(maker.make(Floats{4, -3}, {})->vector, ElementsAre(0.6F, -0.8F));
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(maker.observe(Floats{9, 9}));
  EXPECT_EQ(maker.generation(), 0U);
  const auto pca = std::make_shared<const PcaModel>(PcaModel::fit(Floats{0, 0, 2, 2, 0, 2, 2, 0}, 2, 1));
  const Fingerprinter other({.kind = FingerprintKind::kRaw, .centring = Centring::kFitted, .pca = pca}, 2);
  EXPECT_THAT(other.make(Floats{4, -3}, {})->vector, ElementsAre(0.6F, -0.8F));
}

TEST_F(FingerprintTest, SimHashEstimatesTheAngle) {
  const SimHash hash(256, 48, 7);
  for (const double angle : {0.0, 0.2, 0.5, 1.0, 1.5, 2.5}) {
    double sum = 0;
    constexpr int kPairs = 200;
    for (int i = 0; i < kPairs; ++i) {
      // b is a turned by `angle` towards a random orthogonal direction.
      Floats a = random_floats(engine_, 48);
      Floats b = random_floats(engine_, 48);
      const double length = std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0));
      const double along = std::inner_product(a.begin(), a.end(), b.begin(), 0.0) / (length * length);
      for (std::size_t d = 0; d < a.size(); ++d) b[d] -= static_cast<float>(along) * a[d];
      const double across = std::sqrt(std::inner_product(b.begin(), b.end(), b.begin(), 0.0));
      for (std::size_t d = 0; d < a.size(); ++d) {
        b[d] = static_cast<float>(std::cos(angle) * double{a[d]} / length + std::sin(angle) * double{b[d]} / across);
      }
      sum += hamming(hash(a), hash(b));
    }
    EXPECT_NEAR(sum / kPairs / 256, angle / std::numbers::pi, 0.01) << angle;
  }
}

TEST_F(FingerprintTest, SimHashFollowsFromItsSeedAlone) {
  Floats state(16);
  for (std::size_t i = 0; i < state.size(); ++i) state[i] = static_cast<float>(i) - 7.25F;
  const auto of = [&](int bits, std::uint64_t seed) { return SimHash(bits, 16, seed)(state); };
  EXPECT_EQ(of(128, 1), of(128, 1));
  EXPECT_NE(of(128, 1), of(128, 2));
  EXPECT_EQ(of(256, 1)[0], of(64, 1)[0]) << "hyperplane i is the same for every number of bits";
  EXPECT_EQ(of(256, 1)[1], of(128, 1)[1]);
  EXPECT_THAT(of(128, 0), ElementsAre(0xa6d1bf2ee0e7aea2U, 0x5d4378c020976f3bU))
      << "the hyperplanes of seed 0 have changed";
  expect_refusal(ErrorCode::kInvalidOptions, "bits is 100", [] { SimHash(100, 16, 0); });
  expect_refusal(ErrorCode::kInvalidOptions, "dims is 0", [] { SimHash(64, 0, 0); });
  expect_refusal(ErrorCode::kInvalidInput, "15 values", [] { (void)SimHash(64, 16, 0)(Floats(15)); });
}

TEST_F(FingerprintTest, SimHashDoesNotDependOnScale) {
  const Fingerprinter maker({.kind = FingerprintKind::kSimHash256, .centring = Centring::kOff}, 32);
  Floats state = random_floats(engine_, 32);
  const auto once = maker.make(state, {});
  for (float& value : state) value *= 1024;
  EXPECT_EQ(once->bits, maker.make(state, {})->bits);
}

TEST_F(FingerprintTest, RadiusIsTheLargestDistanceOfThatSimilarity) {
  for (const int bits : {64, 128, 256}) {
    for (double tau = -1; tau <= 1; tau += 1.0 / 64) {
      const int radius = simhash_radius(tau, bits);
      for (int distance = 0; distance <= bits; ++distance) {
        EXPECT_EQ(simhash_similarity(distance, bits) >= tau, distance <= radius) << bits << " " << tau;
      }
    }
    EXPECT_EQ(simhash_radius(-1, bits), bits);
    EXPECT_EQ(simhash_radius(1, bits), 0);
    EXPECT_EQ(simhash_radius(1.001, bits), -1);
    EXPECT_EQ(simhash_radius(std::nan(""), bits), -1);
  }
  EXPECT_EQ(simhash_radius(0.85, 128), 22);
}

TEST_F(FingerprintTest, ShinglesAreRunsOfTokens) {
  const auto hashes = [](const Ids& ids, std::int64_t shingle = 3) { return shingle_hashes(ids, shingle, 0); };
  EXPECT_TRUE(hashes({}).empty());
  EXPECT_EQ(hashes({1}).size(), 1U);
  EXPECT_EQ(hashes({1, 2}).size(), 1U) << "shorter than a shingle: one run";
  EXPECT_EQ(hashes({1, 2, 3}).size(), 1U);
  EXPECT_EQ(hashes({1, 2, 3, 4}).size(), 2U);
  EXPECT_EQ(hashes({1, 2, 3, 1, 2, 3, 1}).size(), 3U) << "each run once";
  EXPECT_EQ(hashes({7, 7, 7, 7, 7}).size(), 1U);
  EXPECT_NE(hashes({1, 2}), hashes({2, 1}));
  EXPECT_NE(hashes({1, 2}), hashes({1, 2, 0}));
  EXPECT_NE(hashes({1, 2, 3}), shingle_hashes(Ids{1, 2, 3}, 3, 1));
  const auto many = hashes({9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, 1);
  EXPECT_EQ(many.size(), 10U);
  EXPECT_TRUE(std::is_sorted(many.begin(), many.end()));
  expect_refusal(ErrorCode::kInvalidOptions, "shingle is 0", [&] { hashes({1}, 0); });
}

TEST_F(FingerprintTest, JaccardIsSharedOverAll) {
  const Ids a{1, 2, 3, 4, 5, 6};
  const Ids b{1, 2, 3, 4, 9, 9};
  const Fingerprinter maker({.kind = FingerprintKind::kJaccard}, 0);
  const auto fa = *maker.make({}, a);
  const auto fb = *maker.make({}, b);
  EXPECT_DOUBLE_EQ(similarity(FingerprintKind::kJaccard, fa, fb), 2.0 / 6.0);
  EXPECT_DOUBLE_EQ(similarity(FingerprintKind::kJaccard, fa, fa), 1.0);
  EXPECT_DOUBLE_EQ(jaccard(fa.shingles, {}), 0.0);
  std::vector<std::uint64_t> x;
  std::vector<std::uint64_t> y;
  for (int i = 0; i < 500; ++i) {
    if (engine_() % 2) x.push_back(static_cast<std::uint64_t>(i));
    if (engine_() % 3) y.push_back(static_cast<std::uint64_t>(i));
  }
  std::vector<std::uint64_t> both;
  std::vector<std::uint64_t> any;
  std::set_intersection(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(both));
  std::set_union(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(any));
  EXPECT_DOUBLE_EQ(jaccard(x, y), static_cast<double>(both.size()) / static_cast<double>(any.size()));
}

TEST_F(FingerprintTest, ManyThreadsObserveAndMake) {
  Fingerprinter maker({.kind = FingerprintKind::kSimHash128}, 32);
  std::atomic<int> changes{0};
  std::atomic<int> made{0};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 engine(t);
      for (int i = 0; i < 600; ++i) {
        const Floats state = random_floats(engine, 32, 3);
        changes += maker.observe(state) ? 1 : 0;
        const auto fingerprint = maker.make(state, {});
        made += fingerprint && fingerprint->generation <= maker.generation() ? 1 : 0;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(changes, 9);
  EXPECT_EQ(maker.generation(), 9U);
  EXPECT_EQ(made, 4800);
}

class FingerprintPcaTest : public FingerprintTest {
 protected:
  FingerprintPcaTest()
      : folder_(std::filesystem::temp_directory_path() / ("llmcache-pca-" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(folder_);
  }
  ~FingerprintPcaTest() override { std::filesystem::remove_all(folder_); }

  /// Rows that vary with standard deviations 8, 4, 2, ... along the rows of a rotation, around 10.
  Floats sample(std::size_t rows, std::size_t dims) {
    Floats result;
    for (std::size_t i = 0; i < rows; ++i) {
      Floats row = random_floats(engine_, dims);
      for (std::size_t d = 0; d < dims; ++d) row[d] *= std::exp2(3 - static_cast<float>(d));
      // One plane rotation for each pair of neighbours: orthogonal.
      for (std::size_t d = 0; d + 1 < dims; ++d) {
        const float x = row[d];
        row[d] = 0.8F * x - 0.6F * row[d + 1];
        row[d + 1] = 0.6F * x + 0.8F * row[d + 1];
      }
      for (float& value : row) value += 10;
      result.insert(result.end(), row.begin(), row.end());
    }
    return result;
  }
  std::string read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void write(const std::filesystem::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
  }

  std::filesystem::path folder_;
};

TEST_F(FingerprintPcaTest, DirectionsAreOrthonormalAndSortedByVariance) {
  for (const std::size_t rows : {500, 7}) {  // covariance, Gram
    SCOPED_TRACE(rows);
    const Floats values = sample(rows, 12);
    const PcaModel model = PcaModel::fit(values, 12, 4);
    const auto directions = model.directions();
    std::vector<double> variances;
    for (std::size_t i = 0; i < 4; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        double product = 0;
        for (std::size_t d = 0; d < 12; ++d) product += double{directions[i * 12 + d]} * double{directions[j * 12 + d]};
        EXPECT_NEAR(product, i == j ? 1 : 0, 1e-5);
      }
    }
    double total = 0;
    std::vector<double> along(4);
    for (std::size_t r = 0; r < rows; ++r) {
      const std::span<const float> row(values.data() + r * 12, 12);
      const Floats projected = model.project(row);
      for (std::size_t i = 0; i < 4; ++i) along[i] += double{projected[i]} * double{projected[i]};
      for (std::size_t d = 0; d < 12; ++d) total += std::pow(double{row[d]} - double{model.mean()[d]}, 2);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(along[i] / total, double{model.explained()[i]}, 1e-3);
      if (i > 0) {
        EXPECT_LE(model.explained()[i], model.explained()[i - 1]);
      }
    }
  }
}

TEST_F(FingerprintPcaTest, CovarianceAndGramAgree) {
  const Floats values = sample(12, 12);  // covariance
  Floats padded;                         // the same with a thirteenth value that never varies: Gram
  for (std::size_t row = 0; row < 12; ++row) {
    padded.insert(padded.end(), values.begin() + static_cast<std::ptrdiff_t>(row * 12),
                  values.begin() + static_cast<std::ptrdiff_t>(row * 12 + 12));
    padded.push_back(1);
  }
  const PcaModel a = PcaModel::fit(values, 12, 3);
  const PcaModel b = PcaModel::fit(padded, 13, 3);
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t d = 0; d < 12; ++d) EXPECT_NEAR(a.directions()[i * 12 + d], b.directions()[i * 13 + d], 1e-4);
    EXPECT_NEAR(b.directions()[i * 13 + 12], 0, 1e-6);
  }
}

TEST_F(FingerprintPcaTest, RefusesSamplesThatCannotBeFitted) {
  const Floats values = sample(10, 4);
  expect_refusal(ErrorCode::kInvalidInput, "whole rows", [&] { PcaModel::fit(values, 3, 1); });
  expect_refusal(ErrorCode::kInvalidInput, "dims is 0", [&] { PcaModel::fit(values, 0, 1); });
  expect_refusal(ErrorCode::kInvalidInput, "at least 2", [&] { PcaModel::fit(values, 40, 1); });
  expect_refusal(ErrorCode::kInvalidOptions, "components is 0", [&] { PcaModel::fit(values, 4, 0); });
  expect_refusal(ErrorCode::kInvalidOptions, "components is 5", [&] { PcaModel::fit(values, 4, 5); });
  expect_refusal(ErrorCode::kInvalidInput, "0 directions only", [] { PcaModel::fit(Floats(40, 1.0F), 4, 1); });
  Floats line(40);
  for (std::size_t i = 0; i < 40; ++i) line[i] = static_cast<float>(i / 4);
  expect_refusal(ErrorCode::kInvalidInput, "1 directions only", [&] { PcaModel::fit(line, 4, 2); });
  Floats bad = values;
  bad[9] = kNan;
  expect_refusal(ErrorCode::kInvalidInput, "row 2", [&] { PcaModel::fit(bad, 4, 2); });
}

TEST_F(FingerprintPcaTest, FileRoundTrip) {
  const PcaModel model = PcaModel::fit(sample(50, 6), 6, 3);
  const auto path = folder_ / "model.pca";
  model.save(path, "sha256:abc");
  model.save(path, "sha256:abc");  // over an older one
  const PcaModel loaded = PcaModel::load(path, "sha256:abc", 6);
  const Floats state = random_floats(engine_, 6);
  EXPECT_EQ(loaded.project(state), model.project(state));
  EXPECT_TRUE(std::ranges::equal(loaded.mean(), model.mean()));
  EXPECT_TRUE(std::ranges::equal(loaded.directions(), model.directions()));
  EXPECT_TRUE(std::ranges::equal(loaded.explained(), model.explained()));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1) << "no temporary file is left";
  const Fingerprinter maker({.kind = FingerprintKind::kPca, .pca = std::make_shared<const PcaModel>(loaded)}, 6);
  EXPECT_EQ(maker.make(state, {})->vector.size(), 3U);
}

TEST_F(FingerprintPcaTest, RefusesFilesOfOtherModels) {
  const auto path = folder_ / "model.pca";
  PcaModel::fit(sample(50, 6), 6, 3).save(path, "model A");
  expect_refusal(ErrorCode::kInvalidInput, "fitted to the model 'model A', this one is 'model B'",
                 [&] { PcaModel::load(path, "model B"); });
  expect_refusal(ErrorCode::kInvalidInput, "states of 6 values", [&] { PcaModel::load(path, "model A", 8); });
  expect_refusal(ErrorCode::kInvalidInput, "at most 4096",
                 [&] { PcaModel::fit(sample(9, 2), 2, 1).save(path, std::string(4097, 'x')); });
  EXPECT_NO_THROW(PcaModel::load(path, "model A")) << "a failed save leaves the file";
}

TEST_F(FingerprintPcaTest, RefusesDamagedFiles) {
  const auto path = folder_ / "model.pca";
  PcaModel::fit(sample(50, 6), 6, 3).save(path, "A");
  const std::string bytes = read(path);
  const auto damaged = folder_ / "damaged.pca";
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    write(damaged, bytes.substr(0, size));
    EXPECT_THROW(PcaModel::load(damaged, "A"), Error) << size << " bytes";
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 0x40);
    write(damaged, changed);
    EXPECT_THROW(PcaModel::load(damaged, "A"), Error) << "byte " << i;
  }
  write(damaged, bytes + "x");
  expect_refusal(ErrorCode::kInvalidFile, "damaged", [&] { PcaModel::load(damaged, "A"); });
  write(damaged, "something else altogether");
  expect_refusal(ErrorCode::kInvalidFile, "no PCA file", [&] { PcaModel::load(damaged, "A"); });
  expect_refusal(ErrorCode::kInvalidFile, "cannot read", [&] { PcaModel::load(folder_ / "none", "A"); });
  expect_refusal(ErrorCode::kInvalidFile, "cannot", [&] { PcaModel::load(folder_, "A"); });
  expect_refusal(ErrorCode::kInvalidFile, "cannot make a file",
                 [&] { PcaModel::fit(sample(9, 2), 2, 1).save(folder_ / "none" / "x", "A"); });
}

}  // namespace
}  // namespace llmcache::test
