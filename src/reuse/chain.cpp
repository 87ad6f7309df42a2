#include "reuse/chain.h"

#include <array>

#include "reuse/budget/risk_controller.h"
#include "reuse/computed/computed.h"
#include "reuse/exact_match/exact_match.h"
#include "reuse/prefix/prefix_reuse.h"
#include "reuse/similarity/similarity_reuse.h"
#include "reuse/source/source_reuse.h"

namespace llmcache {
namespace {

constexpr std::array kFidelities = {Fidelity::kIdentical, Fidelity::kLossless, Fidelity::kBudget, Fidelity::kThreshold};

bool always(const StrategyContext& /*context*/) { return true; }
double nothing(const Options& /*options*/) { return 0; }

bool wants_prefixes(const StrategyContext& context) {
  const Options& options = context.options;
  if (options.fidelity == Fidelity::kThreshold) return false;
  options.prefix.validate(context.wrapped.layers());
  const bool lossless = options.fidelity == Fidelity::kLossless || options.fidelity == Fidelity::kBudget;
  return context.wrapped.profile.prefix_reuse && lossless && options.capacity_bytes > 0 &&
         options.prefix.capacity_share > 0;
}

bool wants_sources(const StrategyContext& context) {
  const Options& options = context.options;
  const bool lossless = options.fidelity == Fidelity::kLossless || options.fidelity == Fidelity::kBudget;
  return context.wrapped.profile.source_reuse && lossless && options.capacity_bytes > 0 &&
         options.source_capacity_share > 0;
}

std::vector<StrategyEntry> make_table() {
  using enum Fidelity;
  using Context = StrategyContext;
  using Made = std::unique_ptr<ReuseStrategy>;
  return {
      {.chains = {kThreshold},
       .wanted = [](const Context& c) { return c.options.fidelity == kThreshold; },
       .share = [](const Options& options) { return options.threshold.capacity_share; },
       .make = [](const Context& c, std::size_t capacity) -> Made {
         return std::make_unique<SimilarityReuse>(c.wrapped, c.options, capacity, &c.memory);
       }},
      {.chains = {kIdentical, kLossless, kBudget, kThreshold},
       .wanted = always,
       .share = nullptr,
       .make = [](const Context& c, std::size_t capacity) -> Made {
         return std::make_unique<ExactMatch>(c.wrapped, c.verification, capacity, &c.memory);
       }},
      {.chains = {kLossless, kBudget},
       .wanted = wants_sources,
       .share = [](const Options& options) { return options.source_capacity_share; },
       .make = [](const Context& c, std::size_t capacity) -> Made {
         return std::make_unique<SourceReuse>(c.wrapped, c.verification, capacity, &c.memory);
       }},
      {.chains = {kBudget},
       .wanted = [](const Context& c) { return c.options.fidelity == kBudget; },
       .share = [](const Options& options) { return options.budget.capacity_share; },
       .make = [](const Context& c, std::size_t capacity) -> Made {
         c.options.budget.validate(c.wrapped.layers());
         return std::make_unique<RiskController>(c.wrapped, c.options, capacity, &c.memory);
       }},
      {.chains = {kLossless, kBudget},
       .wanted = wants_prefixes,
       .share = [](const Options& options) { return options.prefix.capacity_share; },
       .make = [](const Context& c, std::size_t capacity) -> Made {
         return std::make_unique<PrefixReuse>(c.wrapped, c.verification, c.options.prefix, capacity, &c.memory);
       }},
      {.chains = {kLossless, kBudget, kThreshold},
       .wanted = always,
       .share = nothing,
       .make = [](const Context& c, std::size_t /*capacity*/) -> Made {
         return std::make_unique<Packed>(c.wrapped, c.options.packing_cost_tokens);
       }},
      {.chains = {kIdentical, kLossless, kBudget, kThreshold},
       .wanted = always,
       .share = nothing,
       .make = [](const Context& c, std::size_t /*capacity*/) -> Made { return std::make_unique<Dense>(c.wrapped); }},
  };
}

}  // namespace

std::vector<StrategyEntry>& strategy_table() {
  static std::vector<StrategyEntry> table = make_table();
  return table;
}

StrategyChains::StrategyChains(const StrategyContext& context) : chains_(kFidelities.size()) {
  const auto& table = strategy_table();
  std::size_t left = context.options.capacity_bytes;
  std::vector<std::unique_ptr<ReuseStrategy>> made(table.size());
  const auto make = [&](std::size_t i, std::size_t bytes) { made[i] = table[i].make(context, bytes); };
  std::vector<std::size_t> last;  // that take what is left
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (!table[i].wanted(context)) continue;
    if (table[i].share == nullptr) {
      last.push_back(i);
      continue;
    }
    const auto bytes = static_cast<std::size_t>(static_cast<double>(left) * table[i].share(context.options));
    left -= bytes;
    make(i, bytes);
  }
  for (const std::size_t i : last) make(i, left);
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (!made[i]) continue;
    for (const Fidelity fidelity : table[i].chains) {
      chains_[static_cast<std::size_t>(fidelity)].push_back(made[i].get());
    }
    all_.push_back(std::move(made[i]));
  }
}

const std::vector<ReuseStrategy*>& StrategyChains::of(Fidelity fidelity) const {
  return chains_[static_cast<std::size_t>(fidelity)];
}

}  // namespace llmcache
