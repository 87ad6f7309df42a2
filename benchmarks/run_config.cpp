#include "run_config.h"

#include <algorithm>
#include <utility>

namespace llmcache::bench {
namespace {

constexpr std::int64_t kKvcacheMib = 1024;  // a decoder has room for one request, however small the caches are

class Expansion {
 public:
  Expansion(const Settings& settings, const Possible& possible)
      : settings_(settings), possible_(possible), similar_(possible.quality && !possible.prefix_reuse) {}

  std::vector<RunConfig> all() {
    if (settings_.has_mode("nocache")) add({.mode = "nocache"});
    if (settings_.has_mode("kvcache") && possible_.prefix_reuse) {
      const std::int64_t mib = std::max(kKvcacheMib, settings_.capacities_mib.back());
      for (const auto& weights : settings_.weights) {
        add({.mode = "kvcache", .fidelity = "lossless", .capacity_mib = mib, .weights = weights});
      }
    }
    if (settings_.has_mode("llmcache")) add_layer_caches();
    const bool asked = similar_ || settings_.is_given("mode");
    if (!settings_.has_mode("semantic-cache") || possible_.generation || !asked) return std::move(all_);
    for (const std::int64_t mib : settings_.capacities_mib) {
      at_thresholds({.mode = "semantic-cache", .eviction = "lru", .capacity_mib = mib});
    }
    return std::move(all_);
  }

 private:
  void add(RunConfig config) { all_.push_back(std::move(config)); }

  void at_thresholds(RunConfig config) {
    for (const double threshold : settings_.thresholds) {
      config.threshold = threshold;
      add(config);
    }
  }

  void add_layer_caches() {
    for (const std::int64_t mib : settings_.capacities_mib) {
      for (const std::string& fidelity : settings_.fidelities) {
        if (possible_.generation && fidelity != "lossless") continue;
        for (const std::string& weights : settings_.weights) {
          add_fidelity({.mode = "llmcache", .fidelity = fidelity, .capacity_mib = mib, .weights = weights});
        }
      }
    }
    if (settings_.equal_error && !possible_.prefix_reuse) add_equal_errors();
  }

  void add_fidelity(RunConfig config) {
    if (config.fidelity == "budget") {
      if (possible_.budget) add_budgets(config);
    } else if (config.fidelity != "threshold") {
      add(config);
    } else if (similar_ || settings_.is_given("fidelity") || settings_.is_given("threshold")) {
      for (const std::string& eviction : settings_.evictions) {
        config.eviction = eviction;
        at_thresholds(config);
      }
    }
  }

  void add_budgets(RunConfig config) {
    for (const double epsilon : settings_.epsilons) {
      for (const std::string& early_exit : settings_.early_exits) {
        config.epsilon = epsilon;
        config.early_exit = possible_.prefix_reuse ? "off" : early_exit;
        for (std::int64_t part = 1; part <= settings_.calibration_parts; ++part) {
          if (settings_.calibration_parts > 1) config.calibration_part = part;
          add(config);
        }
        if (possible_.prefix_reuse) break;  // nothing leaves a decoder early
      }
    }
  }

  /// Behind the budgets, whose calibration tells what an error is.
  void add_equal_errors() {
    const std::vector<RunConfig> before = all_;
    std::vector<std::pair<double, std::string>> errors;
    for (const RunConfig& budget : before) {
      const std::pair error(budget.epsilon.value_or(0), budget.weights);
      if (!budget.epsilon || std::ranges::find(errors, error) != errors.end()) continue;
      errors.push_back(error);
      add({.mode = "llmcache",
           .fidelity = "threshold",
           .eviction = settings_.evictions.front(),
           .capacity_mib = budget.capacity_mib,
           .weights = budget.weights,
           .equal_error = budget.epsilon});
    }
  }

  const Settings& settings_;
  const Possible& possible_;
  const bool similar_;  ///< what nobody asked for by name runs
  std::vector<RunConfig> all_;
};

}  // namespace

std::vector<RunConfig> run_configs(const Settings& settings, const Possible& possible) {
  return Expansion(settings, possible).all();
}

}  // namespace llmcache::bench
