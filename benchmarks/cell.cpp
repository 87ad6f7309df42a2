#include "cell.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "failure.h"
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
  std::vector<double> latencies;    // ms, one a request
  double tokens_computed = 0;       // padding included where it was computed
  std::vector<double> divergences;  // one a request, if nocache runs too
  std::vector<Sample> samples;      // one a request that can be scored
  ServedCounts served;
};

class Cell {
 public:
  explicit Cell(const CellContext& context)
      : model_(context.model),
        file_(context.file),
        tokens_(context.tokens),
        arguments_(context.arguments),
        budget_(context.budget_seconds),
        progress_(context.progress),
        stream_(make_stream(tokens_, {arguments_.shuffle, arguments_.zipf, arguments_.limit})),
        scorer_(tokens_, model_.output_shape(), file_.vocabulary, probe()) {}

  std::vector<Record> run() {
    say_what_is_cut();
    const auto start = Clock::now();
    make_lanes();
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
    request.inputs = model_.inputs(request.rows);
    return request;
  }

  void make_lanes() {
    const auto all = settings(arguments_, quality());
    if (all.empty()) {
      throw Failure("nothing to run: --mode leaves no setting where quality cannot be measured; name --fidelity too");
    }
    fingerprint_.kind = fingerprint_kind_from_string(arguments_.fingerprint);
    fingerprint_.centring = arguments_.centre ? Centring::kRunning : Centring::kOff;
    const bool similar = std::any_of(all.begin(), all.end(), [](const Setting& s) { return s.threshold.has_value(); });
    if (similar && fingerprint_.kind == FingerprintKind::kPca) fingerprint_.pca = pca();
    for (const Setting& setting : all) {
      auto variant = make_variant(setting, {model_, arguments_, tokens_, fingerprint_});
      lanes_.push_back({.setting = setting,
                        .variant = std::move(variant),
                        .latencies = {},
                        .divergences = {},
                        .samples = {},
                        .served = ServedCounts(tokens_)});
    }
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
        lane.variant->forward(request);
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
    std::vector<c10::IValue> outputs(lanes_.size());
    std::optional<std::size_t> plain;
    const auto compare_with_plain = [&](std::size_t i) {
      lanes_[i].divergences.push_back(model_.divergence(outputs[*plain], outputs[i], request.rows));
      if (i != *plain) outputs[i] = {};  // logits are large
    };
    for (std::size_t turn = 0; turn < lanes_.size(); ++turn) {
      const std::size_t i = (turn + static_cast<std::size_t>(done_)) % lanes_.size();
      Lane& lane = lanes_[i];
      const auto start = Clock::now();
      outputs[i] = lane.variant->forward(request);
      lane.latencies.push_back(1000 * seconds_since(start));
      const Done done = lane.variant->done(request);
      lane.tokens_computed += done.tokens_computed;
      if (!file_.random_weights()) {
        if (const auto sample = scorer_.score(request.number, request.rows, outputs[i]))
          lane.samples.push_back(*sample);
        for (std::size_t row = 0; row < done.served_from.size(); ++row) {
          lane.served.add(request.number, request.first_sequence + static_cast<std::int64_t>(row),
                          done.served_from[row]);
        }
      }
      if (lane.setting.mode == "nocache") {
        plain = i;
        for (std::size_t earlier = 0; earlier < turn; ++earlier) {
          compare_with_plain((earlier + static_cast<std::size_t>(done_)) % lanes_.size());
        }
      }
      if (plain) compare_with_plain(i);
    }
    ++done_;
    sequences_ += static_cast<std::int64_t>(request.rows.size());
    real_tokens_ += request.tokens;
  }

  [[nodiscard]] const Lane* plain_lane() const {
    const auto found =
        std::find_if(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.setting.mode == "nocache"; });
    return found == lanes_.end() ? nullptr : &*found;
  }

  [[nodiscard]] Record record(const Lane& lane) const {
    Record r;
    r.model = file_.name;
    r.weights = file_.weights;
    r.workload = tokens_.workload;
    r.mode = lane.setting.mode;
    r.threads = arguments_.threads;
    r.requests = done_;
    r.requests_available = static_cast<std::int64_t>(stream_.requests.size());
    r.sequences = sequences_;
    r.tokens = real_tokens_;
    r.tokens_computed_fraction = lane.tokens_computed / static_cast<double>(real_tokens_);
    r.latency_ms = summarize(lane.latencies);
    r.fill_available = tokens_.fill_requests;
    r.zipf = stream_.zipf;
    r.shuffle = stream_.shuffle;
    r.source = tokens_.source;
    r.model_torch = file_.torch_version;
    r.model_transformers = file_.transformers_version;
    if (const Lane* plain = plain_lane()) {
      std::vector<double> ratios;
      for (std::size_t i = 0; i < lane.latencies.size(); ++i) ratios.push_back(plain->latencies[i] / lane.latencies[i]);
      r.speedup_vs_nocache = mean(plain->latencies) / mean(lane.latencies);
      r.speedup_median = median(std::move(ratios));
      r.divergence = summarize(lane.divergences);
    }
    lane.variant->describe(r);
    if (lane.setting.mode != "nocache") r.filled = filled_;
    if (!file_.random_weights()) judge(lane, r);
    return r;
  }

  void judge(const Lane& lane, Record& r) const {
    if (const auto metric = scorer_.metric(); metric && !lane.samples.empty()) {
      const Lane* plain = plain_lane();
      const Comparison c = compare(*metric, lane.samples, plain != nullptr ? plain->samples : std::vector<Sample>{});
      r.task = {
          .metric = to_string(*metric), .value = c.value, .baseline = c.baseline, .change = c.change, .ci95 = c.ci95};
    }
    if (lane.setting.mode == "nocache") return;
    if (tokens_.task == Task::kDuplicates) {
      r.task = {.metric = "precision", .value = lane.served.precision()};
      r.recall = lane.served.recall();
      r.unsafe_served = {.rate = lane.served.unsafe(), .unlabelled = lane.served.unlabelled()};
    }
    if (tokens_.task == Task::kAnswer) r.same_answer = lane.served.same_answer();
  }

  LoadedModel& model_;
  const ModelFile& file_;
  const TokenFile& tokens_;
  const Arguments& arguments_;
  const double budget_;
  Progress& progress_;
  const Stream stream_;
  const Scorer scorer_;
  FingerprintOptions fingerprint_;
  std::vector<Lane> lanes_;
  std::int64_t filled_ = 0;
  std::int64_t done_ = 0;
  std::int64_t sequences_ = 0;
  std::int64_t real_tokens_ = 0;
};

}  // namespace

std::vector<Record> run_cell(const CellContext& context) { return Cell(context).run(); }

}  // namespace llmcache::bench
