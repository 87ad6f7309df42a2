// llmcache-reuse-bench: what token reuse costs and how far its outputs are off, by what was edited and how long the
// text is. Usage: llmcache-reuse-bench MODEL.pt TOKENS.safetensors [PAIRS]
//
// The model has one pooled output a sequence; the token file has sequences [CLS] question [SEP] passage [SEP] (workload
// squad). A pair is a sequence that is cached and an edited one that is asked for. One line a case:
//   cos    of the output with reuse to that of a full pass, mean over the pairs
//   worst  the smallest of them
//   stale  the same of the cached sequence's own output, mean
//   error  distance of the outputs with reuse and of a full pass, divided by the mean distance of two cached sequences
//   frac   token-layers computed / all
//   full, reuse   milliseconds of processor time of the one thread, the least of three calls, mean over the pairs;
//          reuse: with look-up and alignment
//   times  full / reuse
// First, a line for each format that states may be held in: time of a hit and bytes of the bank as multiples of those
// of float32, and the error.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <fmt/core.h>
#include <torch/script.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "execute/self_check.h"
#include "failure.h"
#include "llmcache/model/torchscript.h"
#include "machine.h"
#include "token_file.h"
#include "token_reuse.h"

namespace llmcache::bench {
namespace {

using Ids = std::vector<std::int64_t>;

struct Text {
  std::vector<Ids> questions;
  Ids passage;
};

/// Passages with their questions, without marks, from sequences [CLS] question [SEP] passage [SEP].
std::vector<Text> read_texts(const TokenFile& file, std::int64_t& begin, std::int64_t& separator) {
  std::vector<Text> texts;
  for (std::int64_t i = 0; i < file.sequences(); ++i) {
    const auto sequence = file.sequence(i);
    begin = sequence.front();
    separator = sequence.back();
    const auto end = std::find(sequence.begin(), sequence.end(), sequence.back());
    const Ids question(sequence.begin() + 1, end);
    if (end + 1 >= sequence.end()) continue;
    const Ids passage(end + 1, sequence.end() - 1);
    if (texts.empty() || texts.back().passage != passage) texts.push_back({{}, passage});
    texts.back().questions.push_back(question);
  }
  std::erase_if(texts, [](const Text& text) { return text.questions.size() < 2; });
  if (texts.size() < 10) throw Failure("the token file has fewer than 10 passages with two questions each");
  return texts;
}

enum class Edit {
  kQuestionBehind,
  kQuestionBefore,
  kSubstitute1,
  kSubstitute5Percent,
  kInsert4,
  kInsert16,
  kAppend16,
  kMoved,
  kSlid32
};
constexpr std::pair<Edit, const char*> kEdits[] = {{Edit::kQuestionBehind, "question changed behind"},
                                                   {Edit::kQuestionBefore, "question changed before"},
                                                   {Edit::kSubstitute1, "1 token substituted"},
                                                   {Edit::kSubstitute5Percent, "5 % substituted"},
                                                   {Edit::kInsert4, "4 tokens inserted"},
                                                   {Edit::kInsert16, "16 tokens inserted"},
                                                   {Edit::kAppend16, "16 tokens appended"},
                                                   {Edit::kMoved, "last third moved to front"},
                                                   {Edit::kSlid32, "window slid by 32"}};

struct Pair {
  std::vector<Ids> cached;
  Ids asked;
  std::size_t read_from = 0;  ///< first token of which an output of one vector a token is compared
};

/// Pair number `number` with about `tokens` tokens, and at most `cached` questions that are cached.
Pair make_pair(const std::vector<Text>& texts, std::size_t number, std::size_t tokens, Edit edit, std::size_t cached,
               std::int64_t begin, std::int64_t separator) {
  std::mt19937_64 random(number);
  const std::size_t start = number * 37 % texts.size();
  Ids body;
  std::size_t next = start;
  while (body.size() < tokens + 64) {
    const Ids& more = texts[next++ % texts.size()].passage;
    body.insert(body.end(), more.begin(), more.end());
  }
  const Ids& other = texts[(next + 5) % texts.size()].passage;  // text of its own
  const auto fresh = [&](std::size_t i) { return other[i % other.size()]; };
  const auto cut = [](const Ids& ids, std::size_t from, std::size_t count) {
    return Ids(ids.begin() + static_cast<std::ptrdiff_t>(from),
               ids.begin() + static_cast<std::ptrdiff_t>(from + count));
  };
  const auto framed = [&](const std::vector<Ids>& parts) {
    Ids all{begin};
    for (const Ids& part : parts) {
      all.insert(all.end(), part.begin(), part.end());
      all.push_back(separator);
    }
    return all;
  };
  const auto& questions = texts[start].questions;
  if (edit == Edit::kQuestionBehind || edit == Edit::kQuestionBefore) {
    std::size_t longest = 0;
    for (const Ids& question : questions) longest = std::max(longest, question.size());
    const Ids passage = cut(body, 0, tokens - 3 - longest);
    if (edit == Edit::kQuestionBefore) return {{framed({questions[0], passage})}, framed({questions[1], passage})};
    Pair pair{{}, framed({passage, questions.back()}), passage.size() + 2};
    for (std::size_t i = 0; i < std::min(cached, questions.size() - 1); ++i) {
      pair.cached.push_back(framed({passage, questions[i]}));
    }
    return pair;
  }
  const std::size_t n = tokens - 2;
  const Ids plain = cut(body, 0, n);
  Ids changed = plain;
  const auto insert = [&](std::size_t count) {
    const auto at = 1 + random() % (n - 2);
    for (std::size_t i = 0; i < count; ++i)
      changed.insert(changed.begin() + static_cast<std::ptrdiff_t>(at + i), fresh(i));
    changed.resize(n);  // the longest that the model takes
  };
  switch (edit) {
    case Edit::kSubstitute1:
      changed[random() % n] = fresh(0);
      break;
    case Edit::kSubstitute5Percent:
      for (std::size_t i = 0; i < n / 20; ++i) changed[random() % n] = fresh(i);
      break;
    case Edit::kInsert4:
      insert(4);
      break;
    case Edit::kInsert16:
      insert(16);
      break;
    case Edit::kAppend16:
      return {{framed({cut(body, 0, n - 16)})}, framed({plain})};
    case Edit::kMoved:
      std::rotate(changed.begin(), changed.begin() + static_cast<std::ptrdiff_t>(2 * n / 3), changed.end());
      break;
    default:
      return {{framed({plain})}, framed({cut(body, 32, n)})};
  }
  return {{framed({plain})}, framed({changed})};
}

class Bench {
 public:
  Bench(const std::string& path, const std::string& weights)
      : options_{.weights = weights_from_string(weights)}, model_(wrap_torchscript(torch::jit::load(path), options_)) {
    inputs_ = model_->input_spec();
    model_->describe(profile_);
    output_ = probe(*model_, inputs_, {}, profile_);
    self_check(*model_, inputs_, output_, profile_);
    reuse_ = reuse_in(BankFormat::kAsComputed);
  }

