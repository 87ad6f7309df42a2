// Saving and loading a cache: it goes on where it was, for the same model only, and whatever became of the file.
#include <c10/util/Exception.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "budget_support.h"
#include "device/load_on.h"
#include "reader_support.h"
#include "snapshot_support.h"
#include "store/snapshot_entries.h"
#include "store/snapshot_file.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
namespace fs = std::filesystem;

/// A folder of its own for each test.
class Folder {
 public:
  Folder() : path_(fs::path(::testing::TempDir()) / ("llmcache-" + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] fs::path file(const std::string& name = "cache.snapshot") const { return path_ / name; }

 private:
  fs::path path_;
};

/// Texts that begin alike, one that is known whole, and batches of both; some as a generation loop asks for them.
struct Question {
  Request request;
  RequestOptions options;
};

std::vector<Question> questions(const ModelInfo& info) {
  const Output last = info.family == "decoder" ? Output::kLastToken : Output::kAll;
  std::vector<Question> all;
  const Request base = right_padded(info, {24}, 1);
  for (const std::int64_t tokens : {9, 16, 24}) {
    Request begins = right_padded(info, {tokens}, 1);
    begins.ids().copy_(base.ids().narrow(1, 0, tokens));
    all.push_back({begins, {}});
    all.push_back({begins, {.output = last}});
  }
  for (const std::uint64_t seed : {2, 3, 4}) all.push_back({right_padded(info, {12, 5, 17}, seed), {}});
  all.push_back({right_padded(info, {21, 8}, 5), {.output = last, .tenant = "acme"}});
  return all;
}

/// Tokens known of each question.
std::vector<std::int64_t> known_tokens(LayerCache<Module>& cache, const std::vector<Question>& asked) {
  std::vector<std::int64_t> known;
  for (const Question& one : asked) {
    cache.forward(one.request.inputs, one.options);
    std::int64_t sum = 0;
    for (const SequenceReport& sequence : cache.last_report().sequences) sum += sequence.reused_tokens;
    known.push_back(sum);
  }
  return known;
}

std::vector<Question> first_half(const std::vector<Question>& all) {
  return {all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2)};
}

void rewrite_identity(const fs::path& path, const std::function<void(ModelIdentity&)>& change) {
  rewrite(path, [&](FrameKind kind, std::string& bytes) {
    if (kind != FrameKind::kHeader) return;
    SnapshotHeader header = read_header(bytes);
    change(header.identity);
    bytes = write_header(header);
  });
}

// --- the same model -------------------------------------------------------------------------------------

class SnapshotOf : public ::testing::TestWithParam<std::string> {};

TEST_P(SnapshotOf, GoesOnWhereItWas) {
  const Folder folder;
  const ModelInfo info = model_info(GetParam());
  Module plain = load_model(info.name);
  const auto asked = questions(info);
  LayerCache<Module> first = cache_of(info.name);
  known_tokens(first, first_half(asked));
  const SnapshotReport saved = first.save(folder.file());
  EXPECT_EQ(saved.bytes, fs::file_size(folder.file()));
  EXPECT_GT(saved.entries(), 0U);

  LayerCache<Module> second = cache_of(info.name);
  const SnapshotReport loaded = second.load(folder.file());
  EXPECT_EQ(loaded.refused, "");
  EXPECT_EQ(loaded.entries(), saved.entries());
  EXPECT_EQ(loaded.tokens(), saved.tokens());
  EXPECT_EQ(second.stats().snapshot.loaded.entries(), loaded.entries());
  EXPECT_LE(second.stats().peak_bytes, second.options().capacity_bytes);
  for (const Question& one : asked) {
    const auto got = second.forward(one.request.inputs, {.tenant = one.options.tenant});
    const auto want = run_plain(plain, one.request.inputs);
    EXPECT_TRUE(close_on_real(got, want, one.request, tolerance_of(info)));
  }
  EXPECT_EQ(second.stats().verification.mismatches, 0U);

  LayerCache<Module> third = cache_of(info.name);
  third.load(folder.file());
  EXPECT_EQ(known_tokens(third, asked), known_tokens(first, asked));
  EXPECT_GT(third.stats().tokens_reused, 0U);
}

