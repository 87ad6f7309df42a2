// What probing found, kept in a file: wrapping from it finds the same, runs next to nothing, and trusts no other file.
#include "model/saved_profile.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <sstream>

#include "store/damaged_data.h"
#include "support.h"

namespace llmcache::test {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class SavedProfileTest : public ::testing::Test {
 protected:
  SavedProfileTest() : folder_(fs::temp_directory_path() / ("llmcache-saved-profile-" + std::to_string(::getpid()))) {
    fs::create_directories(folder_);
  }
  ~SavedProfileTest() override { fs::remove_all(folder_); }

  [[nodiscard]] fs::path path() const { return folder_ / "model.profile.json"; }
  [[nodiscard]] Options options() const { return {.profile_path = path()}; }
  [[nodiscard]] LayerCache<Module> wrap(const Module& module) const { return LayerCache<Module>(module, options()); }
  [[nodiscard]] LayerCache<Module> wrap(const std::string& name) const { return wrap(load_model(name)); }

  [[nodiscard]] std::string text() const {
    std::ifstream file(path(), std::ios::binary);
    std::ostringstream all;
    all << file.rdbuf();
    return all.str();
  }
  void put(const std::string& bytes) const {
    std::filesystem::remove(path());  // see reader_support.h
    std::ofstream(path(), std::ios::binary).write(bytes.data(), std::ssize(bytes));
  }
  /// Puts a changed copy of `saved` in the file, with a hash that is right.
  template <class Change>
  void forge(SavedProfile saved, const Change& change) const {
    change(saved);
    ASSERT_EQ(write_saved_profile(path(), saved), "");
  }

