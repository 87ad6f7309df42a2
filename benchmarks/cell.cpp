#include "cell.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "calibration.h"
#include "equal_error.h"
#include "failure.h"
#include "generation.h"
#include "greedy.h"
#include "quality_metric.h"
#include "quality_score.h"
#include "quality_served.h"
#include "request_stream.h"
#include "variant.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kWarmUpRequests = 3;
constexpr double kWarmUpShare = 0.1;  // of the time budget
constexpr double kFillShare = 0.6;    // of the time budget; --help says so
constexpr std::size_t kPcaRows = 2000;
constexpr std::int64_t kPcaRequestsWithoutFill = 64;
constexpr std::int64_t kPcaComponents = 64;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// A variant and its measurements.
struct Lane {
  Setting setting;
  std::unique_ptr<Variant> variant;
  ServedCounts served;
  std::vector<double> latencies = {};    // ms, one a request
  std::vector<double> prefills = {};     // of these, until the first call was back
  double verify_ms = 0;                  // beside the latencies
  double tokens_computed = 0;            // padding included where it was computed
  std::int64_t tokens_reused = 0;        // of prompts
  std::int64_t tokens_shared = 0;        // the same
  std::vector<double> errors = {};       // one a sequence, in the metric of the budget, where one runs
  std::vector<double> divergences = {};  // one a request of which something came back, if nocache runs too
  std::vector<Sample> samples = {};      // one a request that can be scored
  std::vector<Sample> samples_per_byte = {};  // of choices, where the lengths are known
  std::optional<LastLogits> last = {};   // of the request before
  GreedyCount greedy = {};

  /// Computes what the model computes.
  [[nodiscard]] bool exact() const { return !setting.threshold && !setting.epsilon; }
  /// Asks for the outputs that the workload needs.
  [[nodiscard]] bool chooses_output() const { return setting.fidelity == "lossless" || setting.epsilon; }
};

class Cell {
 public:
  explicit Cell(const CellContext& context)
      : context_(context),
        model_(context.model),
        file_(context.file),
        tokens_(context.tokens),
        arguments_(context.arguments),
        budget_(context.budget_seconds),
        progress_(context.progress),
        stream_(make_stream(tokens_, {arguments_.shuffle, arguments_.zipf, arguments_.limit})),
        decoder_(reuses_prefixes(context)),
        probe_(probe()),
        scorer_(tokens_, model_.output_shape(), file_.vocabulary, probe_),
        calibration_(model_, tokens_, arguments_, probe_, decoder_, cut_at(), progress_) {}

  std::vector<Record> run() {
    say_what_is_cut();
    make_lanes();
    for (Lane& lane : lanes_) lane.variant->prepare(prepare(stream_.requests.front()));
    const auto start = Clock::now();
    warm_up(start);
    fill(start);
    for (Lane& lane : lanes_) lane.variant->start();
    const auto first = Clock::now();
    for (const std::int64_t number : stream_.requests) {
      // Stops where one more request would probably end behind the budget.
      const double mean_seconds = done_ == 0 ? 0 : seconds_since(first) / static_cast<double>(done_);
      if (done_ > 0 && seconds_since(start) + mean_seconds > budget_) break;
      measure(prepare(number));
      progress_.update(std::max(seconds_since(start) / budget_,
                                static_cast<double>(done_) / static_cast<double>(stream_.requests.size())));
    }
    std::vector<Record> records;
    for (const Lane& lane : lanes_) records.push_back(record(lane));
    return records;
  }

 private:
  [[nodiscard]] std::int64_t cut_at() const {
    return file_.max_tokens > 0 ? file_.max_tokens : std::numeric_limits<std::int64_t>::max();
  }

  void say_what_is_cut() {
    std::int64_t cut = 0;
    for (std::int64_t i = 0; i < tokens_.sequences(); ++i) {
      cut += static_cast<std::int64_t>(tokens_.sequence(i).size()) > cut_at() ? 1 : 0;
    }
    if (cut > 0) {
      progress_.note(fmt::format("note: {}: {} of {} sequences are longer than the {} tokens of {} and are cut",
                                 tokens_.workload, cut, tokens_.sequences(), file_.max_tokens, file_.name));
    }
  }

