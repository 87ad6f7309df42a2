// The tokenizer that the example programs share.
#include "tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "examples_support.h"

namespace llmcache::examples {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Ids = std::vector<std::int64_t>;

class TokenizerTest : public ExampleTest {
 protected:
  static void expect_error(const std::function<void()>& function, const std::string& part) {
    EXPECT_THAT(function,
                ::testing::Throws<TokenizerError>(::testing::Property(&TokenizerError::what, HasSubstr(part))));
  }
  /// A helper that is not ours, run by a shell.
  void expect_bad_helper(const std::string& script, const std::string& part) const {
    const auto helper = write("helper.sh", script);
    expect_error([&] { Tokenizer("/bin/sh", helper, tiny_tokenizer()); }, part);
  }
  static Tokenizer tiny() { return {default_python(), default_helper(), tiny_tokenizer()}; }
};

TEST_F(TokenizerTest, TextComesBack) {
  auto tokenizer = tiny();
  EXPECT_EQ(tokenizer.vocabulary(), 259);
  EXPECT_THAT(tokenizer.end_tokens(), ElementsAre(2));
  EXPECT_TRUE(tokenizer.has_chat_template());
  const std::string text = "two lines\n\"quoted\" \\ h\u00e9llo \u20ac \U0001F642";
  const auto ids = tokenizer.encode(text);
  EXPECT_EQ(ids.size(), text.size()) << "one token a byte";
  EXPECT_EQ(tokenizer.decode(ids), text);
  EXPECT_THAT(tokenizer.encode(""), IsEmpty());
  EXPECT_EQ(tokenizer.encode(text, 3), Ids(ids.begin(), ids.begin() + 3));
  EXPECT_EQ(tokenizer.encode(text), ids) << "the limit was for one call";
}

TEST_F(TokenizerTest, SpecialTokensAreFoundAndLeftOut) {
  auto tokenizer = tiny();
  EXPECT_EQ(tokenizer.id_of("<end>"), 2);
  EXPECT_EQ(tokenizer.id_of("no such token"), -1);
  auto ids = tokenizer.encode("ab");
  ids.insert(ids.begin() + 1, 2);
  EXPECT_EQ(tokenizer.decode(ids), "ab");
}

TEST_F(TokenizerTest, ChatTemplateIsApplied) {
  auto tokenizer = tiny();
  EXPECT_EQ(tokenizer.decode(tokenizer.chat({{"system", "be {{ brief }}"}, {"user", "hi"}})),
            "system: be {{ brief }}\nuser: hi\nassistant: ");
}

TEST_F(TokenizerTest, StreamHoldsBackWhatIsNoWholeCharacter) {
  auto tokenizer = tiny();
  const std::string text = "a\u00e9\u20ac\U0001F642b";  // 1, 2, 3, 4 and 1 bytes
  std::vector<std::string> pieces;
  for (const auto id : tokenizer.encode(text)) pieces.push_back(tokenizer.stream(id));
  EXPECT_THAT(pieces, ElementsAre("a", "", "\u00e9", "", "", "\u20ac", "", "", "", "\U0001F642", "b"));
  EXPECT_EQ(tokenizer.finish(), "");
}

TEST_F(TokenizerTest, StreamShowsBytesThatNeverBecomeACharacter) {
  auto tokenizer = tiny();
  const auto euro = tokenizer.encode("\u20ac");  // three bytes
  const auto letter = tokenizer.encode("x");
  std::string text;
  Ids all;
  for (int i = 0; i < 5; ++i) {
    for (const auto id : {euro[0], euro[1], letter[0], euro[1], std::int64_t{280}}) {  // 280: no token
      text += tokenizer.stream(id);
      all.push_back(id);
    }
  }
  text += tokenizer.stream(euro[0]);
  all.push_back(euro[0]);
  EXPECT_EQ(text + tokenizer.finish(), tokenizer.decode(all));
  EXPECT_EQ(std::count(text.begin(), text.end(), 'x'), 5) << "held back for good: " << text;
}

TEST_F(TokenizerTest, FinishBeginsANewText) {
  auto tokenizer = tiny();
  const auto euro = tokenizer.encode("\u20ac");
  EXPECT_EQ(tokenizer.stream(euro[0]), "");
  EXPECT_EQ(tokenizer.finish(), "\ufffd");
  EXPECT_EQ(tokenizer.finish(), "");
  std::string text;
  for (const auto id : euro) text += tokenizer.stream(id);
  EXPECT_EQ(text, "\u20ac");
}

TEST_F(TokenizerTest, ARefusedRequestLeavesTheNextOneAlone) {
  fs::copy_file(tiny_tokenizer() / "tokenizer.json", folder_ / "tokenizer.json");  // alone: no end token, no template
  Tokenizer tokenizer(default_python(), default_helper(), folder_ / "tokenizer.json");
  EXPECT_FALSE(tokenizer.has_chat_template());
  EXPECT_THAT(tokenizer.end_tokens(), IsEmpty());
  expect_error([&] { (void)tokenizer.chat({{"user", "hi"}}); }, "no chat template");
  expect_error([&] { (void)tokenizer.encode("\xff\xfe"); }, "not UTF-8");
  expect_error([&] { (void)tokenizer.decode({-1}); }, "");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("still here")), "still here");
}