  const TokenReuse& reuse() const { return *reuse_; }

  /// What each format of the bank costs: hits of all formats take turns, and their times are compared pair by pair.
  void formats(const std::vector<Pair>& pairs, const TokenReuseSettings& settings, const std::string& name) {
    constexpr int kTurns = 9;
    const std::vector<BankFormat> all = {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16,
                                         BankFormat::kInt8};
    std::vector<std::unique_ptr<TokenReuse>> banks;
    for (const BankFormat format : all) banks.push_back(reuse_in(format));
    std::vector<std::vector<double>> ratios(all.size());
    std::vector<double> errors(all.size()), bytes(all.size());
    std::vector<at::Tensor> outputs;
    for (const Pair& pair : pairs) {
      const Batch now = batch(pair.asked);
      ForwardReport report;
      std::vector<std::vector<double>> ms(all.size());
      const auto full = vector_of(banks[0]->run(now, {}, {}, "", false, report).value, pair);
      outputs.push_back(full);
      for (std::size_t i = 0; i < banks.size(); ++i) {
        banks[i]->clear();
        for (const Ids& ids : pair.cached) banks[i]->keep(banks[i]->run(batch(ids), {}, {}, "", true, report).computed);
        bytes[i] += static_cast<double>(banks[i]->counters().bytes);
      }
      for (int turn = 0; turn < kTurns; ++turn) {
        for (std::size_t k = 0; k < banks.size(); ++k) {
          const std::size_t i = (k + static_cast<std::size_t>(turn)) % banks.size();
          at::Tensor got;
          ms[i].push_back(timed([&] {
            const auto matches = banks[i]->find(now, "");
            got = vector_of(banks[i]->run(now, matches, settings, "", false, report).value, pair);
          }));
          if (turn == 0) errors[i] += (full - got).norm().item<double>();
        }
      }
      for (std::size_t i = 0; i < banks.size(); ++i) ratios[i].push_back(median(ms[i]) / median(ms[0]));
    }
    const auto table = at::stack(outputs);
    const auto n = static_cast<double>(pairs.size());
    const double spread = at::cdist(table, table).sum().item<double>() / (n * (n - 1));
    for (std::size_t i = 0; i < all.size(); ++i) {
      fmt::print("{:<56} {:<12} time {:.3f}  bytes {:.3f}  error {:.4f}\n", name, to_string(all[i]), median(ratios[i]),
                 bytes[i] / bytes[0], errors[i] / n / spread);
    }
    std::fflush(stdout);
  }

