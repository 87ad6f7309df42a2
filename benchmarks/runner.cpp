#include "runner.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "failure.h"
#include "loaded_model.h"
#include "progress.h"
#include "request_stream.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kCellSeconds = 30;
constexpr double kAllCellsSeconds = 480;  // loading and wrapping five models comes on top
constexpr std::size_t kWarmUpRequests = 3;
constexpr double kWarmUpShare = 0.1;  // of the time budget

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// One mode's measurements on one workload.
struct Measured {
  std::vector<double> latencies;  // ms, one a request
  double tokens_computed = 0;     // padding included where it was computed
};

/// What a request is made of.
struct Prepared {
  Rows rows;
  Inputs inputs;
  std::int64_t tokens = 0;  // real
  std::int64_t padded = 0;  // batch x width
};

/// Tokens that a call of LayerCache::forward ran through the layers. Its report counts real tokens;
/// a batch that ran dense computed its padding too.
double tokens_computed(const ForwardReport& report, const Prepared& request) {
  if (report.execution == Execution::kNone) return 0;
  if (report.execution == Execution::kPacked) return report.computed_fraction() * static_cast<double>(request.tokens);
  const auto known = std::count_if(report.sequences.begin(), report.sequences.end(),
                                   [](const SequenceReport& s) { return s.source == Source::kIdentical; });
  const auto width = request.padded / static_cast<std::int64_t>(request.rows.size());
  return static_cast<double>((static_cast<std::int64_t>(report.sequences.size()) - known) * width);
}

class Cell {
 public:
  Cell(LoadedModel& model, const ModelFile& file, const TokenFile& tokens, const Arguments& arguments, double budget,
       Progress& progress)
      : model_(model),
        file_(file),
        tokens_(tokens),
        arguments_(arguments),
        budget_(budget),
        progress_(progress),
        plain_(arguments.has_mode("nocache")),
        cached_(arguments.has_mode("llmcache")),
        stream_(make_stream(tokens, {arguments.shuffle, arguments.zipf, arguments.limit})) {}

  std::vector<Record> run() {
    say_what_is_cut();
    const auto start = Clock::now();
    warm_up(start);
    const Stats before = cached_ ? model_.cache().stats() : Stats{};
    const auto first = Clock::now();
    for (const std::int64_t number : stream_.requests) {
      // Stops where one more request would probably end behind the budget.
      const double mean = done_ == 0 ? 0 : seconds_since(first) / static_cast<double>(done_);
      const double elapsed = seconds_since(start);
      if (done_ > 0 && elapsed + mean > budget_) break;
      measure(prepare(number));
      progress_.update(std::max(seconds_since(start) / budget_,
                                static_cast<double>(done_) / static_cast<double>(stream_.requests.size())));
    }
    std::vector<Record> records;
    if (plain_) records.push_back(plain_record());
    if (cached_) records.push_back(cached_record(before, model_.cache().stats()));
    return records;
  }