  [[nodiscard]] std::optional<Probe> probe() {
    if (tokens_.task != Task::kClassification || file_.random_weights()) return std::nullopt;
    if (model_.output_shape().pooled_output < 0) return std::nullopt;
    auto found = find_probe(arguments_.data_folder, tokens_, file_);
    if (!found) {
      progress_.note(fmt::format("note: {}: no file {}, so no accuracy; fit a probe", tokens_.workload,
                                 probe_path(arguments_.data_folder, tokens_.workload, file_.name).string()));
    }
    return found;
  }

  /// Errors of random weights mean nothing, and without a training part there is nothing to calibrate on.
  [[nodiscard]] bool budget() const {
    const bool answers = decoder_ ? model_.output_shape().logits_output >= 0 : model_.output_shape().pooled_output >= 0;
    const bool possible =
        !file_.random_weights() && answers && (tokens_.fill_requests > 0 || arguments_.calibration != "auto");
    if (!possible && arguments_.budget_asked) {
      progress_.note(
          fmt::format("note: {} on {}: no fidelity budget: it takes trained weights, a pooled output and a "
                      "training part",
                      file_.name, tokens_.workload));
    }
    return possible;
  }

  [[nodiscard]] bool quality() const {
    return !file_.random_weights() &&
           (scorer_.metric() || tokens_.task == Task::kDuplicates || tokens_.task == Task::kAnswer);
  }

  [[nodiscard]] Request prepare(std::int64_t number) const {
    Request request{.number = number,
                    .first_sequence = tokens_.first_sequence(number),
                    .rows = tokens_.request(number, cut_at()),
                    .inputs = {}};
    std::size_t width = 0;
    for (const auto& row : request.rows) {
      request.tokens += static_cast<std::int64_t>(row.size());
      width = std::max(width, row.size());
    }
    request.padded = static_cast<std::int64_t>(width * request.rows.size());
    request.inputs = model_.inputs(request.rows, tokens_.pools(number, cut_at()));
    add_calls(request);
    return request;
  }

  /// By which calls the exact variants run it: `output_` says which, where nothing is in the way.
  void add_calls(Request& request) const {
    const auto whole = [&](Output output) { request.calls.push_back({request.rows, request.inputs, output}); };
    if (output_ != "last+new") return whole(output_from_string(output_));
    if (request.rows.size() > 1) return whole(Output::kNewTokens);
    // A prompt, and what is scored behind it, if anything is.
    const TokenRange scored = tokens_.scored[static_cast<std::size_t>(request.first_sequence)];
    const auto length = static_cast<std::int64_t>(request.rows[0].size());
    if (scored.begin >= std::min(scored.end, length)) return whole(Output::kLastToken);
    const Rows prompt = {request.rows[0].first(static_cast<std::size_t>(scored.begin))};
    request.calls.push_back({prompt, model_.inputs(prompt), Output::kLastToken});
    whole(Output::kNewTokens);
  }

  /// What is asked of the exact variants: --output, or what the task needs.
  [[nodiscard]] std::string choose_output() const {
    if (arguments_.output) return *arguments_.output;
    if (!decoder_) return "all";
    switch (tokens_.task) {
      case Task::kChoice:
      case Task::kPerplexity:
        return "new";
      case Task::kAnswer:
        return tokens_.scored.empty() ? "last" : "last+new";
      default:
        return "last";
    }
  }

  void make_lanes() {
    auto all = settings(arguments_, {.quality = quality(), .prefix_reuse = decoder_, .budget = budget()});
    if (all.empty()) {
      throw Failure("nothing to run: --mode leaves no setting where quality cannot be measured; name --fidelity too");
    }
    observes_errors_ = std::any_of(all.begin(), all.end(), [](const Setting& s) { return s.epsilon.has_value(); });
    output_ = choose_output();
    fingerprint_.kind = fingerprint_kind_from_string(arguments_.fingerprint);
    fingerprint_.centring = arguments_.centre ? Centring::kRunning : Centring::kOff;
    const bool similar =
        std::any_of(all.begin(), all.end(), [](const Setting& s) { return s.threshold.has_value() || s.equal_error; });
    if (similar && fingerprint_.kind == FingerprintKind::kPca) fingerprint_.pca = pca();
    for (Setting& setting : all) {
      if (setting.equal_error) setting.threshold = threshold_for(*setting.equal_error, setting);
      auto variant = make_variant(setting, {model_, arguments_, tokens_, fingerprint_, &calibration_});
      lanes_.push_back({.setting = setting, .variant = std::move(variant), .served = ServedCounts(tokens_)});
    }
  }

