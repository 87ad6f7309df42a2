#include "experiment.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <unordered_set>

#include "conversation.h"
#include "llmcache/version.h"
#include "run.h"
#include "selection.h"
#include "setup.h"

namespace llmcache::bench {
namespace {

constexpr std::size_t kWarmUpRequests = 3;
constexpr double kWarmUpShare = 0.1;  // of the time
constexpr double kFillShare = 0.6;    // of the time; README.md says so

/// A request of the token file, ready to run.
struct Request {
  std::int64_t number = 0;
  Call whole = {};                ///< all at once, everything comes back
  std::vector<Call> chosen = {};  ///< how a run that chooses its output asks: at once, or a prompt and then the whole
};

class RunLoop {
 public:
  explicit RunLoop(const ExperimentContext& context)
      : context_(context),
        model_(context.model),
        tokens_(context.tokens),
        settings_(context.settings),
        stream_(make_stream(tokens_, {settings_.shuffle, settings_.limit})),
        setup_(context) {
    if (setup_.generates()) conversations_.emplace(context);
  }

  std::vector<Record> run() {
    const at::NoGradGuard no_grad;
    say_what_is_cut();
    runs_ = setup_.make_runs();
    observes_errors_ = std::ranges::any_of(runs_, [](const Run& run) { return run.config.epsilon.has_value(); });
    start_ = Clock::now();
    warm_up();
    fill();
    for (Run& run : runs_) run.system->start();
    send_all();
    if (conversations_ && conversations_->shortened() > 0) {
      context_.note("{}: {} conversations ended early, at the {} tokens of {}", tokens_.workload,
                    conversations_->shortened(), context_.file.max_tokens, context_.file.name);
    }
    std::vector<Record> records;
    for (const Run& run : runs_) records.push_back(record_of(run, runs_, setup_, record()));
    return records;
  }

 private:
  void say_what_is_cut() const {
    if (conversations_) return;
    std::int64_t cut = 0;
    for (std::int64_t i = 0; i < tokens_.sequences(); ++i) {
      cut += std::ssize(tokens_.sequence(i)) > context_.cut() ? 1 : 0;
    }
    if (cut == 0) return;
    context_.note("{}: {} of {} sequences are longer than the {} tokens of {} and are cut", tokens_.workload, cut,
                  tokens_.sequences(), context_.file.max_tokens, context_.file.name);
  }

  // --- requests

  [[nodiscard]] Request request(std::int64_t number) const {
    Request request{.number = number};
    Call& whole = request.whole;
    whole.rows = tokens_.request(number, context_.cut());
    whole.marks = tokens_.marks(number, context_.cut());
    whole.inputs = context_.inputs(number);
    whole.first_sequence = tokens_.first_sequence(number);
    Call last = whole;
    last.output = output_ == "last+new" ? Output::kNewTokens : output_from_string(output_);
    if (output_ == "last+new" && whole.rows.size() == 1) {
      // A prompt, and what is scored behind it, if anything is.
      const TokenRange scored = tokens_.scored[static_cast<std::size_t>(whole.first_sequence)];
      if (scored.begin < std::min(scored.end, std::int64_t{std::ssize(whole.rows[0])})) {
        Call& prompt = request.chosen.emplace_back(whole);
        prompt.rows = {whole.rows[0].first(static_cast<std::size_t>(scored.begin))};
        prompt.marks.clear();
        prompt.inputs = model_.inputs(prompt.rows);
        prompt.output = Output::kLastToken;
      } else {
        last.output = Output::kLastToken;
      }
    }
    request.chosen.push_back(std::move(last));
    return request;
  }

  /// The first requests, in all runs. Each starts with an empty cache, and none is left in it.
  void warm_up() {
    for (std::size_t i = 0; i < std::min(kWarmUpRequests, stream_.requests.size()); ++i) {
      if (i > 0 && (conversations_ || seconds_since(start_) > kWarmUpShare * context_.seconds)) break;
      for (Run& run : runs_) {
        run.system->clear();
        if (conversations_) conversations_->warm_up(run, stream_.requests[i]);
        if (!conversations_) answer(run, request(stream_.requests[i]));
        run.system->clear();
      }
    }
  }

