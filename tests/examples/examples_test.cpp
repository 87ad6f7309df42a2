// The example programs as a user runs them, on tiny models.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/llmcache.h>
#include <torch/script.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "examples_support.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace llmcache::examples {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Ids = std::vector<std::int64_t>;

// --- generate -----------------------------------------------------------------------------------------

class GenerateTest : public ExampleTest {
 protected:
  Result generate(const std::string& name, std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), {"--model", model(name)});
    return run("llmcache-generate", arguments);
  }

  static Tokenizer tiny() { return {default_python(), default_helper(), tiny_tokenizer()}; }

  /// What the plain module says, one whole pass a token.
  static Ids expected(const std::string& name, Ids ids, std::size_t count, const Sampling& sampling = {},
                      std::uint64_t seed = 0) {
    auto module = torch::jit::load(model(name));
    const at::NoGradGuard no_grad;
    std::mt19937_64 generator(seed);
    Ids answer;
    while (answer.size() < count) {
      const auto row = at::tensor(ids, at::kLong).unsqueeze(0);
      const auto logits = module.forward({row, at::ones_like(row)}).toTensor().select(1, -1)[0].contiguous();
      const auto next = sample({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())}, sampling,
                               next_draw(generator));
      if (next == 2) break;  // <end>
      answer.push_back(next);
      ids.push_back(next);
    }
    return answer;
  }

  /// The answers in the output, in order.
  static std::vector<std::string> answers(const std::string& out) {
    std::vector<std::string> found;
    for (std::size_t end = out.find("\n\nprefill: "); end != std::string::npos;
         end = out.find("\n\nprefill: ", end + 1)) {
      const auto heading = out.rfind("\n== ", end);
      const auto begin = out.find('\n', heading == std::string::npos ? 0 : heading + 1) + 1;
      found.push_back(out.substr(begin, end - begin));
    }
    return found;
  }

  /// Prompt tokens, known tokens.
  static std::vector<std::pair<int, int>> prefills(const std::string& out) {
    const std::regex line(
        "prefill: (\\d+) tokens, (\\d+) of them known \\(\\d+\\.\\d % reused\\), \\d+\\.\\d ms, "
        "\\d+\\.\\d tokens/s\n");
    std::vector<std::pair<int, int>> found;
    for (std::sregex_iterator match(out.begin(), out.end(), line), end; match != end; ++match) {
      found.emplace_back(std::stoi((*match)[1]), std::stoi((*match)[2]));
    }
    return found;
  }

  static bool reuses_prefixes(const std::string& name) {
    return LayerCache(torch::jit::load(model(name))).profile().prefix_reuse;
  }
};

TEST_F(GenerateTest, QuestionsAreAnsweredAsThePlainModuleAnswersThem) {
  auto tokenizer = tiny();
  for (const std::string name : {"tiny-gpt2-sdpa", "tiny-llama-sdpa"}) {
    SCOPED_TRACE(name);
    const std::string passage = "It rises in the Alps, and ends in the sea.";
    const auto result = generate(
        name, {"--prompt", passage, "--question", "Where?", "--question", "Why \u20ac?", "--max-tokens", "12"});
    ASSERT_EQ(result.status, 0) << result.err;
    std::vector<std::string> texts;
    for (const char* question : {"Where?", "Why \u20ac?"}) {
      texts.push_back(tokenizer.decode(expected(name, tokenizer.encode(passage + "\n\n" + question), /*count=*/12)));
    }
    EXPECT_EQ(answers(result.out), texts) << result.out;
    EXPECT_THAT(result.out, HasSubstr("random (seed 0)"));

    // The passage and "\n\nWh" are common to both: the second question finds them known.
    const int length = static_cast<int>(passage.size());
    const bool reused = reuses_prefixes(name);
    EXPECT_THAT(prefills(result.out),
                ElementsAre(std::pair(length + 8, 0), std::pair(length + 10, reused ? length + 4 : 0)))
        << result.out;
    EXPECT_EQ(result.out.find("prefixes are not reused") == std::string::npos, reused);
    EXPECT_THAT(result.out, ::testing::ContainsRegex("decode:  11 tokens, [0-9.]+ ms a token, [0-9.]+ tokens/s\n"));
    EXPECT_THAT(result.out, HasSubstr("stopped: --max-tokens, after 12 tokens"));
  }
}