  fs::path folder_;
};

class SavedProfileOf : public SavedProfileTest, public ::testing::WithParamInterface<std::string> {};

/// All that a profile says but how it was made.
std::string found(ModelProfile profile) {
  profile.file_note.clear();
  profile.wrap_ms = 0;
  std::string text = profile.to_string();
  for (const std::uint32_t code : profile.verified.codes) text += std::to_string(code) + " ";
  return text + profile.prefix_obstacle + profile.row_obstacle;
}

TEST_P(SavedProfileOf, FindsTheSame) {
  const auto first = wrap(GetParam());
  EXPECT_FALSE(first.profile().from_file);
  EXPECT_THAT(first.profile().file_note, StartsWith("was written ("));
  auto second = wrap(GetParam());
  EXPECT_TRUE(second.profile().from_file) << second.profile().file_note;
  EXPECT_EQ(second.profile().file_note, "was read");
  EXPECT_EQ(found(second.profile()), found(first.profile()));
  auto& plain = subject(GetParam());
  const auto request = right_padded(plain.info, {5, 9, 2}, 3);
  auto usual = LayerCache<Module>(load_model(GetParam()));
  EXPECT_TRUE(same_bits(second.forward(request.inputs), usual.forward(request.inputs)));
  EXPECT_EQ(second.last_report().execution, usual.last_report().execution);
}

INSTANTIATE_TEST_SUITE_P(All, SavedProfileOf, ::testing::ValuesIn(wrappable_names({"tiny-", "unusual-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, SavedProfileOf, ::testing::Values("tiny-llama-eager.pt2"), test_name);

TEST_F(SavedProfileTest, RunsThreePasses) {
  const auto module = load_model("tiny-gpt2-sdpa");
  const int pass = calls_of("aten::embedding", [&] {
    auto copy = module;
    copy.forward(right_padded(model_info("tiny-gpt2-sdpa"), {4}, 1).inputs);
  });
  ASSERT_GT(pass, 0);
  (void)wrap(module);
  // One plain, one packed, and one by which the bank of prefixes sees what there is to keep.
  EXPECT_LE(calls_of("aten::embedding", [&] { EXPECT_TRUE(wrap(module).profile().from_file); }), 3 * pass);
}

TEST_F(SavedProfileTest, OtherWeightsAreProbedAndWritten) {
  (void)wrap("tiny-scripted");
  const auto before = text();
  auto other = load_model("tiny-scripted");
  {
    const c10::NoGradGuard no_grad;
    other.attr("norm").toModule().attr("bias").toTensor()[5].add_(1e-3);
  }
  const auto cache = wrap(other);
  EXPECT_FALSE(cache.profile().from_file);
  EXPECT_EQ(found(cache.profile()), found(LayerCache<Module>(other).profile()));
  EXPECT_NE(text(), before);
  EXPECT_TRUE(wrap(other).profile().from_file);
  EXPECT_FALSE(wrap("tiny-scripted").profile().from_file);
}

TEST_F(SavedProfileTest, OtherModelsAndOptionsAreProbed) {
  (void)wrap("tiny-bert-sdpa");
  EXPECT_FALSE(wrap("tiny-gpt2-sdpa").profile().from_file);
  (void)wrap("tiny-bert-sdpa");
  auto chosen = options();
  chosen.weights = Weights::kPackedFp32;
  const LayerCache<Module> packed(load_model("tiny-bert-sdpa"), chosen);
  EXPECT_THAT(packed.profile().file_note, HasSubstr("another weights ('as-loaded'; it is 'packed-fp32' now)"));
  const LayerCache<Module> again(load_model("tiny-bert-sdpa"), chosen);
  EXPECT_TRUE(again.profile().from_file);
  EXPECT_EQ(found(again.profile()), found(packed.profile()));
  chosen.mask_argument = -1;
  EXPECT_FALSE(LayerCache<Module>(load_model("tiny-bert-sdpa"), chosen).profile().from_file);
}

TEST_F(SavedProfileTest, OtherVersionsAreProbed) {
  (void)wrap("tiny-bert-sdpa");
  const auto saved = read_saved_profile(path());
  for (const char* condition : {"library", "torch", "cpu", "device", "numbers"}) {
    forge(saved, [&](SavedProfile& changed) { changed.conditions[condition] = "another"; });
    EXPECT_THAT(wrap("tiny-bert-sdpa").profile().file_note, HasSubstr(std::string("made with another ") + condition));
    EXPECT_TRUE(wrap("tiny-bert-sdpa").profile().from_file);
  }
  auto newer = text();
  const auto own = "\"version\":" + std::to_string(kSavedProfileVersion);
  const auto at = newer.find(own);
  ASSERT_NE(at, std::string::npos);
  put(newer.replace(at, own.size(), "\"version\":" + std::to_string(kSavedProfileVersion + 1)));
  EXPECT_THAT(wrap("tiny-bert-sdpa").profile().file_note,
              HasSubstr("has version " + std::to_string(kSavedProfileVersion + 1)));
}

TEST_F(SavedProfileTest, ASourceIsFoundAgain) {
  const auto want = wrap("seq2seq-t5").profile();
  const auto saved = read_saved_profile(path());
  const auto again = wrap("seq2seq-t5").profile();
  EXPECT_TRUE(again.from_file);
  EXPECT_EQ(found(again), found(want));
  EXPECT_EQ(again.source_arguments, want.source_arguments);
  EXPECT_TRUE(again.source_reuse && again.source_mask_argument == 1);
  const std::vector<std::pair<const char*, std::function<void(SavedProfile&)>>> forgeries{
      {"no source", [](SavedProfile& s) { s.graph->source.clear(); }},
      {"the other side", [](SavedProfile& s) { s.graph->source.flip(); }},
      {"of another model", [](SavedProfile& s) { s.graph->source.push_back(true); }},
      {"a mask of the target", [](SavedProfile& s) { s.profile.source_mask_argument = 2; }}};
  for (const auto& [name, change] : forgeries) {
    forge(saved, change);
    const auto profile = wrap("seq2seq-t5").profile();
    EXPECT_FALSE(profile.from_file) << name;
    EXPECT_EQ(found(profile), found(want)) << name;
  }
}

TEST_F(SavedProfileTest, ForgedFilesAreNotBelieved) {
  const auto want = found(wrap("tiny-bert-sdpa").profile());
  const auto saved = read_saved_profile(path());
  const std::vector<std::pair<const char*, std::function<void(SavedProfile&)>>> forgeries{
      {"digest", [](SavedProfile& s) { s.digest[0] = s.digest[0] == '0' ? '1' : '0'; }},
      {"structure", [](SavedProfile& s) { s.graph->structure.clear(); }},
      {"no graph", [](SavedProfile& s) { s.graph.reset(); }},
      {"chain", [](SavedProfile& s) { s.graph->chain = 999; }},
      {"a value less", [](SavedProfile& s) { s.graph->values.pop_back(); }},
      {"no labels",
       [](SavedProfile& s) {
         std::fill(s.graph->values.begin(), s.graph->values.end(), std::vector<std::int64_t>{0, 0, 0, 4, 1});
       }},
      {"a label of no kind", [](SavedProfile& s) { s.graph->values[0][0] = 77; }},
      {"a label cut off", [](SavedProfile& s) { s.graph->values[0].pop_back(); }},
      {"an answer less", [](SavedProfile& s) { s.graph->answers.pop_back(); }},
      {"an answer more", [](SavedProfile& s) { s.graph->answers.push_back(true); }},
      {"no answers", [](SavedProfile& s) { s.graph->answers.clear(); }},
      {"other answers", [](SavedProfile& s) { s.graph->answers.flip(); }},
      {"mask", [](SavedProfile& s) { s.profile.mask_argument = 7; }},
      {"ids as mask", [](SavedProfile& s) { s.profile.mask_argument = 0; }},
      {"prefixes of an encoder", [](SavedProfile& s) { s.profile.prefix_reuse = true; }},
      {"head", [](SavedProfile& s) { s.profile.head_tokenwise = !s.profile.head_tokenwise; }},
      {"codes that fall",
       [](SavedProfile& s) { std::reverse(s.profile.verified.codes.begin(), s.profile.verified.codes.end()); }},
      {"too many codes",
       [](SavedProfile& s) {
         s.profile.verified.codes.resize(5000);
         std::iota(s.profile.verified.codes.begin(), s.profile.verified.codes.end(), 0U);
       }},
      {"a tensor less", [](SavedProfile& s) { s.output.leaves.pop_back(); }},
      {"dimensions", [](SavedProfile& s) { std::swap(s.output.leaves[0].batch, s.output.leaves[0].tokens); }},
      {"a dimension that is not there", [](SavedProfile& s) { s.output.leaves[0].tokens = 9; }}};
  for (const auto& [name, change] : forgeries) {
    forge(saved, change);
    const auto cache = wrap("tiny-bert-sdpa");
    EXPECT_FALSE(cache.profile().from_file) << name;
    EXPECT_EQ(found(cache.profile()), want) << name;
    EXPECT_TRUE(wrap("tiny-bert-sdpa").profile().from_file) << name << " was not written over";
  }
}

TEST_F(SavedProfileTest, DamagedFilesAreWrittenOver) {
  const auto want = found(wrap("tiny-bert-sdpa").profile());
  const std::string good = text();
  const std::vector<std::string> damaged{"",
                                         "{}",
                                         "[1, 2]",
                                         std::string(5000, '['),
                                         good.substr(0, good.size() / 2),
                                         good.substr(0, good.size() - 3),
                                         std::string(good).replace(good.size() / 3, 1, "\xff"),
                                         good + good};
  for (const std::string& bytes : damaged) {
    put(bytes);
    const auto cache = wrap("tiny-bert-sdpa");
    EXPECT_FALSE(cache.profile().from_file) << bytes.substr(0, 20);
    EXPECT_EQ(found(cache.profile()), want);
    EXPECT_EQ(text(), good);
  }
}

/// Small, with everything that a file can have.
SavedProfile small() {
  SavedProfile saved;
  saved.conditions = {{"library", "0.1.0"}, {"layers", "a \"b\" \\ c"}};
  saved.digest = "0123";
  saved.graph.emplace();
  saved.graph->values = {{1, 6, 0, 4, 1, 1, 1}, {2, 4, 0, 0, 7}};
  saved.graph->result = {{1, 6, 0, 4, 1}};
  saved.graph->answers = {true, false};
  saved.output = {{{0, 1, -1}}, true};
  saved.profile.notes = {"a note"};
  saved.profile.verified = {40, 3, 25, {1, 2}};
  return saved;
}

TEST(SavedProfileFile, EveryChangeIsNoticed) {
  const std::string good = small().to_json();
  ASSERT_EQ(parse_saved_profile(good).to_json(), good);
  for (std::size_t i = 0; i < good.size() - 1; ++i) {  // the last byte ends the line
    EXPECT_THROW(parse_saved_profile(good.substr(0, i)), DamagedData) << i;
  }
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = good;
      changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
      try {
        EXPECT_EQ(parse_saved_profile(changed).to_json(), good) << i;  // white space
      } catch (const DamagedData&) {
      }
    }
  }
}

TEST(SavedProfileFile, WhatIsNoFileIsRefused) {
  EXPECT_THROW(read_saved_profile("/nowhere/at/all.json"), UnreadableFile);
  EXPECT_THROW(read_saved_profile(fs::temp_directory_path()), UnreadableFile);
}

TEST_F(SavedProfileTest, AFolderThatIsNotThereIsNoted) {
  Options elsewhere{.profile_path = folder_ / "no" / "such" / "folder.json"};
  const LayerCache<Module> cache(load_model("tiny-bert-sdpa"), elsewhere);
  EXPECT_FALSE(cache.profile().from_file);
  EXPECT_THAT(cache.profile().file_note, StartsWith("cannot be written: "));
  EXPECT_THAT(cache.profile().to_string(), HasSubstr("saved profile:     cannot be written"));
  elsewhere.profile_path = folder_;
  EXPECT_THAT(LayerCache<Module>(load_model("tiny-bert-sdpa"), elsewhere).profile().file_note,
              StartsWith("cannot be written: "));
  EXPECT_TRUE(fs::is_empty(folder_)) << "what was written beside it was left there";
}

TEST_F(SavedProfileTest, WhatProgressThrowsPassesThrough) {
  (void)wrap("tiny-bert-sdpa");
  auto chosen = options();
  chosen.progress = [](const Progress&) { throw std::runtime_error("enough"); };
  EXPECT_THROW(LayerCache<Module>(load_model("tiny-bert-sdpa"), chosen), std::runtime_error);
}

}  // namespace
}  // namespace llmcache::test