TEST_P(SnapshotOf, IsTheSameWhenItIsSavedAgain) {
  const Folder folder;
  const ModelInfo info = model_info(GetParam());
  LayerCache<Module> first = cache_of(info.name);
  known_tokens(first, questions(info));
  first.save(folder.file("one"));
  LayerCache<Module> second = cache_of(info.name);
  second.load(folder.file("one"));
  second.save(folder.file("two"));
  EXPECT_EQ(bytes_of(folder.file("one")).size(), bytes_of(folder.file("two")).size());
  // What is there already is not taken twice.
  const auto before = second.stats().entries;
  const SnapshotReport again = second.load(folder.file("one"));
  EXPECT_EQ(again.entries(), 0U);
  EXPECT_THAT(again.summary(), HasSubstr("the cache has them already"));
  EXPECT_EQ(second.stats().entries, before);
}

INSTANTIATE_TEST_SUITE_P(Models, SnapshotOf,
                         ::testing::Values("tiny-bert-sdpa", "tiny-bert-eager", "tiny-bert-pooled", "tiny-bert-cls",
                                           "tiny-bert-sdpa-bf16", "tiny-distilbert-sdpa", "tiny-gpt2-sdpa",
                                           "tiny-gpt2-eager", "tiny-llama-sdpa", "tiny-llama-eager",
                                           "tiny-llama-sdpa-bf16", "tiny-scripted"),
                         test_name);

constexpr const char* kDecoder = "tiny-gpt2-sdpa";

TEST(Snapshot, TenantsStayApart) {
  const Folder folder;
  const ModelInfo info = model_info(kDecoder);
  const Request request = right_padded(info, {20}, 1);
  LayerCache<Module> first = cache_of(kDecoder);
  for (const Output output : {Output::kAll, Output::kLastToken}) {
    first.forward(request.inputs, {.output = output, .tenant = "acme"});
  }
  first.save(folder.file());
  LayerCache<Module> second = cache_of(kDecoder);
  ASSERT_EQ(second.load(folder.file()).refused, "");
  for (const Output output : {Output::kAll, Output::kLastToken}) {
    for (const char* other : {"", "acme2", "acm"}) {
      LayerCache<Module> cache = second.with_options({});
      cache.load(folder.file());
      cache.forward(request.inputs, {.output = output, .tenant = other});
      EXPECT_EQ(cache.last_report().sequences[0].reused_tokens, 0) << other;
    }
    second.forward(request.inputs, {.output = output, .tenant = "acme"});
    EXPECT_EQ(second.last_report().sequences[0].reused_tokens, 20);
  }
}

TEST(Snapshot, LessRoomKeepsWhatWasUsedLast) {
  const Folder folder;
  const ModelInfo info = model_info(kDecoder);
  LayerCache<Module> first = cache_of(kDecoder);
  std::vector<Request> requests;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    requests.push_back(right_padded(info, {30}, seed));
    first.forward(requests.back().inputs, {.output = Output::kLastToken});
  }
  first.forward(requests[3].inputs, {.output = Output::kLastToken});  // used again
  first.save(folder.file());
  Options small;
  small.capacity_bytes = first.stats().bytes / 3;
  LayerCache<Module> second = first.with_options(small);
  const SnapshotReport loaded = second.load(folder.file());
  EXPECT_GT(loaded.entries(), 5U);
  EXPECT_THAT(loaded.summary(), HasSubstr("there is no room for more"));
  EXPECT_LE(second.stats().peak_bytes, small.capacity_bytes);
  EXPECT_EQ(second.stats().evictions, 0U);
  const auto known = [&](std::size_t i) {
    LayerCache<Module> cache = first.with_options(small);
    cache.load(folder.file());
    cache.forward(requests[i].inputs, {.output = Output::kLastToken});
    return cache.last_report().sequences[0].reused_tokens;
  };
  for (std::size_t i = 32; i < 40; ++i) EXPECT_EQ(known(i), 30) << i;
  EXPECT_EQ(known(3), 30);
  for (std::size_t i = 5; i < 25; ++i) EXPECT_LE(known(i), 1) << i;  // some begin alike
  // And in the order of their use: the next to go is the least recently used of them.
  second.forward(right_padded(info, {30}, 99).inputs, {.output = Output::kLastToken});
  second.forward(requests[3].inputs, {.output = Output::kLastToken});
  EXPECT_EQ(second.last_report().sequences[0].reused_tokens, 30);
}

