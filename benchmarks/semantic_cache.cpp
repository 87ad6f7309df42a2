#include "semantic_cache.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory_resource>
#include <numeric>
#include <utility>

#include "failure.h"

namespace llmcache::bench {
namespace {

std::size_t bytes_of(const Fingerprint& fingerprint) {
  return fingerprint.vector.size() * sizeof(float) + fingerprint.bits.size() * sizeof(std::uint64_t) +
         fingerprint.shingles.size() * sizeof(std::uint64_t);
}

/// `rows` as one tensor, padded with zeros to `padded_length` tokens where they have one entry a token.
at::Tensor stacked(const std::vector<at::Tensor>& rows, bool by_token, std::int64_t padded_length) {
  std::vector<std::int64_t> sizes = rows.front().sizes().vec();
  if (by_token) sizes[0] = padded_length;
  sizes.insert(sizes.begin(), static_cast<std::int64_t>(rows.size()));
  const at::Tensor all = at::zeros(sizes, rows.front().options());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const at::Tensor target = all[static_cast<std::int64_t>(row)];
    (by_token ? target.narrow(0, 0, rows[row].size(0)) : target).copy_(rows[row]);
  }
  return all;
}

}  // namespace

SemanticCache::SemanticCache(SemanticCacheOptions options)
    : options_(std::move(options)),
      index_(options_.fingerprint.kind, std::pmr::new_delete_resource()),
      recency_({}, std::pmr::new_delete_resource()) {
  clear();
}

void SemanticCache::clear() {
  entries_.clear();
  free_slots_.clear();
  served_from_.clear();
  recency_.clear();
  index_.clear();
  bytes_ = 0;
  fingerprinter_ = std::make_unique<Fingerprinter>(options_.fingerprint, options_.hidden_size);
}

std::vector<at::Tensor> SemanticCache::checked(const c10::IValue& output, std::size_t rows) const {
  auto tensors = tensors_of(output);
  for (const at::Tensor& tensor : tensors) {
    if (tensors.size() == options_.token_output.size() && tensor.dim() > 0 &&
        tensor.size(0) == static_cast<std::int64_t>(rows)) {
      continue;
    }
    throw Failure("semantic-cache: the model returns a tensor without one entry a sequence; run it without this mode");
  }
  return tensors;
}

/// The centre has moved: old fingerprints cannot be compared with new ones.
void SemanticCache::fingerprint_again() {
  index_.clear();
  for (std::uint32_t slot = 0; slot < entries_.size(); ++slot) {
    if (!recency_.contains(slot)) continue;
    if (auto made = fingerprinter_->make(entries_[slot].state, {})) {
      entries_[slot].fingerprint = *std::move(made);
      index_.insert(slot, entries_[slot].fingerprint);
    } else {
      drop(slot);
    }
  }
}

void SemanticCache::drop(std::uint32_t slot) {
  index_.erase(slot);
  recency_.erase(slot);
  bytes_ -= entries_[slot].bytes;
  entries_[slot] = {};
  free_slots_.push_back(slot);
}

void SemanticCache::insert(Entry entry) {
  entry.bytes = sizeof(Entry) + 2 * bytes_of(entry.fingerprint) + entry.state.size() * sizeof(float);
  for (const at::Tensor& tensor : entry.outputs) entry.bytes += tensor.nbytes();
  if (entry.bytes > options_.capacity_bytes) return;
  while (bytes_ + entry.bytes > options_.capacity_bytes) drop(recency_.victim(0).value());
  if (free_slots_.empty()) {
    free_slots_.push_back(static_cast<std::uint32_t>(entries_.size()));
    entries_.emplace_back();
  }
  const std::uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  index_.insert(slot, entry.fingerprint);
  recency_.insert(slot, {}, 0);
  bytes_ += entry.bytes;
  entries_[slot] = std::move(entry);
}