  /// The similarity from which on the paper's mode makes this error.
  [[nodiscard]] double threshold_for(double epsilon, Setting setting) {
    auto& nearest = nearest_[setting.weights];
    if (nearest.empty()) {
      setting.threshold = -1;
      nearest = nearest_answers(model_, tokens_, cut_at(), calibration_,
                                cache_options(setting, arguments_, fingerprint_, model_.cache().profile().layers));
    }
    const double threshold = threshold_within(nearest, epsilon);
    progress_.note(
        fmt::format("note: {}: fidelity threshold has an error of {} on the training part from a similarity "
                    "of {:.4f} on",
                    tokens_.workload, epsilon, threshold));
    return threshold;
  }

  /// Read from --pca, or fitted on the states of the fill part, or of the first requests without one.
  [[nodiscard]] std::shared_ptr<const PcaModel> pca() {
    Cache& cache = model_.cache();
    const std::int64_t dims = cache.profile().hidden;
    const std::string digest = fmt::format("{} state {}", cache.profile().digest, arguments_.fingerprint_layer);
    if (arguments_.pca && std::filesystem::exists(*arguments_.pca)) {
      return std::make_shared<const PcaModel>(PcaModel::load(*arguments_.pca, digest, dims));
    }
    std::vector<float> rows;
    std::size_t count = 0;
    const std::int64_t end =
        tokens_.fill_requests > 0 ? tokens_.fill_requests : std::min(tokens_.requests(), kPcaRequestsWithoutFill);
    for (std::int64_t number = 0; number < end && count < kPcaRows; ++number) {
      for (const auto& state : cache.pooled_state(prepare(number).inputs, arguments_.fingerprint_layer)) {
        rows.insert(rows.end(), state.begin(), state.end());
        ++count;
      }
    }
    const std::int64_t components = std::min({kPcaComponents, dims, static_cast<std::int64_t>(count) - 1});
    auto model = std::make_shared<const PcaModel>(PcaModel::fit(rows, dims, components));
    if (arguments_.pca) model->save(*arguments_.pca, digest);
    return model;
  }

  /// The first requests, through all variants. Each starts with an empty cache, and none is left in it.
  void warm_up(Clock::time_point start) {
    for (std::size_t i = 0; i < std::min(kWarmUpRequests, stream_.requests.size()); ++i) {
      if (i > 0 && seconds_since(start) > kWarmUpShare * budget_) break;
      const Request request = prepare(stream_.requests[i]);
      for (Lane& lane : lanes_) {
        lane.variant->clear();
        lane.variant->begin();
        lane.variant->run(request);
      }
    }
    for (Lane& lane : lanes_) lane.variant->clear();
  }

  /// Bytes of a sequence's ids.
  [[nodiscard]] std::string_view key(std::int64_t sequence) const {
    const auto ids = tokens_.sequence(sequence);
    return {reinterpret_cast<const char*>(ids.data()), ids.size_bytes()};
  }

