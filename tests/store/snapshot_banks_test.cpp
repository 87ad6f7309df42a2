// What snapshots hold of sources, segments and the paper's mode: it is served as it was in the process that kept it,
// and whatever was changed in a file does no harm.
#include <filesystem>
#include <fstream>

#include "encoder_decoder_support.h"
#include "passages.h"
#include "reader_support.h"
#include "snapshot_support.h"
#include "store/snapshot_entries.h"
#include "temporary_folder.h"

namespace llmcache::test {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

const SnapshotPartReport& part_of(const SnapshotReport& report, const std::string& name) {
  for (const SnapshotPartReport& part : report.parts) {
    if (part.name == name) return part;
  }
  static const SnapshotPartReport none;
  ADD_FAILURE() << "there is no part '" << name << "' in " << report.summary();
  return none;
}

/// A bit of each byte changed, and the end cut off at each place, of those that `stride` leaves: nothing is taken.
void expect_nothing_of_damaged(LayerCache<Module>& cache, const fs::path& path, std::size_t stride) {
  const std::string sound = bytes_of(path);
  const auto expect_nothing = [&](const std::string& bytes) {
    write(path, bytes);
    const SnapshotReport report = cache.load(path);
    ASSERT_NE(report.refused, "");
    ASSERT_EQ(cache.stats().entries, 0U);
  };
  for (std::size_t at = 0; at < sound.size(); at += stride) {
    expect_nothing(flipped(sound, at, at));
    expect_nothing(sound.substr(0, at));
  }
  write(path, sound);
}

/// Numbers at their limits in the entries of one kind, with right checks. `check`: that what is served then has the
/// right form; false: it has not.
void expect_no_harm_of_forged(LayerCache<Module>& cache, const fs::path& path, FrameKind kind, std::size_t bytes,
                              const std::function<bool()>& check) {
  const std::string sound = bytes_of(path);
  int refused = 0;
  for (std::size_t at = 0; at < bytes; at += 7) {
    for (const std::uint64_t value : {std::uint64_t{0}, std::uint64_t{1} << 33, ~std::uint64_t{0}}) {
      write(path, sound);
      forge(path, kind, at, value);
      refused += cache.load(path).refused.empty() ? 0 : 1;
      ASSERT_TRUE(check()) << "byte " << at << ", " << value;
      cache.clear();
    }
  }
  EXPECT_GT(refused, 0);
  write(path, sound);
}

// --- sources ----------------------------------------------------------------------------------------------

class SourcesOf : public EncoderDecoder {
 protected:
  /// Rows of these sources with other targets than the last time.
  Request asking(unsigned target) const {
    std::vector<Row> all = rows({{9, 5}, {14, 5}, {4, 5}}, 1);
    std::mt19937 random(target);
    for (Row& row : all) row.target = random_ids(random, 5);
    return request_of(profile(), all);
  }
  const TemporaryFolder folder_;
};

TEST_P(SourcesOf, AreNotComputedAgain) {
  const fs::path file = folder_ / "cache.snapshot";
  auto first = cache_with({});
  first.forward(asking(1).inputs);
  const SnapshotReport saved = first.save(file);
  EXPECT_EQ(part_of(saved, "sources").entries, 3U);
  auto second = cache_with({});
  const SnapshotReport loaded = second.load(file);
  ASSERT_EQ(loaded.refused, "");
  EXPECT_EQ(part_of(loaded, "sources").entries, 3U) << loaded.summary();
  const Request other = asking(2);
  EXPECT_TRUE(close_on_real(second.forward(other.inputs), plain(other), other, tolerance()));
  EXPECT_EQ(reused_of_source(second), (std::vector<std::int64_t>{9, 14, 4}));
  EXPECT_EQ(second.last_report().fallback, "");
  EXPECT_EQ(second.stats().verification.mismatches, 0U);
  // Another tenant has none of them.
  EXPECT_TRUE(close_on_real(second.forward(other.inputs, {.tenant = "acme"}), plain(other), other, tolerance()));
  EXPECT_EQ(reused_of_source(second), (std::vector<std::int64_t>{0, 0, 0}));
  EXPECT_EQ(part_of(second.load(file), "sources").why, "the cache has them already");
}

INSTANTIATE_TEST_SUITE_P(Models, SourcesOf,
                         ::testing::Values("seq2seq-t5", "seq2seq-bart", "seq2seq-bart-bf16", "seq2seq-marian",
                                           "seq2seq-t5-eager-masked"),
                         test_name);

class Sources : public ::testing::Test {
 protected:
  Sources() : model_(subject("seq2seq-bart")), cache_(model_.cache.with_options({})) {
    auto first = model_.cache.with_options({});
    first.forward(request_.inputs);
    first.save(file_);
  }
  Subject& model_;
  const TemporaryFolder folder_;
  const fs::path file_ = folder_ / "cache.snapshot";
  const Request request_ = request_of(model_.cache.profile(), {{{20, 21, 22}, {23, 24}}});
  LayerCache<Module> cache_;
};

TEST_F(Sources, OfADamagedFileAreNotTaken) { expect_nothing_of_damaged(cache_, file_, 127); }

TEST_F(Sources, ThatAreForgedDoNoHarm) {
  const auto want = leaves(run_plain(model_.plain, request_.inputs))[0].sizes().vec();
  expect_no_harm_of_forged(cache_, file_, FrameKind::kSource, 160,
                           [&] { return leaves(cache_.forward(request_.inputs))[0].sizes() == at::IntArrayRef(want); });
}

TEST_F(Sources, ForWhichThereIsNoRoomAreLeft) {
  Options options;
  options.capacity_bytes = std::size_t{20} << 10;
  auto small = cache_.with_options(options);
  const SnapshotReport loaded = small.load(file_);
  EXPECT_EQ(loaded.refused, "");
  EXPECT_EQ(part_of(loaded, "sources").left, 1U);
  EXPECT_EQ(part_of(loaded, "sources").why, "there is no room for more");
  options.source_capacity_share = 0;
  auto none = cache_.with_options(options);
  EXPECT_EQ(part_of(none.load(file_), "sources").why, "this cache keeps nothing of the kind");
}

// --- segments ---------------------------------------------------------------------------------------------

TEST(Segments, AreHeldAsTheyWereUnderTheirCalibration) {
  const ModelInfo info = model_info("tiny-llama-sdpa");
  const LayerCache<Module> wrapped = cache_of(info.name, Options{.capacity_bytes = 0});
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kInt8}) {
    SCOPED_TRACE(to_string(format));
    const TemporaryFolder folder;
    const fs::path file = folder / "cache.snapshot";
    Options options = passage_budget();
    options.budget.format = format;
    PassagePrompts prompt(info);
    auto first = wrapped.with_options(options);
    const auto profile = first.calibrate(prompt.sample());
    ASSERT_TRUE(profile.reuse) << profile.to_string();
    for (int i = 0; i < 30; ++i) first.forward(prompt(), {.output = Output::kLastToken});
    const SnapshotReport saved = first.save(file);
    EXPECT_GT(part_of(saved, "segments").entries, 3U) << saved.summary();
    auto second = wrapped.with_options(options);
    const SnapshotReport loaded = second.load(file);
    ASSERT_EQ(loaded.refused, "");
    EXPECT_EQ(part_of(loaded, "segments").entries, part_of(saved, "segments").entries) << loaded.summary();
    EXPECT_EQ(part_of(loaded, "segments").tokens, part_of(saved, "segments").tokens);
    EXPECT_LE(second.stats().peak_bytes, options.capacity_bytes);
    if (format != BankFormat::kAsComputed) {
      second.save(folder / "again");
      EXPECT_EQ(fs::file_size(folder / "again"), fs::file_size(file));
    }
    int partial = 0;
    for (int i = 0; i < 10; ++i) {
      const Inputs next = prompt();
      const auto want = leaves(first.forward(next, {.output = Output::kLastToken}))[0];
      const SequenceReport told = first.last_report().sequences[0];
      const auto got = leaves(second.forward(next, {.output = Output::kLastToken}))[0];
      EXPECT_TRUE(at::allclose(got, want, 1e-5, 1e-5)) << i;
      EXPECT_EQ(second.last_report().sequences[0].source, told.source);
      EXPECT_EQ(second.last_report().sequences[0].reused_tokens, told.reused_tokens);
      EXPECT_EQ(second.last_report().sequences[0].layers.back().reused, told.layers.back().reused);
      partial += told.source == Source::kPartial ? 1 : 0;
    }
    EXPECT_GT(partial, 0);
    EXPECT_TRUE(second.stats().verification.closed.empty());
    // Held otherwise, or under another calibration, they are of no use.
    options.budget.budget.epsilon = 0.3;
    auto third = wrapped.with_options(options);
    EXPECT_THAT(third.load(file).summary(), HasSubstr("calibration that they were kept under"));
    options = passage_budget();
    options.budget.format = format == BankFormat::kInt8 ? BankFormat::kAsComputed : BankFormat::kInt8;
    auto fourth = wrapped.with_options(options);
    EXPECT_THAT(fourth.load(file).summary(), HasSubstr("this cache keeps them in another form"));
  }
}