  /// Bytes of the ids of each sequence of a request.
  [[nodiscard]] std::vector<std::string_view> keys(std::int64_t request) const {
    std::vector<std::string_view> keys;
    for (const auto& ids : tokens_.request(request, std::numeric_limits<std::int64_t>::max())) {
      keys.emplace_back(reinterpret_cast<const char*>(ids.data()), ids.size_bytes());
    }
    return keys;
  }

  /// The fill part, untimed, in all runs request by request, so that all are filled alike.
  void fill() {
    std::unordered_set<std::string_view> asked;
    for (const std::int64_t number : stream_.requests) {
      for (const auto key : keys(number)) asked.insert(key);
    }
    for (std::int64_t number = 0; number < tokens_.fill_requests; ++number, ++filled_) {
      if (number > 0 && seconds_since(start_) > kFillShare * context_.seconds) break;
      fill_with(number, std::ranges::any_of(keys(number), [&](auto key) { return asked.contains(key); }));
      context_.progress.update(seconds_since(start_) / context_.seconds);
    }
    if (filled_ == tokens_.fill_requests) return;
    context_.note("{} on {}: {} of {} requests were filled in {:.0f} % of the time", context_.file.name,
                  tokens_.workload, filled_, tokens_.fill_requests, 100 * kFillShare);
  }

  /// `common`: one of its sequences will be asked.
  void fill_with(std::int64_t number, bool common) {
    const auto wants = [&](const Run& run) { return common || !run.system->identical_only(); };
    if (std::ranges::none_of(runs_, wants)) return;
    const Request filling = request(number);
    FillValues values;
    for (Run& run : runs_) {
      if (wants(run)) run.system->fill(filling.whole, values);
    }
  }

  // --- the loop

  void send_all() {
    const auto first = Clock::now();
    for (const std::int64_t number : stream_.requests) {
      // Stops where one more request would probably end behind the time.
      if (done_ > 0 && seconds_since(start_) + next_seconds(seconds_since(first)) > context_.seconds) break;
      const std::size_t begin = static_cast<std::size_t>(done_) % runs_.size();
      if (conversations_) conversations_->hold(number, runs_, begin);
      if (!conversations_) send(request(number), begin);
      ++done_;
      context_.progress.update(std::max(seconds_since(start_) / context_.seconds,
                                        static_cast<double>(done_) / static_cast<double>(stream_.requests.size())));
    }
  }

  /// What one more request would probably take: where nocache has had its share of the time, the others alone.
  [[nodiscard]] double next_seconds(double so_far) const {
    const bool alone = conversations_ && conversations_->plain_is_done();
    return (so_far - (alone ? conversations_->plain_seconds() : 0)) / static_cast<double>(done_);
  }

  static std::vector<Answer> answer(Run& run, const Request& request) {
    run.system->begin();
    if (!run.config.chooses_output()) return {run.system->run(request.whole)};
    std::vector<Answer> answers;
    for (const Call& call : request.chosen) answers.push_back(run.system->run(call));
    return answers;
  }

  /// Answers the request in every run, `first` before the others.
  void send(const Request& request, std::size_t first) {
    std::vector<std::vector<Answer>> answers(runs_.size());
    std::vector<TokenScores> scores(runs_.size());
    std::vector<std::size_t> waiting;  // to be compared with the plain answer
    const Answer* plain = nullptr;
    for (std::size_t place = 0; place < runs_.size(); ++place) {
      const std::size_t i = (first + place) % runs_.size();
      Run& run = runs_[i];
      answers[i] = answer(run, request);
      count(request, answers[i], run);
      if (setup_.judged()) scores[i] = score(request, answers[i], run);
      waiting.push_back(i);
      if (run.config.mode == "nocache") plain = &answers[i].front();
      if (plain == nullptr) continue;
      for (const std::size_t other : waiting) {
        compare(request, *plain, answers[other], runs_[other]);
        if (&answers[other].front() != plain) answers[other].clear();  // logits are large
      }
      waiting.clear();
    }
    if (!setup_.judged() || !setup_.scorer().reads_logits()) return;
    std::vector<TokenScores*> all;
    for (TokenScores& one : scores) all.push_back(&one);
    keep_common(all);
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      runs_[i].keep(setup_.scorer().scores(request.number, request.whole.rows, scores[i]));
    }
  }