TEST(Snapshot, WhatTheCacheDoesNotKeepIsLeft) {
  const Folder folder;
  const ModelInfo info = model_info(kDecoder);
  LayerCache<Module> first = cache_of(kDecoder);
  known_tokens(first, questions(info));
  first.save(folder.file());
  LayerCache<Module> identical = first.with_options({.fidelity = Fidelity::kIdentical});
  EXPECT_THAT(identical.load(folder.file()).summary(), HasSubstr("this cache keeps nothing of the kind"));
  Options some;
  some.prefix.layers = {0};
  LayerCache<Module> other = first.with_options(some);
  EXPECT_THAT(other.load(folder.file()).summary(), HasSubstr("this cache keeps them in another form"));
  EXPECT_GT(other.stats().entries, 0U);  // whole outputs
}

/// What the test below does in the process that it starts.
void load_in_another_process(const fs::path& folder) {
  LayerCache<Module> cache(load_on(folder / "moved.pt", test_device()));
  ASSERT_EQ(cache.load(folder / "cache.snapshot").refused, "");
  cache.forward(right_padded(model_info(kDecoder), {20}, 1).inputs, {.output = Output::kLastToken});
  EXPECT_EQ(cache.last_report().sequences[0].reused_tokens, 20);
}

TEST(Snapshot, HoldsInAnotherProcessAndForAModelAtAnotherPlace) {
  if (const char* const path = std::getenv("LLMCACHE_SNAPSHOT_CHILD")) return load_in_another_process(path);
  const Folder folder;
  LayerCache<Module> cache = cache_of(kDecoder);
  cache.forward(right_padded(model_info(kDecoder), {20}, 1).inputs, {.output = Output::kLastToken});
  cache.save(folder.file());
  fs::copy_file(fs::path(std::getenv("LLMCACHE_MODELS_DIR")) / (std::string(kDecoder) + ".pt"),
                folder.file("moved.pt"));
  const std::string command = "LLMCACHE_SNAPSHOT_CHILD='" + folder.file().parent_path().string() + "' '" +
                              fs::read_symlink("/proc/self/exe").string() +
                              "' --gtest_filter=Snapshot.HoldsInAnotherProcess* --device=" + test_device().str();
  EXPECT_EQ(std::system(command.c_str()), 0);
}

// --- another model --------------------------------------------------------------------------------------

/// What the result of a model depends on beside its layers.
struct Variant {
  double epsilon = 1e-5;      ///< an attribute that is a number
  double base = 1e4;          ///< one of a list of numbers
  std::string scale = "0.5";  ///< a number in the graph
  float buffer = 1.0F;
  float constant = 1.0F;         ///< in a tensor in the graph
  std::uint32_t weight_bit = 0;  ///< added to the bits of one number of a weight
};