 private:
  std::int64_t cut_at() const {
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

  Prepared prepare(std::int64_t number) const {
    Prepared request{.rows = tokens_.request(number, cut_at()), .inputs = {}};
    std::size_t width = 0;
    for (const auto& row : request.rows) {
      request.tokens += static_cast<std::int64_t>(row.size());
      width = std::max(width, row.size());
    }
    request.padded = static_cast<std::int64_t>(width * request.rows.size());
    request.inputs = model_.inputs(request.rows);
    return request;
  }

  /// The first requests, through both modes. Each starts with an empty cache, and none is left in it.
  void warm_up(Clock::time_point start) {
    for (std::size_t i = 0; i < std::min(kWarmUpRequests, stream_.requests.size()); ++i) {
      if (i > 0 && seconds_since(start) > kWarmUpShare * budget_) break;
      const Prepared request = prepare(stream_.requests[i]);
      if (plain_) model_.plain(request.inputs);
      if (cached_) {
        model_.cache().clear();
        model_.cache().forward(request.inputs);
      }
    }
    if (cached_) model_.cache().clear();
  }

  template <class Function>
  static c10::IValue timed(Measured& measured, const Function& function) {
    const auto start = Clock::now();
    c10::IValue output = function();
    measured.latencies.push_back(1000 * seconds_since(start));
    return output;
  }

  void measure(const Prepared& request) {
    c10::IValue reference;
    c10::IValue output;
    const auto run_plain = [&] {
      reference = timed(nocache_, [&] { return model_.plain(request.inputs); });
      nocache_.tokens_computed += static_cast<double>(request.padded);
    };
    const auto run_cached = [&] {
      output = timed(llmcache_, [&] { return model_.cache().forward(request.inputs); });
      llmcache_.tokens_computed += tokens_computed(model_.cache().last_report(), request);
    };
    const bool plain_first = done_ % 2 == 0;
    if (plain_ && plain_first) run_plain();
    if (cached_) run_cached();
    if (plain_ && !plain_first) run_plain();
    if (plain_ && cached_) divergences_.push_back(model_.divergence(reference, output, request.rows));
    ++done_;
    sequences_ += static_cast<std::int64_t>(request.rows.size());
    real_tokens_ += request.tokens;
  }

  Record record(const std::string& mode, const Measured& measured) const {
    Record r;
    r.model = file_.name;
    r.weights = file_.weights;
    r.workload = tokens_.workload;
    r.mode = mode;
    r.threads = arguments_.threads;
    r.requests = done_;
    r.requests_available = static_cast<std::int64_t>(stream_.requests.size());
    r.sequences = sequences_;
    r.tokens = real_tokens_;
    r.tokens_computed_fraction = measured.tokens_computed / static_cast<double>(real_tokens_);
    r.latency_ms = summarize(measured.latencies);
    r.zipf = stream_.zipf;
    r.shuffle = stream_.shuffle;
    r.source = tokens_.source;
    r.model_torch = file_.torch_version;
    r.model_transformers = file_.transformers_version;
    return r;
  }

  Record plain_record() const {
    Record r = record("nocache", nocache_);
    r.speedup_vs_nocache = 1;
    r.speedup_median = 1;
    r.hit_rate = 0;
    r.divergence = {};
    return r;
  }

  Record cached_record(const Stats& before, const Stats& after) const {
    Record r = record("llmcache", llmcache_);
    r.fidelity = arguments_.fidelity;
    if (plain_) {
      std::vector<double> ratios;
      for (std::size_t i = 0; i < llmcache_.latencies.size(); ++i) {
        ratios.push_back(nocache_.latencies[i] / llmcache_.latencies[i]);
      }
      r.speedup_vs_nocache = mean(nocache_.latencies) / mean(llmcache_.latencies);
      r.speedup_median = median(std::move(ratios));
      r.divergence = summarize(divergences_);
    }
    r.hit_rate = static_cast<double>(after.identical_hits - before.identical_hits) /
                 static_cast<double>(after.sequences - before.sequences);
    r.cache_bytes = static_cast<std::int64_t>(after.bytes);
    return r;
  }

  LoadedModel& model_;
  const ModelFile& file_;
  const TokenFile& tokens_;
  const Arguments& arguments_;
  const double budget_;
  Progress& progress_;
  const bool plain_;
  const bool cached_;
  const Stream stream_;
  Measured nocache_;
  Measured llmcache_;
  std::vector<double> divergences_;
  std::int64_t done_ = 0;
  std::int64_t sequences_ = 0;
  std::int64_t real_tokens_ = 0;
};

/// All workloads of one model.
void run_model(const Selected& selected, const Arguments& arguments, double budget, Progress& progress,
               Results& results) {
  LoadedModel model(selected.model);
  if (arguments.has_mode("llmcache")) {
    Options options;
    options.fidelity = fidelity_from_string(arguments.fidelity);
    options.capacity_bytes = static_cast<std::size_t>(arguments.capacity_mib) << 20;
    results.wraps.push_back(model.wrap(options));
  }
  for (const auto& workload : selected.workloads) {
    const std::string label = fmt::format("{} on {}", selected.model.name, workload->workload);
    progress.begin(label);
    const auto start = Clock::now();
    try {
      const auto records = Cell(model, selected.model, *workload, arguments, budget, progress).run();
      results.records.insert(results.records.end(), records.begin(), records.end());
      progress.end(fmt::format("{} of {} requests, {:.1f} s", records[0].requests, records[0].requests_available,
                               seconds_since(start)));
    } catch (const Failure& error) {
      results.failures.push_back(fmt::format("{}: {}", label, error.what()));
      progress.end("failed");
    } catch (const std::exception& error) {
      results.failures.push_back(fmt::format("{}: {}", label, one_line(error)));
      progress.end("failed");
    }
  }
}

}  // namespace

double cell_seconds(const Arguments& arguments, std::size_t cells) {
  if (arguments.seconds) return *arguments.seconds;
  if (arguments.limit) return std::numeric_limits<double>::infinity();
  return std::min(kCellSeconds, kAllCellsSeconds / static_cast<double>(cells));
}

Results run(const Arguments& arguments, const std::vector<Selected>& selected) {
  at::set_num_interop_threads(1);
  at::set_num_threads(arguments.threads);
  std::size_t cells = 0;
  for (const Selected& one : selected) cells += one.workloads.size();
  const double budget = cell_seconds(arguments, cells);
  Progress progress(cells);
  Results results;
  for (const Selected& one : selected) {
    try {
      run_model(one, arguments, budget, progress, results);
    } catch (const Failure& error) {
      results.failures.emplace_back(error.what());
      progress.skip(one.workloads.size());
    } catch (const std::exception& error) {
      results.failures.push_back(fmt::format("model {}: {}", one.model.name, one_line(error)));
      progress.skip(one.workloads.size());
    }
  }
  return results;
}

Versions versions() { return {LLMCACHE_VERSION, TORCH_VERSION, compiler()}; }

}  // namespace llmcache::bench
