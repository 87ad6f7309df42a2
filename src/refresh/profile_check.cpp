#include "refresh/profile_check.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <limits>

#include "llmcache/error.h"
#include "refresh/exit_model.h"

namespace llmcache {
namespace {

constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kShare = 1 + 1e-6;  // the most that a sum of shares is, rounded

[[noreturn]] void refuse_profile(const std::string& what) {
  throw Error(ErrorCode::kInvalidOptions, "calibration profile: " + what + "; calibrate again");
}

/// Neither NaN nor infinite.
void check(const std::string& name, double value, double low, double high) {
  if (value >= low && value <= high) return;
  refuse_profile(high < kLargest
                     ? fmt::format("{} is {}; {:g} to {:g} is expected", name, value, low, high)
                     : fmt::format("{} is {}; a finite number is expected, {:g} or more", name, value, low));
}

void check_count(const std::string& name, std::int64_t value) {
  if (value < 0) refuse_profile(fmt::format("{} is {}; 0 or more is expected", name, value));
}

void check_gate(std::size_t layer, const LogisticModel& gate) {
  const auto name = [&](const char* field) { return fmt::format("{} of the gate of layer {}", field, layer); };
  for (const double mean : gate.means) check(name("a mean"), mean, -kLargest, kLargest);
  for (const double scale : gate.scales) check(name("a scale"), scale, std::numeric_limits<double>::min(), kLargest);
  for (const double weight : gate.weights) check(name("a weight"), weight, -kLargest, kLargest);
  check(name("the intercept"), gate.intercept, -kLargest, kLargest);
}

void check_finite(const std::string& name, const at::Tensor& tensor) {
  if (tensor.defined() && !tensor.isfinite().all().item<bool>())
    refuse_profile(name + " has a value that is not finite");
}

void check_exit(const ExitModel& exit) {
  for (const auto& level : exit.thresholds) {
    for (const double threshold : level) check("a threshold", threshold, -1, kShare);
  }
  check_finite("outputs", exit.outputs);
  check_finite("mean_output", exit.mean_output);
  for (std::size_t l = 0; l < exit.layers.size(); ++l) {
    const ExitLayer& layer = exit.layers[l];
    check_gate(l, layer.gate);
    for (const at::Tensor& tensor :
         {layer.centre, layer.states, layer.lengths, layer.projection, layer.projected, layer.translator}) {
      check_finite(fmt::format("the bank of layer {}", l), tensor);
    }
  }
}

void check_choice(const ReuseChoice& choice, double least_distance) {
  check("reuse.limit", choice.match_threshold, 0, kLargest);
  check("reuse.epsilon", choice.epsilon, 0, 0.5);
  check_count("reuse.least_tokens", choice.least_tokens);
  check_count("reuse.fitted", choice.fitted);
  check_count("reuse.certified", choice.certified);
  check("reuse.error", choice.error, 0, kShare);
  check("reuse.bound", choice.bound, 0, kShare);
  check("reuse.computed", choice.computed, 0, kLargest);
  check("reuse.typical_distance", choice.typical_distance, least_distance, kLargest);
}

/// Each sequence is one mechanism's own, and the two share the budget.
void check_side_by_side(const CalibrationProfile& profile) {
  const ReuseChoice& reuse = *profile.reuse;
  if (profile.exit_below < 1 || reuse.least_tokens != profile.exit_below) {
    refuse_profile(
        fmt::format("it has early exits for sequences below {} tokens, and reuse for those from {} on; with both "
                    "in one profile these must be the same number above 0",
                    profile.exit_below, reuse.least_tokens));
  }
  if (!(reuse.epsilon > 0 && reuse.epsilon < profile.budget.epsilon)) {
    refuse_profile(
        fmt::format("reuse.epsilon is {}; with early exits beside it above 0 and below the budget's {} is "
                    "expected",
                    reuse.epsilon, profile.budget.epsilon));
  }
}

}  // namespace

void check_numbers(const CalibrationProfile& profile) {
  profile.budget.validate();
  check_count("fitted", profile.fitted);
  check_count("certified", profile.certified);
  check("certified_error", profile.certified_error, 0, kShare);
  check("error_bound", profile.error_bound, 0, kShare);
  check("expected_share", profile.expected_share, 0, kShare);
  for (const double share : profile.expected_exits) check("a share of expected_exits", share, 0, kShare);
  check("typical_distance", profile.typical_distance, 0, kLargest);
  // What relative errors are divided by.
  const bool relative = profile.budget.metric == BudgetMetric::kRelativeError;
  check_count("exit_below", profile.exit_below);
  const bool shared_out =
      profile.exit && profile.reuse && (profile.exit_below != 0 || profile.reuse->least_tokens != 0);
  if (shared_out) check_side_by_side(profile);  // else it is an earlier one, of which early exit serves
  if (profile.reuse) check_choice(*profile.reuse, relative ? std::numeric_limits<double>::min() : 0);
  if (profile.exit) check_exit(*profile.exit);
}

}  // namespace llmcache