Module variant(const Variant& chosen) {
  Script script;
  const std::string work =
      "    x = x * " + chosen.scale + " + self.epsilon + self.bases[0] * 0.0001 + self.buffer * self.folded\n";
  script.forward = Script::with(script.forward, "    x = self.l0", work + "    x = self.l0");
  script.attributes = [&](Module& module) {
    module.register_attribute("epsilon", c10::FloatType::get(), chosen.epsilon);
    module.register_attribute("bases", c10::ListType::ofFloats(), c10::List<double>({chosen.base, 1.0}));
    module.register_buffer("buffer", at::full({32}, chosen.buffer));
    module.register_buffer("folded", at::ones({32}));
  };
  Module module = make_module(script);
  auto graph = module.get_method("forward").graph();
  for (auto* node : graph->nodes()) {
    if (node->kind() != c10::prim::GetAttr || node->s(c10::attr::name) != "folded") continue;
    const torch::jit::WithInsertPoint guard(node);
    node->output()->replaceAllUsesWith(graph->insertConstant(at::full({32}, chosen.constant).to(test_device())));
  }
  const c10::NoGradGuard no_grad;
  module.attr("table").toTensor().view(at::kInt).view({-1})[77].add_(static_cast<std::int32_t>(chosen.weight_bit));
  return module;
}

/// A cache of `loaded` takes nothing of one of `saved`; returns what it says. The files of both have one name.
std::string refused_by(
    const Module& saved, const Module& loaded, const Options& options = {},
    const std::function<void(const fs::path&)>& change = [](const fs::path&) {}) {
  const Folder folder;
  const fs::path model = folder.file("model.pt");
  const auto cache_of = [&](const Module& module, const Options& chosen) {
    module.save(model.string());
    return LayerCache<Module>(load_on(model, test_device()), chosen);
  };
  const Request request = right_padded(script_info(Script{}), {9, 9}, 1);
  LayerCache<Module> first = cache_of(saved, {});
  first.forward(request.inputs);
  first.save(folder.file());
  change(folder.file());
  LayerCache<Module> second = cache_of(loaded, options);
  const SnapshotReport report = second.load(folder.file());
  second.forward(request.inputs);
  const auto reused = second.stats().tokens_reused;
  EXPECT_EQ(report.entries(), report.refused.empty() ? 2U : 0U);
  EXPECT_EQ(reused, report.refused.empty() ? 18U : 0U);
  return report.refused;
}

TEST(SnapshotIdentity, IsThatOfTheSameModel) {
  EXPECT_EQ(refused_by(variant({}), variant({})), "");
  EXPECT_EQ(refused_by(variant({.epsilon = 2e-5}), variant({.epsilon = 2e-5})), "");
}

TEST(SnapshotIdentity, FollowsFromAllThatTheModelHolds) {
  const auto refused = [](const Variant& other) { return refused_by(variant({}), variant(other)); };
  const auto says = HasSubstr("another model: its weights, graph or settings are others");
  EXPECT_THAT(refused({.weight_bit = 1}), says);
  EXPECT_THAT(refused({.epsilon = 1.0000001e-5}), says);
  EXPECT_THAT(refused({.base = 1e4 + 1e-9}), says);
  EXPECT_THAT(refused({.scale = "0.5000001"}), says);
  EXPECT_THAT(refused({.buffer = 1.0000001F}), says);
  EXPECT_THAT(refused({.constant = 1.0000001F}), says);
  EXPECT_THAT(refused_by(variant({}), make_module(Script{})), says);  // the file has the same name
}