TEST_F(GenerateTest, SamplingIsFixedByTheSeed) {
  auto tokenizer = tiny();
  const auto run_with = [&](const std::string& seed) {
    const auto result =
        generate("tiny-gpt2-sdpa", {"--prompt", "Once upon a time", "--max-tokens", "16", "--temperature", "0.9",
                                    "--top-k", "40", "--top-p", "0.95", "--seed", seed});
    EXPECT_EQ(result.status, 0) << result.err;
    const auto found = answers(result.out);
    return found.empty() ? "" : found[0];
  };
  const Sampling sampling{.temperature = 0.9, .top_k = 40, .top_p = 0.95};
  const auto prompt = tokenizer.encode("Once upon a time");
  const auto first = run_with("7");
  EXPECT_EQ(first, tokenizer.decode(expected("tiny-gpt2-sdpa", prompt, 16, sampling, 7)));
  EXPECT_EQ(run_with("7"), first);
  EXPECT_NE(run_with("8"), first);
}

TEST_F(GenerateTest, StopsAtAnEndToken) {
  auto tokenizer = tiny();
  const auto answer = expected("tiny-llama-sdpa", tokenizer.encode("Stop here"), 40);
  const auto vocabulary = nlohmann::json::parse(text_of(tiny_tokenizer() / "tokenizer.json"))["model"]["vocab"];
  // A token that has a text and comes late for the first time, as the end token.
  std::string end;
  Ids before;
  for (const auto id : answer) {
    const bool late = before.size() >= 3 && std::find(before.begin(), before.end(), id) == before.end();
    for (const auto& [token, number] : vocabulary.items()) {
      if (late && number == id) end = token;
    }
    if (!end.empty()) break;
    before.push_back(id);
  }
  ASSERT_FALSE(end.empty()) << "choose another prompt";
  const auto result = generate("tiny-llama-sdpa", {"--prompt", "Stop here", "--max-tokens", "40", "--end-token", end});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("stopped: end token, after " + std::to_string(before.size()) + " tokens"));
  EXPECT_THAT(answers(result.out), ElementsAre(tokenizer.decode(before)));
}

TEST_F(GenerateTest, StopsWhereTheModelTakesNoMore) {
  const auto full = generate("tiny-gpt2-sdpa", {"--prompt", std::string(250, 'x'), "--max-tokens", "50"});
  ASSERT_EQ(full.status, 0) << full.err;
  EXPECT_THAT(full.out, HasSubstr("stopped: the model takes no longer sequence, after 7 tokens"));
  const auto over = generate("tiny-gpt2-sdpa", {"--prompt", std::string(257, 'x')});
  EXPECT_EQ(over.status, 1);
  EXPECT_THAT(over.err, AllOf(HasSubstr("257"), HasSubstr("256")));
}

TEST_F(GenerateTest, ReadsThePromptFromAFileAndPutsItThroughTheChatTemplate) {
  auto tokenizer = tiny();
  const auto file = write("prompt.txt", "line one\nline \"two\"");
  const auto plain = generate("tiny-gpt2-sdpa", {"--prompt-file", file, "--max-tokens", "1"});
  ASSERT_EQ(plain.status, 0) << plain.err;
  EXPECT_THAT(prefills(plain.out), ElementsAre(std::pair(19, 0)));
  EXPECT_THAT(plain.out, HasSubstr("decode:  none"));
  const auto chat =
      generate("tiny-gpt2-sdpa", {"--prompt-file", file, "--question", "And?", "--chat", "--max-tokens", "5"});
  ASSERT_EQ(chat.status, 0) << chat.err;
  const auto ids = tokenizer.encode("user: line one\nline \"two\"\n\nAnd?\nassistant: ");
  EXPECT_THAT(prefills(chat.out), ElementsAre(std::pair(static_cast<int>(ids.size()), 0)));
  EXPECT_THAT(answers(chat.out), ElementsAre(tokenizer.decode(expected("tiny-gpt2-sdpa", ids, 5))));
}