  /// The fill part, untimed, through all variants request by request, so that all are filled alike.
  void fill(Clock::time_point start) {
    const bool all_identical =
        std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.variant->identical_only(); });
    std::unordered_set<std::string_view> asked;
    for (const std::int64_t number : stream_.requests) {
      for (std::int64_t s = tokens_.first_sequence(number); s < tokens_.first_sequence(number + 1); ++s) {
        asked.insert(key(s));
      }
    }
    for (std::int64_t number = 0; number < tokens_.fill_requests; ++number) {
      if (number > 0 && seconds_since(start) > kFillShare * budget_) break;
      bool common = false;
      for (std::int64_t s = tokens_.first_sequence(number); s < tokens_.first_sequence(number + 1); ++s) {
        common = common || asked.contains(key(s));
      }
      ++filled_;
      if (all_identical && !common) continue;
      const Request request = prepare(number);
      std::optional<c10::IValue> output;
      std::optional<std::vector<std::vector<float>>> states;
      const FillRun run{.output = [&]() -> const c10::IValue& {
                          if (!output) output = model_.plain(request.inputs);
                          return *output;
                        },
                        .states = [&]() -> const std::vector<std::vector<float>>& {
                          if (!states)
                            states = model_.cache().pooled_state(request.inputs, arguments_.fingerprint_layer);
                          return *states;
                        }};
      for (Lane& lane : lanes_) {
        if (common || !lane.variant->identical_only()) lane.variant->fill(request, run);
      }
      progress_.update(seconds_since(start) / budget_);
    }
    if (filled_ < tokens_.fill_requests) {
      progress_.note(fmt::format("note: {} on {}: {} of {} requests were filled in {:.0f} % of the time budget",
                                 file_.name, tokens_.workload, filled_, tokens_.fill_requests, 100 * kFillShare));
    }
  }

  /// Runs the request in every lane, the first one a place further on from request to request.
  void measure(const Request& request) {
    std::vector<Run> runs(lanes_.size());
    std::vector<TokenScores> scores(lanes_.size());
    std::optional<std::size_t> plain;
    const auto compare_with_plain = [&](std::size_t i) {
      compare_outputs(request, runs[*plain].returned.front(), runs[i].returned, lanes_[i]);
      if (i != *plain) runs[i].returned.clear();  // logits are large
    };
    for (std::size_t turn = 0; turn < lanes_.size(); ++turn) {
      const std::size_t i = (turn + static_cast<std::size_t>(done_)) % lanes_.size();
      Lane& lane = lanes_[i];
      lane.variant->begin();
      runs[i] = lane.variant->run(request);
      count(request, runs[i], lane);
      if (!file_.random_weights()) scores[i] = score(request, runs[i], lane);
      if (lane.setting.mode == "nocache") {
        plain = i;
        for (std::size_t earlier = 0; earlier < turn; ++earlier) {
          compare_with_plain((earlier + static_cast<std::size_t>(done_)) % lanes_.size());
        }
      }
      if (plain) compare_with_plain(i);
    }
    if (!file_.random_weights() && scorer_.reads_logits()) {
      std::vector<TokenScores*> all;
      for (TokenScores& one : scores) all.push_back(&one);
      keep_common(all);
      for (std::size_t i = 0; i < lanes_.size(); ++i) {
        if (const auto sample = scorer_.sample(request.number, request.rows, scores[i])) {
          lanes_[i].samples.push_back(*sample);
          if (const auto other = scorer_.sample_per_byte(request.number, scores[i])) {
            lanes_[i].samples_per_byte.push_back(*other);
          }
        }
      }
    }
    ++done_;
    sequences_ += static_cast<std::int64_t>(request.rows.size());
    real_tokens_ += request.tokens;
    for (const auto& row : request.calls.front().rows) prompt_tokens_ += static_cast<std::int64_t>(row.size());
  }

  void count(const Request& request, const Run& run, Lane& lane) const {
    lane.latencies.push_back(run.total_ms());
    lane.prefills.push_back(run.ms.front());
    lane.verify_ms += run.verify_ms;
    lane.tokens_computed += run.tokens_computed;
    lane.tokens_reused += run.tokens_reused;
    lane.tokens_shared += run.tokens_shared;
    if (file_.random_weights()) return;
    for (std::size_t row = 0; row < run.served_from.size(); ++row) {
      lane.served.add(request.number, request.first_sequence + static_cast<std::int64_t>(row), run.served_from[row]);
    }
  }

  /// Scores what needs no other lane; otherwise returns the scores of single tokens.
  [[nodiscard]] TokenScores score(const Request& request, const Run& run, Lane& lane) const {
    if (!scorer_.reads_logits()) {
      if (const auto sample = scorer_.score(request.number, request.rows, run.returned.front().output)) {
        lane.samples.push_back(*sample);
      }
      return {};
    }
    TokenScores scores =
        scorer_.token_scores(request.number, request.rows, run.returned, lane.last ? &*lane.last : nullptr);
    if (tokens_.task != Task::kPerplexity || request.rows.size() != 1) return scores;
    // A document that grows goes on where it was: its next token is predicted by the last logits.
    lane.last.reset();
    const Returned& call = run.returned.back();
    const auto [begin, end] = call.tokens[0];
    if (begin < end) {
      lane.last =
          LastLogits{.ids = {request.rows[0].begin(), request.rows[0].end()},
                     .logits = tensor_of(call.output, model_.output_shape().logits_output)[0][end - 1 - begin].clone()};
    }
    return scores;
  }

  void compare_outputs(const Request& request, const Returned& plain, const std::vector<Returned>& others,
                       Lane& lane) const {
    const double divergence = model_.divergence(plain.output, others);
    if (!std::isnan(divergence)) lane.divergences.push_back(divergence);
    if (observes_errors_ && !lane.exact()) {
      const auto errors = calibration_.errors(others.front(), plain);
      lane.errors.insert(lane.errors.end(), errors.begin(), errors.end());
    }
    if (!compares_greedy(lane)) return;
    const at::Tensor expected = tensor_of(plain.output, model_.output_shape().logits_output);
    for (const Returned& call : others) {
      const at::Tensor found = tensor_of(call.output, model_.output_shape().logits_output);
      for (std::size_t row = 0; row < call.tokens.size(); ++row) {
        const auto [begin, end] = call.tokens[row];
        if (begin == end) continue;
        const auto r = static_cast<std::int64_t>(row);
        lane.greedy.compare(request.first_sequence + r, begin + 1, expected[r].narrow(0, begin, end - begin),
                            found[r].narrow(0, 0, end - begin));
      }
    }
  }

  [[nodiscard]] bool compares_greedy(const Lane& lane) const {
    const OutputShape& shape = model_.output_shape();
    return decoder_ && lane.exact() && lane.setting.mode != "nocache" && shape.logits_output >= 0 &&
           file_.vocabulary > 0 && shape.logits_dims >= file_.vocabulary;
  }

  [[nodiscard]] const Lane* plain_lane() const {
    const auto found =
        std::find_if(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.setting.mode == "nocache"; });
    return found == lanes_.end() ? nullptr : &*found;
  }

  [[nodiscard]] const Lane* kvcache_lane(const Lane& lane) const {
    const auto found = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& other) {
      return other.setting.mode == "kvcache" && other.setting.weights == lane.setting.weights;
    });
    return found == lanes_.end() ? nullptr : &*found;
  }

  [[nodiscard]] Record record(const Lane& lane) const {
    Record r = record_of(context_, stream_, lane.setting);
    if (lane.chooses_output()) r.output = output_;
    r.requests = done_;
    r.sequences = sequences_;
    r.tokens = real_tokens_;
    r.tokens_computed_fraction = lane.tokens_computed / static_cast<double>(real_tokens_);
    r.latency_ms = summarize(lane.latencies);
    r.verification_ms = lane.verify_ms;
    const Lane* plain = plain_lane();
    if (plain != nullptr) {
      std::vector<double> ratios;
      for (std::size_t i = 0; i < lane.latencies.size(); ++i) ratios.push_back(plain->latencies[i] / lane.latencies[i]);
      r.speedup_vs_nocache = ratio_of_sums(plain->latencies, lane.latencies);
      r.speedup_median = median(std::move(ratios));
      r.divergence = summarize(lane.divergences);
    }
    if (decoder_ && (lane.exact() || lane.setting.epsilon)) {
      const Lane* kvcache = kvcache_lane(lane);
      r.prefill_ms = summarize(lane.prefills);
      if (plain != nullptr) r.prefill_speedup_vs_nocache = ratio_of_sums(plain->prefills, lane.prefills);
      if (kvcache != nullptr) {
        r.speedup_vs_kvcache = ratio_of_sums(kvcache->latencies, lane.latencies);
        r.prefill_speedup_vs_kvcache = ratio_of_sums(kvcache->prefills, lane.prefills);
      }
      if (lane.chooses_output()) {
        r.tokens_reused_fraction = static_cast<double>(lane.tokens_reused) / static_cast<double>(prompt_tokens_);
        r.tokens_shared_fraction = static_cast<double>(lane.tokens_shared) / static_cast<double>(prompt_tokens_);
      }
      if (plain != nullptr && compares_greedy(lane)) r.greedy = lane.greedy.result();
    }
    lane.variant->describe(r);
    if (!lane.errors.empty()) r.observed_error = observed(lane.errors);
    if (lane.setting.mode != "nocache" && lane.setting.mode != "kvcache") r.filled = filled_;
    if (!file_.random_weights()) judge(lane, r);
    if (plain != nullptr && r.speedup_vs_nocache < 1) r.note = why_slower(r, plain->latencies);
    return r;
  }

  [[nodiscard]] static std::string why_slower(const Record& r, const std::vector<double>& plain) {
    const double cost = r.latency_ms.mean - mean(plain);
    const double tokens = static_cast<double>(r.tokens) / static_cast<double>(r.requests);
    const bool hits = r.hit_rate > 0 || r.tokens_reused_fraction > 0;
    return fmt::format("{}: {:.2f} ms a request of {:.0f} tokens, which the model takes {:.1f} ms for",
                       hits ? "hits save less than looking up and keeping costs"
                            : "nothing repeats, so what is left is the cost of looking up and keeping",
                       cost, tokens, mean(plain));
  }

  /// Wilson's interval of a share of errors; of other errors the normal one of their mean.
  [[nodiscard]] ObservedError observed(const std::vector<double>& errors) const {
    const auto n = static_cast<std::int64_t>(errors.size());
    const double value = mean(errors);
    if (calibration_.metric() != BudgetMetric::kRelativeError) {
      return {value, wilson(std::llround(value * static_cast<double>(n)), n), n};
    }
    double squares = 0;
    for (const double error : errors) squares += (error - value) * (error - value);
    const double half = 1.96 * std::sqrt(squares) / static_cast<double>(n);
    return {value, {std::max(0.0, value - half), value + half}, n};
  }

  void judge(const Lane& lane, Record& r) const {
    const Lane* plain = plain_lane();
    const auto result = [&](Metric metric, std::vector<Sample> Lane::*samples) {
      const Comparison c = compare(metric, lane.*samples, plain != nullptr ? plain->*samples : std::vector<Sample>{});
      return TaskResult{
          .metric = to_string(metric), .value = c.value, .baseline = c.baseline, .change = c.change, .ci95 = c.ci95};
    };
    if (const auto metric = scorer_.metric(); metric && !lane.samples.empty()) r.task = result(*metric, &Lane::samples);
    if (!lane.samples_per_byte.empty()) {
      r.task_per_byte = result(Metric::kChoiceAccuracyPerByte, &Lane::samples_per_byte);
    }
    if (lane.setting.mode == "nocache" || lane.setting.mode == "kvcache") return;
    if (tokens_.task == Task::kDuplicates) {
      r.task = {.metric = "precision", .value = lane.served.precision()};
      r.recall = lane.served.recall();
      r.unsafe_served = {.rate = lane.served.unsafe(), .unlabelled = lane.served.unlabelled()};
    }
    if (tokens_.task == Task::kAnswer) r.same_answer = lane.served.same_answer();
  }

  const CellContext& context_;
  LoadedModel& model_;
  const ModelFile& file_;
  const TokenFile& tokens_;
  const Arguments& arguments_;
  const double budget_;
  Progress& progress_;
  const Stream stream_;
  const bool decoder_;
  const std::optional<Probe> probe_;
  const Scorer scorer_;
  Calibration calibration_;
  std::map<std::string, std::vector<Nearest>> nearest_;  // by how weights are held
  bool observes_errors_ = false;
  std::string output_;
  FingerprintOptions fingerprint_;
  std::vector<Lane> lanes_;
  std::int64_t filled_ = 0;
  std::int64_t done_ = 0;
  std::int64_t sequences_ = 0;
  std::int64_t real_tokens_ = 0;
  std::int64_t prompt_tokens_ = 0;
};

}  // namespace