TEST_F(TokenizerTest, ATemplateReachesNothingButTheMessages) {
  fs::copy_file(tiny_tokenizer() / "tokenizer.json", folder_ / "tokenizer.json");
  write("chat_template.jinja", "{{ messages.__class__.__mro__ }}");
  Tokenizer tokenizer(default_python(), default_helper(), folder_);
  expect_error([&] { (void)tokenizer.chat({{"user", "hi"}}); }, "SecurityError");
}

TEST_F(TokenizerTest, MissingAndDamagedFilesAreNamed) {
  expect_error([&] { Tokenizer(default_python(), folder_ / "helper.py", tiny_tokenizer()); }, "--helper");
  expect_error([&] { Tokenizer(default_python(), default_helper(), folder_ / "none"); }, "--tokenizer");
  expect_error([&] { Tokenizer(default_python(), default_helper(), folder_); }, "tokenizer.json is not there");
  expect_error([&] { Tokenizer("no-such-python", default_helper(), tiny_tokenizer()); }, "--python");
  const auto damaged = write("damaged.json", text_of(tiny_tokenizer() / "tokenizer.json").substr(0, 1000));
  expect_error([&] { Tokenizer(default_python(), default_helper(), damaged); }, "tokenizer: ");
}

TEST_F(TokenizerTest, ArgumentsMeetNoShell) {
  const fs::path odd = folder_ / "$(touch injected); 'x";
  fs::create_directory(odd);
  fs::copy_file(tiny_tokenizer() / "tokenizer.json", odd / "tokenizer.json");
  Tokenizer tokenizer(default_python(), default_helper(), odd);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("; $(ls)")), "; $(ls)");
}

TEST_F(TokenizerTest, AHelperThatMisbehavesIsAnError) {
  expect_bad_helper("exit 3", "exit status 3");
  expect_bad_helper("kill -9 $$", "signal 9");
  expect_bad_helper("echo hello", "'hello'");
  expect_bad_helper("echo '[1]'", "expected");
  expect_bad_helper("echo '{\"ready\": true}'", "--helper");
  expect_bad_helper("echo '{\"ready\": true, \"vocabulary\": \"x\", \"end\": [], \"chat\": true}'", "--helper");
  expect_bad_helper("echo '{\"error\": \"out of luck\"}'", "out of luck");
}

TEST_F(TokenizerTest, AKilledHelperIsAnError) {
  auto tokenizer = tiny();
  ASSERT_GT(tokenizer.process(), 0);
  ASSERT_EQ(::kill(tokenizer.process(), SIGKILL), 0);
  expect_error([&] { (void)tokenizer.encode("hello"); }, "signal 9");
  expect_error([&] { (void)tokenizer.encode("hello"); }, "no longer answers");
}

TEST_F(TokenizerTest, TheHelperEndsWithItsTokenizer) {
  pid_t process = -1;
  {
    auto tokenizer = tiny();
    process = tokenizer.process();
  }
  EXPECT_NE(::kill(process, 0), 0) << "still running";
}

}  // namespace
}  // namespace llmcache::examples