  void run(const std::vector<Pair>& pairs, const TokenReuseSettings& settings, const std::string& name) {
    double cosine = 0, worst = 1, stale = 0, error = 0, fraction = 0, full_ms = 0, reuse_ms = 0;
    std::vector<at::Tensor> cached;
    for (const Pair& pair : pairs) {
      reuse_->clear();
      const Batch now = batch(pair.asked);
      ForwardReport report;
      for (const Ids& ids : pair.cached) {
        auto filled = reuse_->run(batch(ids), {}, {}, "", true, report);
        reuse_->keep(std::move(filled.computed));
        if (&ids == &pair.cached.back()) cached.push_back(vector_of(filled.value, pair));
      }
      at::Tensor full, reused;
      double least_full = 1e9, least_reuse = 1e9;
      for (int turn = 0; turn < 3; ++turn) {
        least_full = std::min(
            least_full, timed([&] { full = vector_of(reuse_->run(now, {}, {}, "", false, report).value, pair); }));
        least_reuse = std::min(least_reuse, timed([&] {
                                 const auto matches = reuse_->find(now, "");
                                 reused = vector_of(reuse_->run(now, matches, settings, "", false, report).value, pair);
                               }));
      }
      const double own = at::cosine_similarity(full, reused, 0).item<double>();
      cosine += own;
      worst = std::min(worst, own);
      stale += at::cosine_similarity(full, cached.back(), 0).item<double>();
      error += (full - reused).norm().item<double>();
      fraction += report.computed_fraction();
      full_ms += least_full;
      reuse_ms += least_reuse;
    }
    const auto all = at::stack(cached);
    const auto n = static_cast<double>(pairs.size());
    const double spread = at::cdist(all, all).sum().item<double>() / (n * (n - 1));
    fmt::print("{:<56} {:.4f} {:.4f} {:.4f} {:6.3f} {:6.3f} {:8.2f} {:8.2f} {:6.2f}\n", name, cosine / n, worst,
               stale / n, error / n / spread, fraction / n, full_ms / n, reuse_ms / n, full_ms / reuse_ms);
    std::fflush(stdout);
  }

 private:
  std::unique_ptr<TokenReuse> reuse_in(BankFormat format) const {
    const auto last = static_cast<std::int32_t>(model_->layers()) - 1;
    return std::make_unique<TokenReuse>(*model_, inputs_, output_, profile_,
                                        TokenReuseOptions{.kept_layers = {last}, .format = format},
                                        std::size_t{1} << 30);
  }

  static double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
  }

  /// Processor time of this thread, the only one that works: what other programs do does not count.
  static double processor_ms() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
  }

  template <class Call>
  static double timed(Call call) {
    const double start = processor_ms();
    call();
    return processor_ms() - start;
  }

  Batch batch(const Ids& ids) const {
    const auto row = at::tensor(ids, at::TensorOptions().dtype(at::kLong)).unsqueeze(0);
    Inputs given;
    for (std::size_t i = 0; i < inputs_.names.size(); ++i) {
      if (static_cast<int>(i) == profile_.ids_argument) {
        given.emplace_back(row);
      } else {
        given.emplace_back(static_cast<int>(i) == profile_.mask_argument ? at::ones_like(row) : at::zeros_like(row));
      }
    }
    return check_batch(given, inputs_, profile_, model_->device());
  }

