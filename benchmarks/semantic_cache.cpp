#include "semantic_cache.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "failure.h"

namespace llmcache::bench {
namespace {

/// `rows` as one tensor, padded with zeros to `length` tokens where they have one entry a token.
at::Tensor stacked(const std::vector<at::Tensor>& rows, bool by_token, std::int64_t length) {
  std::vector<std::int64_t> sizes = rows.front().sizes().vec();
  if (by_token) sizes[0] = length;
  sizes.insert(sizes.begin(), static_cast<std::int64_t>(rows.size()));
  const at::Tensor all = at::zeros(sizes, rows.front().options());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const at::Tensor target = all[static_cast<std::int64_t>(row)];
    (by_token ? target.narrow(0, 0, rows[row].size(0)) : target).copy_(rows[row]);
  }
  return all;
}

}  // namespace

SemanticCache::SemanticCache(SemanticCacheOptions options) : options_(std::move(options)) { clear(); }

void SemanticCache::clear() {
  served_from_.clear();
  bank_.reset();  // before the fingerprints that it makes again
  fingerprinter_ = std::make_unique<Fingerprinter>(options_.fingerprint, options_.hidden_size);
  bank_ = std::make_unique<LayerBank>(LayerBank::Settings{.capacity_bytes = options_.capacity_bytes, .eviction = {}},
                                      std::vector<const Fingerprinter*>{fingerprinter_.get()});
}

std::vector<at::Tensor> SemanticCache::checked(const c10::IValue& output, std::size_t rows) const {
  auto tensors = tensors_of(output);
  const auto fits = [&](const at::Tensor& t) { return t.dim() > 0 && t.size(0) == static_cast<std::int64_t>(rows); };
  if (tensors.size() == options_.token_output.size() && std::ranges::all_of(tensors, fits)) return tensors;
  throw Failure("semantic-cache: the model returns a tensor without one entry a sequence; run it without this mode");
}

std::vector<std::vector<float>> SemanticCache::states_of(const Rows& rows, const States& states) const {
  return fingerprinter_->needs_state() ? states() : std::vector<std::vector<float>>(rows.size());
}

void SemanticCache::keep(const Rows& rows, std::int64_t label, const std::vector<std::vector<float>>& states,
                         const std::vector<std::size_t>& chosen, const std::vector<at::Tensor>& outputs) {
  if (fingerprinter_->needs_state()) {
    for (const auto& state : states) fingerprinter_->observe(state);
  }
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const std::size_t row = chosen[i];
    const std::int64_t tokens = std::ssize(rows[row]);
    LayerBank::Candidate candidate{.number = static_cast<std::uint64_t>(label) + row,
                                   .hidden = at::empty({1, tokens, 0}),
                                   .inputs = {},
                                   .states = {states[row]},
                                   .fingerprints = {},
                                   .ids = {rows[row].begin(), rows[row].end()},
                                   .key = ++kept_};
    candidate.fingerprints = {fingerprinter_->make(states[row], candidate.ids)};
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      const at::Tensor whole = outputs[o][static_cast<std::int64_t>(i)];
      candidate.inputs.push_back((options_.token_output[o] ? whole.narrow(0, 0, tokens) : whole).clone());
    }
    const auto finite = [](const at::Tensor& tensor) { return tensor.isfinite().all().item<bool>(); };
    if (std::ranges::all_of(candidate.inputs, finite)) bank_->insert({}, candidate, 0);
  }
}

at::Tensor SemanticCache::laid_over(const LayerEntry& entry, std::size_t output, std::int64_t tokens) const {
  const at::Tensor& kept = entry.inputs()[output];
  if (!options_.token_output[output] || entry.tokens() == tokens) return kept;
  const std::int64_t shift = options_.causal ? entry.tokens() - tokens : 0;
  const at::Tensor places = (at::arange(tokens, kept.options().dtype(at::kLong)) + shift).clamp(0, entry.tokens() - 1);
  return kept.index_select(0, places);
}

c10::IValue SemanticCache::forward(const Rows& rows, std::int64_t label, const States& states, const Forward& run) {
  const at::NoGradGuard no_grad;
  served_from_.assign(rows.size(), std::nullopt);
  const auto values = states_of(rows, states);
  std::vector<std::size_t> missing;
  std::vector<std::shared_ptr<const LayerEntry>> found(rows.size());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto query = fingerprinter_->make(values[row], std::vector<std::int64_t>(rows[row].begin(), rows[row].end()));
    const auto match = query ? bank_->find({}, 0, *query, options_.tau, 0) : std::nullopt;
    if (!match) {
      missing.push_back(row);
      continue;
    }
    found[row] = match->entry;
    served_from_[row] = static_cast<std::int64_t>(match->entry->number());
  }
  std::vector<at::Tensor> computed;
  if (!missing.empty()) computed = checked(run(missing), missing.size());
  std::vector<at::Tensor> results = missing.size() == rows.size() ? computed : std::vector<at::Tensor>();
  for (std::size_t o = results.size(); o < options_.token_output.size(); ++o) {
    std::vector<at::Tensor> outputs;
    std::int64_t next = 0;
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const std::int64_t tokens = std::ssize(rows[row]);
      if (found[row]) {
        outputs.push_back(laid_over(*found[row], o, tokens));
      } else {
        const at::Tensor own = computed[o][next++];
        outputs.push_back(options_.token_output[o] ? own.narrow(0, 0, tokens) : own);
      }
    }
    results.push_back(stacked(outputs, options_.token_output[o], padded_length(rows)));
  }
  keep(rows, label, values, missing, computed);
  if (results.size() == 1) return results[0];
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(results.begin(), results.end()));
}

void SemanticCache::fill(const Rows& rows, std::int64_t label, const States& states, const Forward& run) {
  const at::NoGradGuard no_grad;
  const auto values = states_of(rows, states);
  std::vector<std::size_t> all(rows.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  keep(rows, label, values, all, checked(run(all), rows.size()));
}

}  // namespace llmcache::bench