TEST_F(GenerateTest, BadFlagsAreRefused) {
  const auto refused = [&](const std::vector<std::string>& arguments, const std::string& part) {
    const auto result = generate("tiny-gpt2-sdpa", arguments);
    EXPECT_EQ(result.status, 2) << part << result.out << result.err;
    EXPECT_THAT(result.out + result.err, HasSubstr(part));
  };
  refused({"--prompt", "a", "--top-k", "5"}, "temperature above 0");
  refused({"--prompt", "a", "--top-p", "0.5"}, "temperature above 0");
  refused({"--prompt", "a", "--temperature=-1"}, "temperature");
  refused({"--prompt", "a", "--temperature", "1", "--top-p", "1.5"}, "top_p");
  refused({"--prompt", "a", "--temperature", "warm"}, "--temperature");
  refused({"--prompt", "a", "--max-tokens", "0"}, "--max-tokens");
  refused({"--prompt", "a", "--weights", "fp4"}, "fp4");
  refused({"--prompt", "a", "--prompt-file", "b"}, "--prompt");
  refused({"--prompt", "a", "--no-such-flag"}, "--no-such-flag");
  const auto no_model = run("llmcache-generate", {"--prompt", "a"});
  EXPECT_EQ(no_model.status, 2);
  EXPECT_THAT(no_model.err, HasSubstr("--model"));
  const auto help = run("llmcache-generate", {"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.out, HasSubstr("--top-p"));
}

TEST_F(GenerateTest, WhatIsMissingIsNamed) {
  const auto fails = [&](const std::string& name, const std::vector<std::string>& arguments, const std::string& part) {
    const auto result = generate(name, arguments);
    EXPECT_EQ(result.status, 1) << part << result.out << result.err;
    EXPECT_THAT(result.err, HasSubstr(part));
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  };
  fails("no-such-model", {"--prompt", "a"}, "no-such-model.pt");
  fails("tiny-gpt2-sdpa", {"--prompt", "a", "--tokenizer", folder_ / "none.json"}, "none.json");
  fails("tiny-gpt2-sdpa", {"--prompt", "a", "--helper", folder_ / "none.py"}, "none.py");
  fails("tiny-gpt2-sdpa", {"--prompt", "a", "--python", folder_ / "no-python"}, "--python");
  fails("tiny-gpt2-sdpa", {"--prompt-file", folder_ / "none.txt"}, "none.txt");
  fails("tiny-gpt2-sdpa", {"--prompt", ""}, "--prompt");
  fails("tiny-gpt2-sdpa", {"--prompt", "a", "--end-token", "<stop>"}, "<stop>");
  fails("tiny-gpt2-sdpa", {"--prompt", "\xff"}, "UTF-8");
  fails("tiny-bert-sdpa", {"--prompt", "a"}, "causal");
  fails("tiny-gpt2-sdpa", {"--prompt", "Rovers", "--tokenizer", models() / "tokenizers" / "bert-base-uncased"},
        "the model's embedding has the ids 0 to");
}

TEST_F(GenerateTest, ADamagedModelIsAnError) {
  write("damaged.pt", text_of(model("tiny-gpt2-sdpa")).substr(0, 5000));
  const auto damaged = run("llmcache-generate", {"--model", folder_ / "damaged.pt", "--prompt", "a"});
  EXPECT_EQ(damaged.status, 1);
  EXPECT_THAT(damaged.err, HasSubstr("damaged.pt"));
  fs::copy_file(model("tiny-gpt2-sdpa"), folder_ / "alone.pt");  // without sidecar
  const auto alone = run("llmcache-generate", {"--model", folder_ / "alone.pt", "--prompt", "a"});
  EXPECT_EQ(alone.status, 1);
  EXPECT_THAT(alone.err, HasSubstr("--tokenizer"));
  const auto given = run("llmcache-generate", {"--model", folder_ / "alone.pt", "--prompt", "a", "--max-tokens", "2",
                                               "--tokenizer", tiny_tokenizer()});
  EXPECT_EQ(given.status, 0) << given.err;
  write("alone.json", "{\"tokenizer\": 3}");
  const auto sidecar = run("llmcache-generate", {"--model", folder_ / "alone.pt", "--prompt", "a"});
  EXPECT_EQ(sidecar.status, 1);
  EXPECT_THAT(sidecar.err, HasSubstr("alone.json"));
}

TEST_F(GenerateTest, AHelperThatDiesInBetweenIsAnError) {
  // Answers the first request, and is killed at the second: in the middle of the streamed text.
  const auto helper = write("dies.sh",
                            "echo '{\"ready\": true, \"vocabulary\": 259, \"end\": [], \"chat\": false}'\n"
                            "read -r request\necho '{\"ids\": [5, 6, 7]}'\nread -r request\nkill -9 $$\n");
  const auto result = generate("tiny-gpt2-sdpa", {"--prompt", "a", "--python", "/bin/sh", "--helper", helper});
  EXPECT_EQ(result.status, 1) << result.out;
  EXPECT_THAT(result.err, HasSubstr("signal 9"));
}

// --- classify -----------------------------------------------------------------------------------------

class ClassifyTest : public ExampleTest {
 protected:
  Result classify(const std::string& name, std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), {"--model", model(name)});
    return run("llmcache-classify", arguments);
  }
  /// The numbers of "N texts in B batches: C tokens computed, P with padding (R real)": N, B, C, P, R.
  static std::vector<int> sums(const std::string& out) {
    const std::regex line(
        "(\\d+) texts in (\\d+) batches: (\\d+) tokens computed, (\\d+) with padding \\((\\d+) real\\); "
        "\\d+\\.\\d ms, \\d+\\.\\d\\d ms a text\n");
    std::smatch match;
    std::vector<int> numbers;
    if (std::regex_search(out, match, line)) {
      for (std::size_t i = 1; i < match.size(); ++i) numbers.push_back(std::stoi(match[i]));
    }
    return numbers;
  }
};