  static at::Tensor vector_of(const c10::IValue& value, const Pair& pair) {
    if (!value.isTensor() || value.toTensor().dim() < 2)
      throw Failure("the model's output is not one tensor of vectors");
    auto row = value.toTensor()[0].to(at::kFloat);
    if (row.dim() == 2) row = row.slice(0, static_cast<std::int64_t>(pair.read_from)).mean(0);
    return row.clone();
  }

  Options options_;
  std::unique_ptr<Model> model_;
  InputSpec inputs_;
  ModelProfile profile_;
  OutputSpec output_;
  std::unique_ptr<TokenReuse> reuse_;
};

void run(const std::string& model, const std::string& tokens, std::size_t count, const std::string& weights) {
  const c10::InferenceMode no_grad;
  at::set_num_threads(1);
  std::int64_t begin = 0;
  std::int64_t separator = 0;
  const auto texts = read_texts(read_token_file(tokens), begin, separator);
  Bench bench(model, weights);
  const Machine machine = this_machine();
  fmt::print("{}, {} cores, 1 thread; {}; weights {}\n{}; {} pairs a line\n", machine.cpu, machine.cores, compiler(),
             weights, bench.reuse().output_positions().note, count);
  const auto pairs_of = [&](std::size_t length, Edit edit, std::size_t cached = 1) {
    std::vector<Pair> pairs;
    for (std::size_t i = 0; i < count; ++i)
      pairs.push_back(make_pair(texts, i, length, edit, cached, begin, separator));
    return pairs;
  };
  TokenReuseSettings settings{.max_edit_fraction = 1, .max_computed_fraction = 1};
  const bool per_token = bench.reuse().output_positions().read == OutputRead::kPerToken;
  for (const std::size_t length : {128, 256, 512}) {
    const Edit edit = per_token ? Edit::kQuestionBehind : Edit::kSubstitute1;
    bench.formats(pairs_of(length, edit), settings,
                  fmt::format("{} tokens, {}", length, kEdits[static_cast<std::size_t>(edit)].second));
  }
  fmt::print("{:<56} {:>6} {:>6} {:>6} {:>6} {:>6} {:>8} {:>8} {:>6}\n", "case", "cos", "worst", "stale", "error",
             "frac", "full", "reuse", "times");
  if (per_token) {
    for (const std::size_t length : {128, 256, 512}) {
      for (const std::int64_t samples : {0, 16}) {
        for (const std::size_t cached : {1, 8}) {
          auto other = settings;
          other.samples = samples;
          bench.run(pairs_of(length, Edit::kQuestionBehind, cached), other,
                    fmt::format("{} tokens, read at the question, {} cached, {} samples", length, cached, samples));
        }
      }
    }
    return;
  }
  for (const std::size_t length : {128, 256, 512}) {
    for (const auto& [edit, name] : kEdits) {
      bench.run(pairs_of(length, edit), settings, fmt::format("{} tokens, {}, 16 samples", length, name));
    }
  }
  const auto vary = [&](const TokenReuseSettings& other, const std::string& name) {
    for (const Edit edit : {Edit::kQuestionBehind, Edit::kSubstitute5Percent}) {
      const char* what = kEdits[static_cast<std::size_t>(edit)].second;
      bench.run(pairs_of(256, edit), other, fmt::format("256 tokens, {}, {}", what, name));
    }
  };
  bench.run(pairs_of(256, Edit::kQuestionBehind, 8), settings, "256 tokens, question changed behind, mean of 8");
  for (const std::int64_t samples : {0, 8, 32, 64}) {
    auto other = settings;
    other.samples = samples;
    vary(other, fmt::format("{} samples", samples));
  }
  auto other = settings;
  other.full_layers = 1;
  vary(other, "last layer in full");
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fputs("usage: llmcache-reuse-bench MODEL.pt TOKENS.safetensors [PAIRS] [WEIGHTS]\n", stderr);
    return 2;
  }
  try {
    const int count = argc > 3 ? std::stoi(argv[3]) : 16;
    if (count < 2) throw llmcache::bench::Failure("PAIRS is less than 2");
    llmcache::bench::run(argv[1], argv[2], static_cast<std::size_t>(count), argc > 4 ? argv[4] : "as-loaded");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-reuse-bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
