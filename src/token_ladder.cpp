#include "token_ladder.h"

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
    one.max_edit_fraction = 1;  // the calibrated limit decides
    all.push_back(one);
  };
  for (const std::int64_t samples : {0, 16, 32}) add(samples, 0);
  add(16, 1);
  add(16, 2);
  return all;
}

}  // namespace

struct TokenLadder::Found final : Matches {
  TokenReuse::Matches rows;
};

TokenLadder::TokenLadder(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                         const ModelProfile& profile, BankFormat format, std::size_t capacity_bytes,
                         MemoryAccount* total)
    : settings_(settings_for(static_cast<std::int32_t>(model.layers()))),
      reuse_(model, inputs, output, profile, options_for(static_cast<std::int32_t>(model.layers()), format),
             capacity_bytes, total) {}

std::string TokenLadder::describe(std::size_t setting) const {
  const TokenReuseSettings& s = settings_[setting];
  return fmt::format("{} samples, {} full layers", s.samples, s.full_layers);
}

const std::vector<double>& TokenLadder::limits() const {
  static const std::vector<double> limits = {0.02, 0.05, 0.1, 0.2, 0.4, 1.0};
  return limits;
}

std::unique_ptr<ReuseLadder::Matches> TokenLadder::find(const Batch& batch, const std::string& tenant,
                                                        std::size_t setting) {
  auto found = std::make_unique<Found>();
  found->rows = reuse_.find(batch, tenant);
  for (const auto& match : found->rows) {
    auto& distance = found->distance.emplace_back();
    const TokenReuseSettings& chosen = settings_[setting];
    if (match && reuse_.computed_fraction(*match, chosen) <= chosen.max_computed_fraction) {
      distance = match->edit_fraction;
    }
  }
  return found;
}

c10::IValue TokenLadder::run_for(const Batch& batch, const Matches& matches, const std::vector<char>& reused,
                                 std::size_t setting, const std::string& tenant, Output /*output*/, KeptLater* kept,
                                 ForwardReport& report) {
  TokenReuse::Matches rows = static_cast<const Found&>(matches).rows;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!reused[i]) rows[i].reset();
  }
  auto result = reuse_.run(batch, rows, settings_[setting], tenant, kept != nullptr, report);
  if (!result.computed.empty()) {
    kept->add([this, computed = std::move(result.computed)]() mutable { reuse_.keep(std::move(computed)); });
  }
  return result.value;
}

ReuseLadder::Counters TokenLadder::counters() const {
  const auto c = reuse_.counters();
  return {c.entries, c.insertions, c.evictions, c.rejected, c.bytes, c.peak_bytes};
}

}  // namespace llmcache
