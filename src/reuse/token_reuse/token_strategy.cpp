#include "reuse/token_reuse/token_strategy.h"

#include <fmt/core.h>

namespace llmcache {
namespace {

/// The last layers can run on all tokens where their entering states are kept: of the last layer, and the one before.
TokenReuseOptions options_for(std::int32_t layers, BankFormat format) {
  TokenReuseOptions options;
  options.format = format;
  for (const std::int32_t full : {2, 1}) {
    if (layers - full >= 1) options.kept_layers.push_back(layers - full);
  }
  return options;
}

std::vector<TokenReuseSettings> settings_for(std::int32_t layers) {
  std::vector<TokenReuseSettings> all;
  const auto add = [&](std::int64_t samples, std::int32_t full_layers) {
    if (full_layers > 0 && layers - full_layers < 1) return;
    TokenReuseSettings one;
    one.samples = samples;
    one.full_layers = full_layers;
    one.max_edit_fraction = 1;  // the calibrated threshold decides
    all.push_back(one);
  };
  for (const std::int64_t samples : {0, 16, 32}) add(samples, 0);
  add(16, 1);
  add(16, 2);
  return all;
}

}  // namespace

struct TokenStrategy::Found final : Matches {
  TokenReuse::Matches rows;
};

TokenStrategy::TokenStrategy(const WrappedModel& wrapped, BankFormat format, std::size_t capacity_bytes,
                             MemoryAccount* total)
    : wrapped_(wrapped),
      format_(format),
      capacity_bytes_(capacity_bytes),
      settings_(settings_for(wrapped.layers())),
      reuse_(wrapped, options_for(wrapped.layers(), format), capacity_bytes, total) {}

std::unique_ptr<TunableStrategy> TokenStrategy::fresh() const {
  return std::make_unique<TokenStrategy>(wrapped_, format_, capacity_bytes_);
}

std::string TokenStrategy::describe(std::size_t setting) const {
  const TokenReuseSettings& s = settings_[setting];
  return fmt::format("{} samples, {} full layers", s.samples, s.full_layers);
}

const std::vector<double>& TokenStrategy::match_thresholds() const {
  static const std::vector<double> thresholds = {0.02, 0.05, 0.1, 0.2, 0.4, 1.0};
  return thresholds;
}

std::unique_ptr<TunableStrategy::Matches> TokenStrategy::find(const Batch& batch, const std::string& tenant,
                                                              std::size_t setting) {
  auto found = std::make_unique<Found>();
  found->rows = reuse_.find(batch, tenant);
  for (const auto& match : found->rows) {
    auto& distance = found->distance.emplace_back();
    const TokenReuseSettings& chosen = settings_[setting];
    const bool pays = match && reuse_.computed_fraction(*match, chosen) <= chosen.max_computed_fraction;
    if (pays) distance = match->edit_fraction;
    found->not_worth.push_back(match && !pays ? 1 : 0);
  }
  return found;
}

c10::IValue TokenStrategy::run(const Run& run, ForwardReport& report) {
  TokenReuse::Matches rows = static_cast<const Found&>(run.matches).rows;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!run.reused[i]) rows[i].reset();
  }
  auto result = reuse_.run(run.batch, rows, settings_[run.setting], run.tenant, run.writes != nullptr, report);
  if (!result.computed.empty()) {
    run.writes->add([this, computed = std::move(result.computed)]() mutable { reuse_.keep(std::move(computed)); });
  }
  return result.value;
}

}  // namespace llmcache