/// Tensors that are not one block of numbers after the other, and numbers and texts beside them.
TEST(SnapshotIdentity, FollowsFromTensorsOfEveryLayoutAndFromOtherAttributes) {
  const auto with = [](const at::Tensor& held, std::int64_t count, const std::string& text) {
    Script script;
    script.forward =
        Script::with(script.forward, "    x = self.l0", "    x = x * self.held.to_dense().sum()\n    x = self.l0");
    script.attributes = [&](Module& module) {
      module.register_buffer("held", held);
      module.register_attribute("count", c10::IntType::get(), count);
      module.register_attribute("text", c10::StringType::get(), text);
    };
    return make_module(script);
  };
  const auto identities = [](const Module& module) {
    const Folder folder;
    LayerCache<Module> cache(module);
    cache.save(folder.file());
    SnapshotReader reader(open_file(folder.file()));
    SnapshotFrame frame;
    std::string bytes;
    reader.next(frame, bytes);
    return std::pair(cache.profile().digest, read_header(bytes).identity.contents);
  };
  const auto numbers = [](float last) { return at::tensor({1.0F, 0.0F, 2.0F, 0.0F, 0.0F, last}).view({2, 3}); };
  const std::vector<std::function<at::Tensor(const at::Tensor&)>> layouts = {
      [](const at::Tensor& t) { return t.clone(); }, [](const at::Tensor& t) { return t.t().contiguous().t(); },
      [](const at::Tensor& t) { return t.to_sparse(); }, [](const at::Tensor& t) { return t.to_sparse_csr(); },
      [](const at::Tensor& t) {
        return t.unsqueeze(0).expand({4, 2, 3});
      }};
  for (std::size_t number = 0; number < layouts.size(); ++number) {
    const bool sparse = number == 2 || number == 3;
    if (sparse && test_device().is_privateuseone()) continue;  // it has no sparse tensors
    const auto& layout = layouts[number];
    const auto one = identities(with(layout(numbers(3)), 1, "a"));
    EXPECT_EQ(identities(with(layout(numbers(3)), 1, "a")), one);
    for (const auto& other :
         {identities(with(layout(numbers(3.000001F)), 1, "a")), identities(with(layout(numbers(3)), 2, "a")),
          identities(with(layout(numbers(3)), 1, "b"))}) {
      EXPECT_NE(other.first, one.first);
      EXPECT_NE(other.second, one.second);
    }
  }
}

TEST(SnapshotIdentity, FollowsFromTypeAndPacking) {
  Module wide = variant({});
  wide.to(at::kDouble);
  const std::string kind = c10::DeviceTypeName(test_device().type(), /*lower_case=*/true);
  EXPECT_THAT(refused_by(variant({}), wide), HasSubstr("computed on " + kind + " in Float"));
  if (!test_device().is_cpu()) return;  // packed weights are for CPUs
  EXPECT_THAT(refused_by(variant({}), variant({}), {.weights = Weights::kPackedFp32}), HasSubstr("held as-loaded"));
}

TEST(SnapshotIdentity, FollowsFromVersions) {
  const auto refused = [](const std::function<void(ModelIdentity&)>& change) {
    return refused_by(variant({}), variant({}), {}, [&](const fs::path& path) { rewrite_identity(path, change); });
  };
  EXPECT_EQ(refused([](ModelIdentity&) {}), "");
  EXPECT_THAT(refused([](ModelIdentity& it) { ++it.state_layout; }), HasSubstr("laid out as version"));
  EXPECT_THAT(refused([](ModelIdentity& it) { it.torch = "1.0.0"; }), HasSubstr("computed with LibTorch 1.0.0"));
}

TEST(SnapshotIdentity, FollowsFromTheKindOfAttention) {
  const Folder folder;
  const Request request = right_padded(model_info("tiny-llama-sdpa"), {12}, 1);
  LayerCache<Module> first = cache_of("tiny-llama-sdpa");
  first.forward(request.inputs);
  first.save(folder.file());
  LayerCache<Module> second = cache_of("tiny-llama-eager");
  EXPECT_THAT(second.load(folder.file()).refused, HasSubstr("another"));
  second.forward(request.inputs);
  EXPECT_EQ(second.stats().tokens_reused, 0U);
  // Even where nothing else tells them apart.
  LayerCache<Module> third = first.with_options({});
  rewrite_identity(folder.file(), [](ModelIdentity& it) { it.attention = "0 eager 2 4; "; });
  EXPECT_THAT(third.load(folder.file()).refused, HasSubstr("attention is of another kind"));
}