TEST_F(ClassifyTest, FindsTheLabelsOfPlainTexts) {
  const auto labels = write("labels.txt",
                            "sports: sports, a match, a team, a player\n\nmoney: companies, banks, markets, money\n"
                            "weather: the weather, rain, sun, wind, temperatures\n");
  const auto texts =
      write("texts.tsv",
            "sports\tThe striker scored twice and the team won the cup final after extra time.\n"
            "money\tShares fell.\n"
            "weather\tHeavy rain and strong winds are expected in the north tomorrow.\n"
            "money\tThe bank raised its interest rate to fight inflation, which investors had feared.\n");
  const auto result =
      classify("minilm", {"--labels", labels, "--texts", texts, "--labelled", "--compare", "--batch", "3"});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("right label: 4 of 4 (100.0 %)")) << result.out;
  const auto numbers = sums(result.out);
  ASSERT_EQ(numbers.size(), 5U) << result.out;
  EXPECT_EQ(numbers[0], 4);
  EXPECT_EQ(numbers[1], 2);
  EXPECT_EQ(numbers[2], numbers[4]) << "padding was computed";
  EXPECT_LT(numbers[4], numbers[3]);
  std::smatch difference;
  ASSERT_TRUE(std::regex_search(result.out, difference, std::regex("difference of a vector's element (\\S+)\n")));
  EXPECT_LT(std::stod(difference[1]), 1e-5);
}