std::vector<Record> run_cell(const CellContext& context) {
  if (context.tokens.task == Task::kGeneration) return run_generation(context);
  return Cell(context).run();
}

bool reuses_prefixes(const CellContext& context) {
  const bool reuses = context.model.wrapped() && context.model.cache().profile().prefix_reuse;
  if (context.arguments.kvcache_asked && !reuses) {
    throw Failure(fmt::format(
        "mode kvcache is for causal models that can go on behind keys and values that are kept; {} {}",
        context.file.name,
        context.model.cache().profile().causal ? "was not verified to do so, see llmcache-inspect" : "is not causal"));
  }
  return reuses;
}

Record record_of(const CellContext& context, const Stream& stream, const Setting& setting) {
  Record r;
  r.model = context.file.name;
  r.weights = context.file.weights;
  r.workload = context.tokens.workload;
  r.mode = setting.mode;
  r.threads = context.arguments.threads;
  r.requests_available = static_cast<std::int64_t>(stream.requests.size());
  r.fill_available = context.tokens.fill_requests;
  r.zipf = stream.zipf;
  r.shuffle = stream.shuffle;
  r.source = context.tokens.source;
  r.model_torch = context.file.torch_version;
  r.model_transformers = context.file.transformers_version;
  return r;
}

double ratio_of_sums(const std::vector<double>& one, const std::vector<double>& other) {
  return mean(one) * static_cast<double>(one.size()) / (mean(other) * static_cast<double>(other.size()));
}

}  // namespace llmcache::bench
