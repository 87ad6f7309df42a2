#include "setup.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "failure.h"
#include "systems.h"

namespace llmcache::bench {

Setup::Setup(const ExperimentContext& context)
    : context_(context),
      model_(context.model),
      tokens_(context.tokens),
      settings_(context.settings),
      judged_(!context.file.random_weights()),
      decoder_(reuses_prefixes()),
      generates_(tokens_.task == Task::kGeneration),
      probe_(linear_probe()),
      scorer_(tokens_, model_.output_shape(), context.file.vocabulary, probe_),
      calibration_(context, probe_, decoder_) {}

/// The model can go on behind keys and values that are kept.
bool Setup::reuses_prefixes() const {
  const bool reuses = model_.wrapped() && model_.cache().profile().prefix_reuse;
  if (reuses || !settings_.is_given("mode") || !settings_.has_mode("kvcache")) return reuses;
  throw Failure(fmt::format(
      "mode kvcache is for causal models that can go on behind keys and values that are kept; {} {}",
      context_.file.name,
      model_.cache().profile().causal ? "was not verified to do so, see llmcache-inspect" : "is not causal"));
}

std::optional<LinearProbe> Setup::linear_probe() const {
  if (tokens_.task != Task::kClassification || !judged_ || model_.output_shape().pooled_output < 0) return {};
  auto found = find_linear_probe(settings_.data_folder, tokens_, context_.file);
  if (!found) {
    context_.note("{}: no file {}, so no accuracy; fit a probe", tokens_.workload,
                  linear_probe_path(settings_.data_folder, tokens_.workload, context_.file.name).string());
  }
  return found;
}

/// Errors of random weights mean nothing, and without a training part there is nothing to calibrate on.
bool Setup::can_have_budgets() const {
  const OutputShape& shape = model_.output_shape();
  const bool possible =
      judged_ && (decoder_ ? shape.logits_output : shape.pooled_output) >= 0 && tokens_.fill_requests > 0;
  if (!possible && settings_.has_fidelity("budget")) {
    context_.note("{} on {}: no fidelity budget: it takes trained weights, a pooled output and a training part",
                  context_.file.name, tokens_.workload);
  }
  return possible;
}

bool Setup::has_quality() const {
  return judged_ && (scorer_.metric() || tokens_.task == Task::kDuplicates || tokens_.task == Task::kAnswer);
}

std::vector<Run> Setup::make_runs() {
  const Possible possible = {.quality = !generates_ && has_quality(),
                             .prefix_reuse = decoder_,
                             .generation = generates_,
                             .budget = !generates_ && can_have_budgets()};
  auto configs = run_configs(settings_, possible);
  if (configs.empty()) {
    throw Failure(fmt::format("nothing to run of {}: {}", tokens_.workload,
                              generates_ ? "of llmcache only fidelity lossless generates text; name --mode nocache, "
                                           "kvcache or llmcache"
                                         : "--mode leaves no setting where quality cannot be measured; name --fidelity "
                                           "too"));
  }
  const auto similar = [](const RunConfig& config) { return config.threshold || config.equal_error; };
  fingerprint_.kind = fingerprint_kind_from_string(settings_.fingerprint);
  fingerprint_.centring = settings_.centre ? Centring::kRunning : Centring::kOff;
  if (fingerprint_.kind == FingerprintKind::kPca && std::ranges::any_of(configs, similar)) fingerprint_.pca = pca();
  std::vector<Run> runs;
  for (RunConfig& config : configs) {
    if (config.equal_error) config.threshold = threshold_for(*config.equal_error, config);
    runs.emplace_back(config, make_system(config, {model_, settings_, fingerprint_, &calibration_}), tokens_);
  }
  return runs;
}

/// The similarity from which on the paper's mode makes this error.
double Setup::threshold_for(double epsilon, RunConfig config) {
  auto& nearest = nearest_[config.weights];
  config.threshold = -1;
  if (nearest.empty()) {
    nearest = find_nearest(cache_options(config, settings_, fingerprint_, model_.cache().profile().layers));
  }
  const double threshold = threshold_within(nearest, epsilon);
  context_.note("{}: fidelity threshold has an error of {} on the training part from a similarity of {:.4f} on",
                tokens_.workload, epsilon, threshold);
  return threshold;
}

/// Perhaps what an earlier run kept beside the models.
std::vector<Nearest> Setup::find_nearest(const Options& options) const {
  const auto find = [&] { return nearest_answers(context_, calibration_, options); };
  if (!calibration_.keeps()) return find();
  const auto path = calibration_.kept_path(
      fmt::format("nearest-{}-{}-{}-{}", settings_.fingerprint, settings_.fingerprint_layer,
                  to_string(options.threshold.fingerprint.centring), to_string(options.weights)));
  auto nearest = load_nearest(path);
  if (nearest.empty()) save_nearest(path, nearest = find());
  return nearest;
}

/// Fitted on the states of the fill part, or of the first requests without one.
std::shared_ptr<const PcaModel> Setup::pca() const {
  constexpr std::int64_t kRows = 2000;
  constexpr std::int64_t kRequestsWithoutFill = 64;
  constexpr std::int64_t kComponents = 64;
  Cache& cache = model_.cache();
  const std::int64_t hidden_size = cache.profile().hidden;
  std::vector<float> values;
  std::int64_t rows = 0;
  const std::int64_t end =
      tokens_.fill_requests > 0 ? tokens_.fill_requests : std::min(tokens_.requests(), kRequestsWithoutFill);
  for (std::int64_t number = 0; number < end && rows < kRows; ++number) {
    for (const auto& state : cache.pooled_state(context_.inputs(number), settings_.fingerprint_layer)) {
      values.insert(values.end(), state.begin(), state.end());
      ++rows;
    }
  }
  const std::int64_t components = std::min({kComponents, hidden_size, rows - 1});
  return std::make_shared<const PcaModel>(PcaModel::fit(values, hidden_size, components));
}

std::string Setup::output() const {
  if (generates_) return "last";
  if (settings_.output) return *settings_.output;
  if (!decoder_) return "all";
  if (tokens_.task == Task::kChoice || tokens_.task == Task::kPerplexity) return "new";
  return tokens_.task == Task::kAnswer && !tokens_.scored.empty() ? "last+new" : "last";
}

bool Setup::compares_greedy() const {
  const OutputShape& shape = model_.output_shape();
  const std::int64_t vocabulary = context_.file.vocabulary;
  return decoder_ && shape.logits_output >= 0 && vocabulary > 0 && shape.logits_dims >= vocabulary;
}

}  // namespace llmcache::bench
