// llmcache-budget-bench: does Fidelity::kBudget keep its promise? For a model with one pooled output, a workload of
// task classification and its probe, whose classes are the decisions.
//
//   calibrations  The part of the training texts that the probe was not fitted on is cut into N samples that have no
//                 text in common. A cache is calibrated on each of them, and serves the whole test part. One line a
//                 calibration; at the end how many of them went over epsilon (at most delta of them may).
//   drift         A cache that was calibrated on all of these texts serves a quarter of the test part, and then the
//                 texts of another workload, decided upon by the first one's probe. One line for every 250 texts.
//
// error is the share of the answers whose decision differs from that of a full computation, with its interval (95 %).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "calibration.h"
#include "failure.h"
#include "guarded_main.h"
#include "loaded_model.h"
#include "machine.h"
#include "model_files.h"
#include "probe.h"
#include "statistics.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

struct Arguments {
  std::string models;
  std::string data;
  std::string model = "minilm-pooled";
  std::string workload = "banking77";
  std::string drift = "clinc150";
  std::vector<double> epsilons = {0.05};
  double delta = 0.1;
  double audit_rate = 0.05;
  int calibrations = 20;
  std::uint64_t seed = 0;
};

/// What was served, in all.
struct Sum {
  std::int64_t sequences = 0;
  std::int64_t reused = 0;
  std::int64_t wrong = 0;

  void add(const Sum& other) {
    sequences += other.sequences;
    reused += other.reused;
    wrong += other.wrong;
  }
  [[nodiscard]] double error() const { return static_cast<double>(wrong) / static_cast<double>(sequences); }
  [[nodiscard]] std::string text() const {
    const Interval interval = wilson(wrong, sequences);
    return fmt::format("reused {:5.1f} %  error {:.4f} [{:.4f}, {:.4f}]",
                       100 * static_cast<double>(reused) / static_cast<double>(sequences), error(), interval.low,
                       interval.high);
  }
};

class Bench {
 public:
  explicit Bench(const Arguments& arguments)
      : arguments_(arguments),
        file_(read_model_file(arguments.models + "/" + arguments.model + ".pt")),
        model_(file_),
        texts_(read(arguments.workload)) {
    const auto probe = find_probe(arguments.data, texts_, file_);
    if (!probe)
      throw Failure(fmt::format("there is no probe for {} on {}; fit_probe.py makes it", file_.name, texts_.workload));
    if (texts_.fill_requests == 0 || texts_.fill_requests == texts_.requests()) {
      throw Failure(fmt::format("{} has no training part or no test part", texts_.workload));
    }
    scores_ = scores_of(*probe);
    first_ = first_unfitted(*probe, texts_);
  }

  void calibrations(double epsilon) {
    const std::int64_t size = (texts_.fill_requests - first_) / arguments_.calibrations;
    if (size == 0) throw Failure("there are fewer requests than calibrations");
    fmt::print("\n{} calibrations on {} requests each, epsilon {}, delta {}\n", arguments_.calibrations, size, epsilon,
               arguments_.delta);
    int over = 0;
    int reuse = 0;
    for (int i = 0; i < arguments_.calibrations; ++i) {
      const auto cache = make_cache(epsilon, arguments_.seed + static_cast<std::uint64_t>(i));
      const auto profile = calibrate(*cache, first_ + i * size, first_ + (i + 1) * size);
      const Sum sum = serve(*cache, texts_, texts_.fill_requests, texts_.requests(), test_);
      over += sum.error() > epsilon ? 1 : 0;
      reuse += profile.reuses() ? 1 : 0;
      fmt::print("{:3}  certified on {:4}: bound {:.4f}   served {}: {}{}\n", i + 1, profile.certified,
                 profile.error_bound, sum.sequences, sum.text(), sum.error() > epsilon ? "  over" : "");
      std::fflush(stdout);
    }
    fmt::print("{} of {} calibrations went over epsilon {} ({:.1f} % where {:.1f} % may); {} reuse answers\n", over,
               arguments_.calibrations, epsilon, 100.0 * over / arguments_.calibrations, 100 * arguments_.delta, reuse);
  }

  void drift(double epsilon) {
    const TokenFile other = read(arguments_.drift);
    const auto cache = make_cache(epsilon, arguments_.seed);
    calibrate(*cache, first_, texts_.fill_requests);
    fmt::print("\ncalibrated on {}, then {}; epsilon {}, audit rate {}\n", texts_.workload, other.workload, epsilon,
               arguments_.audit_rate);
    const auto quarter = texts_.fill_requests + (texts_.requests() - texts_.fill_requests) / 4;
    served(*cache, texts_, texts_.fill_requests, quarter);
    served(*cache, other, 0, other.requests());
  }

 private:
  static constexpr std::int64_t kWindow = 250;