TEST_F(ClassifyTest, SimilaritiesAreThoseOfThePlainModule) {
  Tokenizer tokenizer(default_python(), default_helper(), tiny_tokenizer());
  const std::vector<std::string> texts = {"short", "a text that is quite a bit longer", "12345"};
  const std::vector<std::string> labels = {"the first", "the second one", "third"};
  for (const std::string name : {"tiny-bert-sdpa", "tiny-bert-pooled", "tiny-bert-types-sdpa"}) {
    SCOPED_TRACE(name);
    auto module = torch::jit::load(model(name));
    const at::NoGradGuard no_grad;
    const auto vector = [&](const std::string& text) {  // each text alone: no padding
      const auto ids = at::tensor(tokenizer.encode(text), at::kLong).unsqueeze(0);
      std::vector<c10::IValue> inputs = {ids, at::ones_like(ids)};
      if (name == "tiny-bert-types-sdpa") inputs.emplace_back(at::zeros_like(ids));
      const auto result = module.forward(inputs);
      auto output = result.isTuple() ? result.toTupleRef().elements()[0].toTensor() : result.toTensor();
      output = output.dim() == 3 ? output.mean(1) : output;
      return output[0] / output[0].norm();
    };
    std::vector<std::string> arguments;
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < labels.size(); ++i) {
      arguments.insert(arguments.end(), {"--label", "label" + std::to_string(i) + ": " + labels[i]});
    }
    for (const auto& text : texts) {
      arguments.insert(arguments.end(), {"--text", text});
      std::vector<std::pair<double, int>> ranked;
      for (std::size_t i = 0; i < labels.size(); ++i) {
        ranked.emplace_back(at::dot(vector(text), vector(labels[i])).item<double>(), static_cast<int>(i));
      }
      std::sort(ranked.rbegin(), ranked.rend());
      char line[200];
      std::snprintf(line, sizeof(line), "label%d               %6.3f  (next: label%d %.3f)  %s\n", ranked[0].second,
                    ranked[0].first, ranked[1].second, ranked[1].first, text.c_str());
      lines.emplace_back(line);
    }
    const auto result = classify(name, arguments);
    ASSERT_EQ(result.status, 0) << result.err;
    for (const auto& line : lines) EXPECT_THAT(result.out, HasSubstr(line));
    const auto real = static_cast<int>(texts[0].size() + texts[1].size() + texts[2].size());
    EXPECT_THAT(sums(result.out), ElementsAre(3, 1, real, 3 * static_cast<int>(texts[1].size()), real));
  }
}

TEST_F(ClassifyTest, AKnownTextIsNotComputedAgain) {
  const auto result = classify("tiny-bert-sdpa", {"--label", "a", "--label", "b", "--text", "the same", "--text",
                                                  "the same", "--batch", "1", "--quiet"});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(sums(result.out), ElementsAre(2, 2, 8, 16, 16));
  EXPECT_THAT(result.out, Not(HasSubstr("next:")));
}

TEST_F(ClassifyTest, LongTextsAreCut) {
  const auto result = classify(
      "tiny-bert-sdpa", {"--label", "a", "--label", "b", "--text", std::string(1000, 'x'), "--max-tokens", "1000"});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(sums(result.out), ElementsAre(1, 1, 256, 256, 256));
}