// --- the paper's mode -------------------------------------------------------------------------------------

Options similar(FingerprintKind kind, Centring centring, std::vector<std::int64_t> layers = {}) {
  Options options{.fidelity = Fidelity::kThreshold};
  options.threshold.tau = kind == FingerprintKind::kJaccard ? 0.5 : 0.9;
  options.threshold.fingerprint = {.kind = kind, .centring = centring};
  options.threshold.fingerprint_layers = std::move(layers);
  return options;
}

/// Texts that come again, two of three with a word changed.
std::vector<Request> variations(const ModelInfo& info, int count, std::uint64_t seed) {
  std::vector<Request> all;
  for (int i = 0; i < count; ++i) {
    Request next = right_padded(info, {16}, 100 + (seed + static_cast<std::uint64_t>(i)) % 24);
    if (i % 3 != 0) next.ids()[0][3 + i % 9] = 10 + (i * 7) % 90;
    all.push_back(next);
  }
  return all;
}

struct ModeCase {
  const char* model;
  Options options;
};

TEST(PapersMode, IsServedAsItWas) {
  using enum FingerprintKind;
  const std::vector<ModeCase> cases = {{"tiny-bert-sdpa", similar(kRaw, Centring::kRunning)},
                                       {"tiny-bert-pooled", similar(kSimHash128, Centring::kRunning, {0, 1})},
                                       {"tiny-gpt2-sdpa", similar(kJaccard, Centring::kOff)},
                                       {"tiny-llama-sdpa-bf16", similar(kRaw, Centring::kOff)}};
  for (const ModeCase& one : cases) {
    SCOPED_TRACE(one.model);
    const TemporaryFolder folder;
    const fs::path file = folder / "cache.snapshot";
    const ModelInfo info = model_info(one.model);
    LayerCache<Module> first = cache_of(info.name, one.options);
    for (const Request& request : variations(info, 40, 0)) first.forward(request.inputs);
    const SnapshotReport saved = first.save(file);
    auto second = first.with_options(one.options);
    const SnapshotReport loaded = second.load(file);
    ASSERT_EQ(loaded.refused, "");
    EXPECT_EQ(loaded.entries(), saved.entries()) << loaded.summary();
    EXPECT_EQ(loaded.tokens(), saved.tokens());
    EXPECT_EQ(part_of(loaded, "layer states").tokens, 16 * part_of(loaded, "layer states").entries);
    EXPECT_EQ(second.stats().entries, first.stats().entries);
    EXPECT_LE(second.stats().peak_bytes, one.options.capacity_bytes);
    int hits = 0;
    for (const Request& request : variations(info, 20, 7)) {
      const auto want = first.forward(request.inputs);
      const SequenceReport told = first.last_report().sequences[0];
      const auto got = second.forward(request.inputs);
      // Of equally similar entries any may serve; states themselves are never equally similar.
      if (one.options.threshold.fingerprint.kind == kRaw) {
        EXPECT_TRUE(same_bits(got, want));
      }
      const SequenceReport again = second.last_report().sequences[0];
      EXPECT_EQ(again.source, told.source);
      EXPECT_EQ(again.similarity, told.similarity);
      EXPECT_EQ(again.resumed_layer, told.resumed_layer);
      hits += told.source == Source::kSimilar ? 1 : 0;
    }
    EXPECT_GT(hits, 5);
    EXPECT_EQ(second.stats().similar_hits, static_cast<std::uint64_t>(hits));
  }
}