TEST(SnapshotIdentity, WeightsThatWereChangedAreNotSavedUnderAnothersName) {
  const Folder folder;
  Module module = variant({});
  LayerCache<Module> cache(module);
  const Request request = right_padded(script_info(Script{}), {9, 9}, 1);
  cache.forward(request.inputs);
  cache.save(folder.file("before"));
  module.attr("buffer").toTensor().fill_(2);
  EXPECT_THAT([&] { cache.save(folder.file("after")); }, ThrowsError(ErrorCode::kModelChanged, "buffer"));
  EXPECT_FALSE(fs::exists(folder.file("after")));
  cache.weights_changed();
  EXPECT_THAT(cache.load(folder.file("before")).refused, HasSubstr("another model"));
  cache.forward(request.inputs);
  cache.save(folder.file("after"));
  LayerCache<Module> again(variant({.buffer = 2}));
  EXPECT_EQ(again.load(folder.file("after")).refused, "");
}

// --- what became of the file ----------------------------------------------------------------------------

/// A small file, and a cache that may load it.
class DamagedSnapshot : public ::testing::Test {
 protected:
  DamagedSnapshot() : cache_(cache_of(kDecoder)), plain_(load_model(kDecoder)) {
    LayerCache<Module> first = cache_.with_options({});
    first.forward(request_.inputs);
    first.forward(request_.inputs, {.output = Output::kLastToken});
    first.save(folder_.file());
    sound_ = bytes_of(folder_.file());
  }
  SnapshotReport load(const std::string& bytes) {
    write(folder_.file(), bytes);
    return cache_.load(folder_.file());
  }
  void expect_nothing_of(const std::string& bytes) {
    const SnapshotReport report = load(bytes);
    ASSERT_NE(report.refused, "");
    ASSERT_EQ(report.entries(), 0U);
    ASSERT_EQ(cache_.stats().entries, 0U);
  }

  const Folder folder_;
  const Request request_ = right_padded(model_info(kDecoder), {3}, 1);
  LayerCache<Module> cache_;
  Module plain_;
  std::string sound_;
};

TEST_F(DamagedSnapshot, NothingIsTakenOfAFileWithAByteChanged) {
  for (std::size_t at = 0; at < sound_.size(); ++at) expect_nothing_of(flipped(sound_, at, at));
  EXPECT_EQ(load(sound_).refused, "");
  EXPECT_GT(cache_.stats().entries, 0U);
}

TEST_F(DamagedSnapshot, NothingIsTakenOfAFileThatWasCutOff) {
  for (std::size_t size = 0; size < sound_.size(); size += size % 64 == 0 ? 1 : 3) {
    expect_nothing_of(sound_.substr(0, size));
  }
}

TEST_F(DamagedSnapshot, TheReasonIsInWords) {
  const auto why = [&](const std::string& bytes) { return load(bytes).refused; };
  EXPECT_EQ(why("text"), "it is damaged: it is shorter than the beginning of a snapshot");
  EXPECT_THAT(why(std::string(100, 'x')), HasSubstr("it does not begin as a snapshot does"));
  EXPECT_THAT(why(sound_.substr(0, sound_.size() - 9)), HasSubstr("it was cut off"));
  EXPECT_THAT(why(flipped(sound_, sound_.size() / 2, 3)), HasSubstr("its content was changed"));
  EXPECT_THAT(why(flipped(sound_, 9, 0)), HasSubstr("reads up to version 1"));
  fs::remove(folder_.file());
  EXPECT_THAT(cache_.load(folder_.file()).refused, HasSubstr("there is no such file"));
  EXPECT_THAT(cache_.load(folder_.file()).summary(), HasSubstr("nothing of"));
  EXPECT_THAT(cache_.load(folder_.file("")).refused, HasSubstr("no regular file"));
}