TEST_F(ClassifyTest, FailuresAreNamed) {
  const auto fails = [&](int status, const std::string& name, const std::vector<std::string>& arguments,
                         const std::string& part) {
    const auto result = classify(name, arguments);
    EXPECT_EQ(result.status, status) << part << result.out << result.err;
    EXPECT_THAT(result.out + result.err, HasSubstr(part));
  };
  const std::vector<std::string> two = {"--label", "a", "--label", "b"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), two.begin(), two.end());
    return more;
  };
  fails(1, "tiny-bert-sdpa", {"--label", "a", "--text", "x"}, "two labels");
  fails(1, "tiny-bert-sdpa", two, "no text");
  fails(1, "tiny-bert-sdpa", with({"--text", "c\tx", "--labelled"}), "none of the labels");
  fails(1, "tiny-bert-sdpa", with({"--texts", folder_ / "none.txt"}), "none.txt");
  fails(1, "tiny-bert-sdpa", with({"--text", "x", "--tokenizer", folder_ / "none"}), "none");
  fails(1, "tiny-bert-sdpa", with({"--text", "x", "--helper", folder_ / "none.py"}), "none.py");
  fails(1, "no-such-model", with({"--text", "x"}), "no-such-model.pt");
  fails(1, "tiny-gpt2-sdpa", with({"--text", "x"}), "expected an encoder");
  fails(1, "tiny-nan", with({"--text", "x"}), "NaN");
  fails(2, "tiny-bert-sdpa", with({"--text", "x", "--weights", "fp4"}), "fp4");
  fails(2, "tiny-bert-sdpa", with({"--text", "x", "--batch", "0"}), "--batch");
}

// --- inspect, chat, classifier service ------------------------------------------------------------------

class InspectTest : public ExampleTest {};

TEST_F(InspectTest, SaysInOneLineWhatIsWrong) {
  const auto whole = run("llmcache-inspect", {model("tiny-bert-sdpa")});
  EXPECT_EQ(whole.status, 0) << whole.err;
  EXPECT_THAT(whole.out, AllOf(HasSubstr("granularity:       tokens"), HasSubstr("at most 256 tokens")));
  EXPECT_EQ(run("llmcache-inspect", {"--help"}).status, 0);
  EXPECT_EQ(run("llmcache-inspect", {}).status, 2);
  write("empty.pt", "");
  write("text.pt", "no module at all");
  for (const std::string& file : {(folder_ / "none.pt").string(), (folder_ / "empty.pt").string(),
                                  (folder_ / "text.pt").string(), folder_.string(), model("tiny-mlp")}) {
    const auto result = run("llmcache-inspect", {file});
    EXPECT_EQ(result.status, 1) << file;
    EXPECT_EQ(result.out, "");
    EXPECT_THAT(result.err, HasSubstr("llmcache-inspect: "));
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }
}

TEST_F(ExampleTest, ARestartKnowsWhatWasKnown) {
  const auto result = run("llmcache-restart", {"--model", model("tiny-gpt2-sdpa"), "--texts", "3", "--tokens", "20"});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("60 of 60 tokens known"), HasSubstr("times as fast as computing")));
}

class HookTest : public ExampleTest {};

TEST_F(HookTest, NormsAreThoseOfTheStates) {
  const auto result = run("llmcache-layer-norms", {"--model", model("tiny-bert-sdpa"), "--text", "Hello."});
  ASSERT_EQ(result.status, 0) << result.err;
  TorchScriptCache cache(torch::jit::load(model("tiny-bert-sdpa")));
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), cache.profile().layers + 1) << result.out;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("behind embedding "), HasSubstr("behind layer 0 "), HasSubstr("behind final")));
}

TEST_F(HookTest, SteeringByNothingChangesNothing) {
  const auto steer = [&](const std::string& away_from) {
    const auto result =
        run("llmcache-steer", {"--model", model("tiny-gpt2-sdpa"), "--prompt", "One day", "--towards", "joy",
                               "--away-from", away_from, "--layer", "1", "--max-tokens", "8", "--strength", "30"});
    EXPECT_EQ(result.status, 0) << result.err;
    const auto second = result.out.find("steered:\n");
    EXPECT_NE(second, std::string::npos) << result.out;
    const std::string first = "as it is:\n";
    return std::pair(result.out.substr(first.size(), second - first.size()), result.out.substr(second + 9));
  };
  const auto same = steer("joy");
  EXPECT_EQ(same.first, same.second);
  const auto other = steer("grief and pain");
  EXPECT_EQ(other.first, same.first);
  EXPECT_NE(other.second, other.first);
}