class LayerStates : public ::testing::Test {
 protected:
  static constexpr const char* kEncoder = "tiny-bert-sdpa";
  LayerStates() : first_(cache_of(kEncoder, options_)) {
    for (const Request& request : requests_) first_.forward(request.inputs, {.tenant = "acme"});
    first_.save(file_);
  }
  const ModelInfo info_ = model_info(kEncoder);
  const Options options_ = similar(FingerprintKind::kRaw, Centring::kRunning);
  const std::vector<Request> requests_ = variations(info_, 40, 0);  // more than the running means begin with
  const TemporaryFolder folder_;
  const fs::path file_ = folder_ / "cache.snapshot";
  LayerCache<Module> first_;
};

TEST_F(LayerStates, TenantsStayApart) {
  auto second = first_.with_options(options_);
  ASSERT_EQ(second.load(file_).refused, "");
  for (const char* tenant : {"", "acm", "acme2", "acme"}) {
    second.forward(requests_[3].inputs, {.tenant = tenant});
    const bool own = std::string(tenant) == "acme";
    EXPECT_EQ(second.last_report().sequences[0].source, own ? Source::kSimilar : Source::kComputed) << tenant;
    EXPECT_EQ(second.last_report().sequences[0].entry, -1);
  }
}

TEST_F(LayerStates, LessRoomKeepsWhatWasUsedLast) {
  for (int i = 0; i < 5; ++i) first_.forward(requests_[2].inputs, {.tenant = "acme"});
  first_.save(file_);
  Options small = options_;
  small.capacity_bytes = first_.stats().bytes / 3;
  auto second = first_.with_options(small);
  const SnapshotReport loaded = second.load(file_);
  EXPECT_EQ(loaded.refused, "");
  const SnapshotPartReport& part = part_of(loaded, "layer states");
  EXPECT_GT(part.entries, 0U);
  EXPECT_GT(part.left, 0U);
  EXPECT_EQ(part.why, "there is no room for more");
  EXPECT_LE(second.stats().peak_bytes, small.capacity_bytes);
  EXPECT_EQ(second.stats().evictions, 0U);
  second.forward(requests_[2].inputs, {.tenant = "acme"});
  EXPECT_EQ(second.last_report().sequences[0].source, Source::kSimilar);
}