void SemanticCache::keep(const Rows& rows, std::int64_t label, const std::vector<std::vector<float>>& states,
                         const std::vector<std::size_t>& chosen, const std::vector<at::Tensor>& outputs) {
  bool moved = false;
  if (fingerprinter_->needs_state()) {
    for (const auto& state : states) moved = fingerprinter_->observe(state) || moved;
  }
  if (moved) fingerprint_again();
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const std::size_t row = chosen[i];
    const std::vector<std::int64_t> ids(rows[row].begin(), rows[row].end());
    auto made = fingerprinter_->make(states[row], ids);
    if (!made) continue;
    Entry entry{.label = label + static_cast<std::int64_t>(row),
                .tokens = static_cast<std::int64_t>(ids.size()),
                .state = states[row],
                .fingerprint = *std::move(made),
                .outputs = {}};
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      const at::Tensor whole = outputs[o][static_cast<std::int64_t>(i)];
      entry.outputs.push_back((options_.token_output[o] ? whole.narrow(0, 0, entry.tokens) : whole).clone());
    }
    const auto finite = [](const at::Tensor& tensor) { return tensor.isfinite().all().item<bool>(); };
    if (std::ranges::all_of(entry.outputs, finite)) insert(std::move(entry));
  }
}

at::Tensor SemanticCache::laid_over(const Entry& entry, std::size_t output, std::int64_t tokens) const {
  const at::Tensor& kept = entry.outputs[output];
  if (!options_.token_output[output] || entry.tokens == tokens) return kept;
  const std::int64_t shift = options_.causal ? entry.tokens - tokens : 0;
  const at::Tensor places = (at::arange(tokens, kept.options().dtype(at::kLong)) + shift).clamp(0, entry.tokens - 1);
  return kept.index_select(0, places);
}

c10::IValue SemanticCache::forward(const Rows& rows, std::int64_t label, const States& states, const Forward& run) {
  const at::NoGradGuard no_grad;
  served_from_.assign(rows.size(), std::nullopt);
  const auto values = fingerprinter_->needs_state() ? states() : std::vector<std::vector<float>>(rows.size());
  std::vector<std::size_t> missing;
  std::vector<std::optional<std::uint32_t>> found(rows.size());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto query = fingerprinter_->make(values[row], std::vector<std::int64_t>(rows[row].begin(), rows[row].end()));
    const auto match = query ? index_.best(*query, options_.tau) : std::nullopt;
    if (!match) {
      missing.push_back(row);
      continue;
    }
    found[row] = match->id;
    served_from_[row] = entries_[match->id].label;
    recency_.hit(match->id, 0);
  }
  std::vector<at::Tensor> computed;
  if (!missing.empty()) computed = checked(run(missing), missing.size());
  std::vector<at::Tensor> results = missing.size() == rows.size() ? computed : std::vector<at::Tensor>();
  std::size_t padded_length = 0;
  for (const auto& row : rows) padded_length = std::max(padded_length, row.size());
  for (std::size_t o = results.size(); o < options_.token_output.size(); ++o) {
    std::vector<at::Tensor> outputs;
    std::int64_t next = 0;
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const auto tokens = static_cast<std::int64_t>(rows[row].size());
      if (found[row]) {
        outputs.push_back(laid_over(entries_[*found[row]], o, tokens));
      } else {
        const at::Tensor own = computed[o][next++];
        outputs.push_back(options_.token_output[o] ? own.narrow(0, 0, tokens) : own);
      }
    }
    results.push_back(stacked(outputs, options_.token_output[o], static_cast<std::int64_t>(padded_length)));
  }
  keep(rows, label, values, missing, computed);
  if (results.size() == 1) return results[0];
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(results.begin(), results.end()));
}

void SemanticCache::fill(const Rows& rows, std::int64_t label, const States& states, const Forward& run) {
  const at::NoGradGuard no_grad;
  const auto values = fingerprinter_->needs_state() ? states() : std::vector<std::vector<float>>(rows.size());
  std::vector<std::size_t> all(rows.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  keep(rows, label, values, all, checked(run(all), rows.size()));
}

}  // namespace llmcache::bench