  TokenFile read(const std::string& workload) const {
    TokenFile file = read_token_file(arguments_.data + "/" + workload + "." + file_.tokenizer + ".safetensors");
    check_vocabulary(file, file_.vocabulary, file_.name);
    return file;
  }

  std::shared_ptr<Cache> make_cache(double epsilon, std::uint64_t seed) const {
    Options options;
    options.fidelity = Fidelity::kBudget;
    options.budget.budget = {BudgetMetric::kDecision, epsilon, arguments_.delta};
    options.budget.scores = scores_;
    options.budget.audit_rate = arguments_.audit_rate;
    options.budget.token_reuse = false;
    options.budget.seed = seed;
    return model_.make_cache(options);
  }

  Inputs inputs(const TokenFile& file, std::int64_t number) const {
    const std::int64_t cut = file_.max_tokens > 0 ? file_.max_tokens : file.max_tokens;
    return model_.inputs(file.request(number, cut), file.pools(number, cut));
  }

  CalibrationProfile calibrate(Cache& cache, std::int64_t begin, std::int64_t end) const {
    return cache.calibrate(cache.run_sample([&]() -> std::optional<Inputs> {
      if (begin == end) return std::nullopt;
      return inputs(texts_, begin++);
    }));
  }

  std::vector<std::int64_t> decisions(const c10::IValue& output) const {
    const auto pooled = tensor_of(output, model_.output_shape().pooled_output).to(at::kFloat);
    const auto chosen = scores_(pooled).argmax(1).contiguous();
    return {chosen.const_data_ptr<std::int64_t>(), chosen.const_data_ptr<std::int64_t>() + chosen.numel()};
  }

  /// `full`: decisions of full computations, by request; made where they are not there yet.
  Sum serve(Cache& cache, const TokenFile& file, std::int64_t begin, std::int64_t end,
            std::map<std::int64_t, std::vector<std::int64_t>>& full) {
    Sum sum;
    for (std::int64_t number = begin; number < end; ++number) {
      const Inputs request = inputs(file, number);
      if (!full.contains(number)) full[number] = decisions(model_.plain(request));
      const auto got = decisions(cache.forward(request));
      const ForwardReport report = cache.last_report();
      for (std::size_t row = 0; row < got.size(); ++row) {
        sum.wrong += got[row] != full[number][row] ? 1 : 0;
        sum.reused += report.sequences[row].source == Source::kEarlyExit ? 1 : 0;
        ++sum.sequences;
      }
    }
    return sum;
  }

  void served(Cache& cache, const TokenFile& file, std::int64_t begin, std::int64_t end) {
    std::map<std::int64_t, std::vector<std::int64_t>> full;
    Sum window;
    Sum all;
    for (std::int64_t number = begin; number < end; ++number) {
      window.add(serve(cache, file, number, number + 1, full));
      if (window.sequences < kWindow && number + 1 < end) continue;
      all.add(window);
      fmt::print("{:10} up to {:5}: {}   all of it {:.4f}   level {}\n", file.workload, all.sequences, window.text(),
                 all.error(), cache.stats().budget->level);
      std::fflush(stdout);
      window = {};
    }
  }

  const Arguments arguments_;
  const ModelFile file_;
  LoadedModel model_;
  const TokenFile texts_;
  ScoreFunction scores_;
  std::int64_t first_ = 0;
  std::map<std::int64_t, std::vector<std::int64_t>> test_;
};

int run(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Does reuse within an error budget keep its promise: over many calibrations, and as traffic drifts?");
  app.add_option("--models", arguments.models, "folder of the models")->required();
  app.add_option("--data", arguments.data, "folder of the token files and probes")->required();
  app.add_option("--model", arguments.model, "with one pooled output")->capture_default_str();
  app.add_option("--workload", arguments.workload, "of task classification")->capture_default_str();
  app.add_option("--drift", arguments.drift, "workload that traffic drifts to; empty: none")->capture_default_str();
  app.add_option("--epsilon", arguments.epsilons, "error budgets")->delimiter(',')->capture_default_str();
  app.add_option("--delta", arguments.delta)->capture_default_str();
  app.add_option("--audit-rate", arguments.audit_rate)->capture_default_str();
  app.add_option("--seed", arguments.seed, "of the choice of audits; one more for each calibration")
      ->capture_default_str();
  app.add_option("--calibrations", arguments.calibrations, "0: none")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(1);
  const c10::InferenceMode inference;
  const Machine machine = this_machine();
  fmt::print("{}, 1 thread, LibTorch {}, {}; {} on {}\n", machine.cpu, TORCH_VERSION, compiler(), arguments.model,
             arguments.workload);
  Bench bench(arguments);
  for (const double epsilon : arguments.epsilons) {
    if (arguments.calibrations > 0) bench.calibrations(epsilon);
    if (!arguments.drift.empty()) bench.drift(epsilon);
  }
  return 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  return llmcache::bench::guarded_main("llmcache-budget-bench", argc, argv, llmcache::bench::run);
}