TEST_F(LayerStates, OfOtherLayersOrFingerprintsOfOtherStatesAreLeft) {
  Options other = options_;
  other.threshold.cache_layers = {1};
  EXPECT_THAT(first_.with_options(other).load(file_).summary(), HasSubstr("this cache keeps them in another form"));
  other = options_;
  other.threshold.fingerprint_layers = {1};
  EXPECT_THAT(first_.with_options(other).load(file_).summary(), HasSubstr("this cache keeps them in another form"));
  EXPECT_THAT(first_.with_options({}).load(file_).summary(), HasSubstr("this cache keeps nothing of the kind"));
  // Fingerprints of another kind are made of the same states.
  other = options_;
  other.threshold.fingerprint.kind = FingerprintKind::kSimHash128;
  auto bits = first_.with_options(other);
  EXPECT_EQ(part_of(bits.load(file_), "layer states").left, 0U);
  bits.forward(requests_[3].inputs, {.tenant = "acme"});
  EXPECT_EQ(bits.last_report().sequences[0].source, Source::kSimilar);
}

TEST_F(LayerStates, FitTheMeansThatACacheHasAlready) {
  auto second = first_.with_options(options_);
  for (const Request& request : variations(info_, 20, 11)) second.forward(request.inputs);
  const SnapshotReport loaded = second.load(file_);
  EXPECT_EQ(part_of(loaded, "centres of fingerprints").why, "the cache has means of its own already");
  EXPECT_EQ(part_of(loaded, "layer states").left, 0U);
  int held = 0;  // others were answered from one like them, and are not kept
  for (const Request& request : requests_) {
    first_.forward(request.inputs, {.tenant = "acme"});
    if (first_.last_report().sequences[0].similarity < 0.9999) continue;
    ++held;
    second.forward(request.inputs, {.tenant = "acme"});
    EXPECT_EQ(second.last_report().sequences[0].source, Source::kSimilar);
    EXPECT_GT(second.last_report().sequences[0].similarity, 0.999);
  }
  EXPECT_GT(held, 5);
  EXPECT_THAT(second.load(file_).summary(), HasSubstr("the cache has them already"));
}