  void count(const Request& request, const std::vector<Answer>& answers, Run& run) const {
    run.count(answers, run.config.chooses_output() ? request.chosen.front() : request.whole, 0);
    double latency = 0;
    for (const Answer& answer : answers) latency += answer.ms;
    run.latencies.push_back(latency);
    run.tokens += tokens_of(request.whole.rows);
    if (!setup_.judged()) return;
    std::int64_t sequence = request.whole.first_sequence;
    for (const std::int64_t from : answers.front().served_from) run.served.add(request.number, sequence++, from);
  }

  static std::vector<Returned> returned(const std::vector<Answer>& answers) {
    std::vector<Returned> all;
    for (const Answer& answer : answers) all.push_back(answer.returned);
    return all;
  }

  /// Scores what needs no other run; otherwise returns the scores of single tokens.
  [[nodiscard]] TokenScores score(const Request& request, const std::vector<Answer>& answers, Run& run) const {
    const Rows& rows = request.whole.rows;
    if (!setup_.scorer().reads_logits()) {
      run.keep(setup_.scorer().score(request.number, rows, answers.front().returned.output));
      return {};
    }
    TokenScores scores =
        setup_.scorer().token_scores(request.number, rows, returned(answers), run.last ? &*run.last : nullptr);
    if (tokens_.task != Task::kPerplexity || rows.size() != 1) return scores;
    // A document that grows goes on where it was: its next token is predicted by the last logits.
    run.last.reset();
    const Returned& call = answers.back().returned;
    const auto [begin, end] = call.tokens[0];
    if (begin == end) return scores;
    const at::Tensor logits = tensor_of(call.output, model_.output_shape().logits_output)[0];
    run.last = LastLogits{.ids = {rows[0].begin(), rows[0].end()}, .logits = logits[end - 1 - begin].clone()};
    return scores;
  }

  void compare(const Request& request, const Answer& plain, const std::vector<Answer>& answers, Run& run) const {
    const auto others = returned(answers);
    const double divergence = model_.divergence(plain.returned.output, others);
    if (!std::isnan(divergence)) run.divergences.push_back(divergence);
    if (observes_errors_ && !run.config.exact()) {
      const auto errors = setup_.calibration().errors(others.front(), plain.returned);
      run.errors.insert(run.errors.end(), errors.begin(), errors.end());
    }
    if (!setup_.compares_greedy() || !run.config.exact() || run.config.mode == "nocache") return;
    const at::Tensor expected = tensor_of(plain.returned.output, model_.output_shape().logits_output);
    for (const Returned& call : others) {
      const at::Tensor found = tensor_of(call.output, model_.output_shape().logits_output);
      for (std::size_t row = 0; row < call.tokens.size(); ++row) {
        const auto [begin, end] = call.tokens[row];
        if (begin == end) continue;
        const auto r = static_cast<std::int64_t>(row);
        run.greedy.compare(request.whole.first_sequence + r, begin + 1, expected[r].slice(0, begin, end),
                           found[r].slice(0, 0, end - begin));
      }
    }
  }

  // --- results

  /// What is the same of all runs.
  [[nodiscard]] Record record() const {
    Record r;
    r.model = context_.file.name;
    r.weights = context_.file.weights;
    r.workload = tokens_.workload;
    r.weights_sample = settings_.weights_sample;
    r.threads = settings_.threads;
    r.requests_available = std::ssize(stream_.requests);
    r.filled = filled_;
    r.fill_available = tokens_.fill_requests;
    r.shuffle = stream_.shuffle;
    r.source = tokens_.source;
    r.versions = {LLMCACHE_VERSION, TORCH_VERSION, compiler(), context_.file.torch_version,
                  context_.file.transformers_version};
    return r;
  }

  const ExperimentContext& context_;
  LoadedModel& model_;
  const TokenFile& tokens_;
  const Settings& settings_;
  const Stream stream_;
  Setup setup_;
  const std::string output_ = setup_.output();
  std::optional<Conversations> conversations_;  ///< where text is generated
  std::vector<Run> runs_;
  bool observes_errors_ = false;  ///< a budget says what an error is
  Clock::time_point start_;
  std::int64_t filled_ = 0;
  std::int64_t done_ = 0;
};

}  // namespace

std::vector<Record> run_experiment(const ExperimentContext& context) { return RunLoop(context).run(); }

}  // namespace llmcache::bench