class ChatTest : public ExampleTest {};

TEST_F(ChatTest, EachTenantHasAConversationOfItsOwn) {
  const auto result = run("llmcache-chat", {model("tiny-llama-sdpa")},
                          "ann: Hello.\nbob: Hello.\nno tenant\nann: Again.\nbob: Again.\n");
  ASSERT_EQ(result.status, 0) << result.err;
  std::vector<std::pair<std::string, int>> known;
  const std::regex line("\\[(\\w+): prompt of \\d+ tokens, (\\d+) known; ");
  for (std::sregex_iterator match(result.out.begin(), result.out.end(), line), end; match != end; ++match) {
    known.emplace_back((*match)[1], std::stoi((*match)[2]));
  }
  ASSERT_GE(known.size(), 4U) << result.out;
  EXPECT_EQ(known[0], std::pair(std::string("ann"), 0));
  EXPECT_EQ(known[1], std::pair(std::string("bob"), 0)) << "what another tenant said is not known";
  EXPECT_EQ(known[2].first, "ann");
  EXPECT_GT(known[2].second, 20) << "the whole of the turn before";
  EXPECT_THAT(result.out, AllOf(HasSubstr("[expected NAME: text]"), HasSubstr("requests:  ")));
  const auto limited =
      run("llmcache-chat", {model("tiny-gpt2-sdpa")}, "ann: " + std::string(300, 'x') + "\nann: Hello.\n");
  EXPECT_EQ(limited.status, 0) << limited.err;
  EXPECT_THAT(limited.out, AllOf(HasSubstr("[ann: invalid input: "), HasSubstr("at most 256 are possible]"),
                                 HasSubstr("[ann: prompt of ")))
      << "a text that is too long is left out of the conversation";
  EXPECT_EQ(run("llmcache-chat", {}).status, 2);
  EXPECT_THAT(run("llmcache-chat", {model("no-such-model")}).err, HasSubstr("no-such-model"));
}

class ServiceTest : public ExampleTest {};

TEST_F(ServiceTest, LabelsAsThePlainModelDoes) {
  const auto labels = write("labels", "fruit: apples and pears\nrain: clouds and water\n");
  std::string texts;
  std::string asked;
  for (int i = 0; i < 240; ++i) {
    const std::string text = "text " + std::to_string(i * 7919 % 1000) + (i % 2 == 0 ? " of apples" : " of clouds");
    (i < 200 ? texts : asked) += text + "\n";
  }
  const auto result = run("llmcache-classifier-service",
                          {model("tiny-bert-pooled"), labels.string(), write("sample", texts).string()}, asked);
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("budget: decision error at most 0.02"), HasSubstr("requests:  5, of 40")));
  // Each line of the input has its line in the output, in order, with one of the labels.
  std::vector<std::string> answered;
  std::istringstream lines(result.out);
  for (std::string line; std::getline(lines, line);) {
    const auto tab = line.find('\t');
    if (tab == std::string::npos) continue;
    EXPECT_THAT(line.substr(0, tab), ::testing::AnyOf("fruit", "rain"));
    answered.push_back(line.substr(tab + 1));
  }
  std::string all;
  for (const std::string& text : answered) all += text + "\n";
  EXPECT_EQ(all, asked);
  EXPECT_EQ(run("llmcache-classifier-service", {}).status, 2);
  const auto missing = run("llmcache-classifier-service", {model("tiny-bert-pooled"), "none", "none"});
  EXPECT_EQ(missing.status, 1);
  EXPECT_THAT(missing.err, HasSubstr("there is no file none"));
}

}  // namespace
}  // namespace llmcache::examples