TEST_F(LayerStates, KeepWhatAuditsFound) {
  Options audited = options_;
  audited.refresh.audit_rate = 1;
  audited.refresh.tolerance = {2, 1e9};
  auto first = first_.with_options(audited);
  for (int i = 0; i < 3; ++i) first.forward(requests_[0].inputs);
  first.save(file_);
  auto second = first_.with_options(audited);
  second.load(file_);
  std::uint64_t before = 0;
  std::uint64_t after = 0;
  for (const LayerStats& layer : first.stats().layers) before += layer.audited_entries;
  for (const LayerStats& layer : second.stats().layers) after += layer.audited_entries;
  EXPECT_GT(before, 0U);
  EXPECT_EQ(after, before);
  second.clear();
  for (const LayerStats& layer : second.stats().layers) EXPECT_EQ(layer.audited_entries, 0U);
}

class ASmallFileOfLayerStates : public ::testing::Test {
 protected:
  ASmallFileOfLayerStates() : cache_(cache_of("tiny-bert-sdpa", options_)) {
    auto first = cache_.with_options(options_);
    first.forward(request_.inputs);
    first.save(file_);
  }
  const Options options_ = similar(FingerprintKind::kRaw, Centring::kRunning);
  const Request request_ = right_padded(model_info("tiny-bert-sdpa"), {3}, 1);
  const TemporaryFolder folder_;
  const fs::path file_ = folder_ / "cache.snapshot";
  LayerCache<Module> cache_;
};

TEST_F(ASmallFileOfLayerStates, IsNotTakenIfItIsDamaged) { expect_nothing_of_damaged(cache_, file_, 29); }

TEST_F(ASmallFileOfLayerStates, DoesNoHarmIfItIsForged) {
  const auto want = leaves(cache_.forward(request_.inputs))[0].sizes().vec();
  cache_.clear();
  const auto check = [&] { return leaves(cache_.forward(request_.inputs))[0].sizes() == at::IntArrayRef(want); };
  expect_no_harm_of_forged(cache_, file_, FrameKind::kLayerState, 420, check);
  expect_no_harm_of_forged(cache_, file_, FrameKind::kCentres, 60, check);
}

}  // namespace
}  // namespace llmcache::test