/// Lengths, sizes and numbers of entries at their limits, with right checks. Whatever is taken has the right form: what
/// is asked then is answered, with the right shape, and what no entry was forged for comes out right.
TEST_F(DamagedSnapshot, ForgedEntriesWithRightChecksDoNoHarm) {
  const auto want = run_plain(plain_, request_.inputs);
  const Request other = right_padded(model_info(kDecoder), {7}, 2);
  const auto other_want = run_plain(plain_, other.inputs);
  for (std::size_t at = 0; at < 240; ++at) {
    for (const std::uint64_t value : {std::uint64_t{0}, std::uint64_t{1} << 33, ~std::uint64_t{0}}) {
      write(folder_.file(), sound_);
      rewrite(folder_.file(), [&](FrameKind kind, std::string& bytes) {
        if (kind == FrameKind::kHeader || at + 8 > bytes.size()) return;
        std::memcpy(bytes.data() + at, &value, sizeof(value));
      });
      cache_.load(folder_.file());
      const auto got = cache_.forward(request_.inputs);
      ASSERT_EQ(leaves(got)[0].sizes(), leaves(want)[0].sizes());
      ASSERT_TRUE(close_on_real(cache_.forward(other.inputs), other_want, other, 1e-4));
      cache_.clear();
    }
  }
}

// --- by itself, and while calls are running ---------------------------------------------------------------

TEST(SnapshotOptions, LoadAtTheStartAndSaveAtTheEnd) {
  const Folder folder;
  const Request request = right_padded(model_info(kDecoder), {20}, 1);
  Options options;
  options.snapshot.path = folder.file().string();
  std::vector<std::string> steps;
  options.progress = [&](const Progress& progress) { steps.push_back(progress.step); };
  {
    LayerCache<Module> cache = cache_of(kDecoder, options);
    EXPECT_THAT(cache.stats().snapshot.loaded.refused, HasSubstr("no such file"));
    cache.forward(request.inputs);
    EXPECT_FALSE(fs::exists(folder.file()));
  }
  EXPECT_THAT(steps, ::testing::Contains("loading the snapshot"));
  {
    LayerCache<Module> cache = cache_of(kDecoder, options);
    EXPECT_EQ(cache.stats().snapshot.loaded.refused, "");
    EXPECT_THAT(cache.stats().to_string(), HasSubstr("loaded:"));
    cache.forward(request.inputs);
    EXPECT_EQ(cache.last_report().sequences[0].reused_tokens, 20);
    LayerCache<Module> moved = std::move(cache);  // saves once, at its own end
    EXPECT_EQ(moved.with_options(moved.options()).options().snapshot.path, "");
  }
  write(folder.file(), "no snapshot");
  LayerCache<Module> cache = cache_of(kDecoder, options);
  EXPECT_THAT(cache.stats().snapshot.loaded.refused, HasSubstr("damaged"));
  EXPECT_EQ(cache.stats().entries, 0U);
}

TEST(SnapshotOptions, SaveNowAndThen) {
  const Folder folder;
  Options options;
  options.snapshot = {folder.file().string(), 0.02};
  LayerCache<Module> cache = cache_of(kDecoder, options);
  cache.forward(right_padded(model_info(kDecoder), {20}, 1).inputs);
  for (int waited = 0; cache.stats().snapshot.saves < 3 && waited < 1000; ++waited) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_GE(cache.stats().snapshot.saves, 3U);
  EXPECT_EQ(cache.stats().snapshot.failed, 0U);
  EXPECT_EQ(cache.with_options({}).load(folder.file()).refused, "");
}

TEST(SnapshotOptions, AreChecked) {
  const auto refuses = [](const llmcache::SnapshotOptions& chosen, const char* why) {
    Options options;
    options.snapshot = chosen;
    EXPECT_THAT([&] { options.validate(); }, ThrowsError(ErrorCode::kInvalidOptions, why));
  };
  refuses({"file", -1}, "save_every_s is -1");
  refuses({"file", std::nan("")}, "save_every_s");
  refuses({"", 1}, "path is empty");
}

TEST(Snapshot, AFileThatCannotBeWrittenSaysSo) {
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  {
    Options options;
    options.snapshot.path = "/nowhere/at/all";
    LayerCache<Module> cache = cache_of(kDecoder, options);
    EXPECT_THAT([&] { cache.save("/nowhere/at/all"); },
                ThrowsError(ErrorCode::kInvalidFile, "what was there before is there still"));
    EXPECT_EQ(cache.stats().snapshot.failed, 1U);
    EXPECT_THAT(cache.stats().snapshot.failure, HasSubstr("No such file or directory"));
  }
  EXPECT_THAT(warnings.texts, HasSubstr("cannot be written"));
}

TEST(Snapshot, IsWholeWhileCallsAreRunning) {
  const Folder folder;
  const ModelInfo info = model_info(kDecoder);
  Options options;
  options.capacity_bytes = std::size_t{1} << 20;  // so that entries come and go
  LayerCache<Module> cache = cache_of(kDecoder, options);
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint64_t i = 0; !done; ++i) {
        const Request request = right_padded(info, {static_cast<std::int64_t>(10 + i % 40)}, 1 + (i + t) % 50);
        cache.forward(request.inputs, {.output = i % 2 == 0 ? Output::kAll : Output::kLastToken});
      }
    });
  }
  for (int i = 0; i < 30; ++i) {
    cache.save(folder.file());
    LayerCache<Module> other = cache.with_options({});
    const SnapshotReport loaded = other.load(folder.file());
    EXPECT_EQ(loaded.refused, "");
    if (i % 10 == 0) cache.load(folder.file());
  }
  done = true;
  for (auto& thread : threads) thread.join();
  const Stats stats = cache.stats();
  EXPECT_LE(stats.peak_bytes, options.capacity_bytes);
  EXPECT_THAT(stats.fallbacks, IsEmpty());
  EXPECT_EQ(stats.verification.mismatches, 0U);
}

// --- within a budget --------------------------------------------------------------------------------------

TEST(Snapshot, TokenStatesAreHeldAsTheyWereUnderTheirCalibration) {
  const ModelInfo info = model_info("tiny-bert-sdpa");
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kInt8}) {
    SCOPED_TRACE(to_string(format));
    const Folder folder;
    Options options{.fidelity = Fidelity::kBudget};
    options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
    options.budget.early_exit = EarlyExit::kOff;
    options.budget.audit_rate = 0;
    options.budget.format = format;
    LayerCache<Module> first = cache_of(info.name, options);
    const auto profile = first.calibrate(inputs_of(documents(info, 300, 100)));
    ASSERT_TRUE(profile.reuse) << profile.to_string();
    for (const Request& request : documents(info, 60, 9000)) first.forward(request.inputs);
    const SnapshotReport saved = first.save(folder.file());
    LayerCache<Module> second = cache_of(info.name, options);
    const SnapshotReport loaded = second.load(folder.file());
    EXPECT_EQ(loaded.refused, "");
    EXPECT_EQ(loaded.entries(), saved.entries()) << loaded.summary();
    EXPECT_GT(loaded.tokens(), 0U);
    ASSERT_TRUE(second.calibration());
    EXPECT_EQ(second.calibration()->reuse->setting, profile.reuse->setting);
    Request next = documents(info, 60, 9000).back();
    next.ids()[0][20] = 7;
    const auto want = leaves(first.forward(next.inputs))[0];
    const auto report = first.last_report();
    const auto got = leaves(second.forward(next.inputs))[0];
    EXPECT_EQ(second.last_report().sequences[0].source, report.sequences[0].source);
    EXPECT_EQ(second.last_report().sequences[0].layers.back().reused, report.sequences[0].layers.back().reused);
    EXPECT_TRUE(at::allclose(got, want, 1e-5, 1e-5));
    // Under another calibration they are of no use.
    options.budget.budget.epsilon = 0.2;
    LayerCache<Module> third = cache_of(info.name, options);
    EXPECT_THAT(third.load(folder.file()).summary(), HasSubstr("calibration that they were kept under"));
  }
}

}  // namespace
}  // namespace llmcache::test
