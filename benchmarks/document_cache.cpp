#include "document_cache.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory_resource>
#include <numeric>
#include <utility>

#include "failure.h"
#include "outputs.h"

namespace llmcache::bench {
namespace {

std::int64_t widest(const DocumentCache::Rows& rows) {
  std::size_t width = 0;
  for (const auto& row : rows) width = std::max(width, row.size());
  return static_cast<std::int64_t>(width);
}

std::size_t bytes_of(const Fingerprint& fingerprint) {
  return fingerprint.vector.size() * sizeof(float) + fingerprint.bits.size() * sizeof(std::uint64_t) +
         fingerprint.shingles.size() * sizeof(std::uint64_t);
}

std::vector<at::Tensor> checked(const c10::IValue& output, std::size_t rows, std::size_t count) {
  auto tensors = tensors_of(output);
  for (const at::Tensor& tensor : tensors) {
    if (tensors.size() != count || tensor.dim() == 0 || tensor.size(0) != static_cast<std::int64_t>(rows)) {
      throw Failure("doccache: the model returns a tensor without one entry a sequence; run it without doccache");
    }
  }
  return tensors;
}

}  // namespace

DocumentCache::DocumentCache(DocumentCacheOptions options) : options_(std::move(options)) { clear(); }

void DocumentCache::clear() {
  entries_.clear();
  by_id_.clear();
  free_ids_.clear();
  served_from_.clear();
  bytes_ = 0;
  fingerprinter_ = std::make_unique<Fingerprinter>(options_.fingerprint, options_.dims);
  index_ = std::make_unique<FingerprintIndex>(options_.fingerprint.kind, std::pmr::new_delete_resource());
}

std::vector<std::vector<float>> DocumentCache::states_of(const Rows& rows, const States& states) const {
  return fingerprinter_->needs_state() ? states() : std::vector<std::vector<float>>(rows.size());
}

/// The centre has moved: old fingerprints cannot be compared with new ones.
void DocumentCache::fingerprint_again() {
  index_->clear();
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    const auto next = std::next(entry);
    auto made = fingerprinter_->make(entry->state, {});
    if (made) {
      entry->fingerprint = *std::move(made);
      index_->insert(entry->id, entry->fingerprint);
    } else {
      index_->insert(entry->id, entry->fingerprint);  // so that drop() finds it
      drop(entry);
    }
    entry = next;
  }
}

std::optional<Fingerprint> DocumentCache::fingerprint(const std::vector<std::vector<float>>& states, const Rows& rows,
                                                      std::size_t row) const {
  const std::vector<std::int64_t> ids(rows[row].begin(), rows[row].end());
  return fingerprinter_->make(states[row], ids);
}

void DocumentCache::drop(Place entry) {
  index_->erase(entry->id);
  bytes_ -= entry->bytes;
  by_id_[entry->id] = entries_.end();
  free_ids_.push_back(entry->id);
  entries_.erase(entry);
}

void DocumentCache::insert(Entry entry) {
  entry.bytes = sizeof(Entry) + 2 * bytes_of(entry.fingerprint) + entry.state.size() * sizeof(float);
  for (const at::Tensor& tensor : entry.outputs) entry.bytes += tensor.nbytes();
  if (entry.bytes > options_.capacity_bytes) return;
  while (bytes_ + entry.bytes > options_.capacity_bytes) drop(entries_.begin());
  if (free_ids_.empty()) {
    free_ids_.push_back(static_cast<std::uint32_t>(by_id_.size()));
    by_id_.push_back(entries_.end());
  }
  entry.id = free_ids_.back();
  free_ids_.pop_back();
  index_->insert(entry.id, entry.fingerprint);
  bytes_ += entry.bytes;
  const std::uint32_t id = entry.id;
  entries_.push_back(std::move(entry));
  by_id_[id] = std::prev(entries_.end());
}

void DocumentCache::keep(const Rows& rows, std::int64_t label, const std::vector<std::vector<float>>& states,
                         const std::vector<std::size_t>& chosen, const std::vector<at::Tensor>& outputs) {
  bool moved = false;
  if (fingerprinter_->needs_state()) {
    for (const auto& state : states) moved = fingerprinter_->observe(state) || moved;
  }
  if (moved) fingerprint_again();
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const std::size_t row = chosen[i];
    auto made = fingerprint(states, rows, row);
    if (!made) continue;
    Entry entry{.label = label + static_cast<std::int64_t>(row),
                .tokens = static_cast<std::int64_t>(rows[row].size()),
                .state = states[row],
                .fingerprint = *std::move(made),
                .outputs = {}};
    bool finite = true;
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      const at::Tensor whole = outputs[o][static_cast<std::int64_t>(i)];
      entry.outputs.push_back((options_.token_output[o] ? whole.narrow(0, 0, entry.tokens) : whole).clone());
      finite = finite && entry.outputs.back().isfinite().all().item<bool>();
    }
    if (finite) insert(std::move(entry));
  }
}

at::Tensor DocumentCache::laid_over(const Entry& entry, std::size_t output, std::int64_t tokens) const {
  const at::Tensor& kept = entry.outputs[output];
  if (!options_.token_output[output] || entry.tokens == tokens) return kept;
  const std::int64_t shift = options_.causal ? entry.tokens - tokens : 0;
  const at::Tensor places = (at::arange(tokens, kept.options().dtype(at::kLong)) + shift).clamp(0, entry.tokens - 1);
  return kept.index_select(0, places);
}

c10::IValue DocumentCache::forward(const Rows& rows, std::int64_t label, const States& states, const Run& run) {
  const at::NoGradGuard no_grad;
  served_from_.assign(rows.size(), std::nullopt);
  const auto values = states_of(rows, states);
  std::vector<std::size_t> missing;
  std::vector<Place> found(rows.size(), entries_.end());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto query = fingerprint(values, rows, row);
    const auto match = query ? index_->best(*query, options_.tau) : std::nullopt;
    if (!match) {
      missing.push_back(row);
      continue;
    }
    found[row] = by_id_[match->id];
    served_from_[row] = found[row]->label;
    entries_.splice(entries_.end(), entries_, found[row]);  // used just now
  }
  const std::size_t count = options_.token_output.size();
  std::vector<at::Tensor> results;
  if (missing.size() == rows.size()) {
    results = checked(run(missing), rows.size(), count);
    keep(rows, label, values, missing, results);
  } else {
    std::vector<at::Tensor> computed;
    if (!missing.empty()) computed = checked(run(missing), missing.size(), count);
    const std::int64_t width = widest(rows);
    for (std::size_t o = 0; o < count; ++o) {
      std::size_t next = 0;
      for (std::size_t row = 0; row < rows.size(); ++row) {
        const auto tokens = static_cast<std::int64_t>(rows[row].size());
        const bool hit = found[row] != entries_.end();
        const at::Tensor source =
            hit ? laid_over(*found[row], o, tokens) : computed[o][static_cast<std::int64_t>(next++)];
        const bool by_token = options_.token_output[o];
        if (row == 0) {
          std::vector<std::int64_t> sizes = source.sizes().vec();
          if (by_token) sizes[0] = width;
          sizes.insert(sizes.begin(), static_cast<std::int64_t>(rows.size()));
          results.push_back(at::zeros(sizes, source.options()));
        }
        const at::Tensor target = results[o][static_cast<std::int64_t>(row)];
        if (by_token) {
          target.narrow(0, 0, tokens).copy_(source.narrow(0, 0, tokens));
        } else {
          target.copy_(source);
        }
      }
    }
    keep(rows, label, values, missing, computed);
  }
  if (results.size() == 1) return results[0];
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(results.begin(), results.end()));
}

void DocumentCache::fill(const Rows& rows, std::int64_t label, const States& states, const Run& run) {
  const at::NoGradGuard no_grad;
  const auto values = states_of(rows, states);
  std::vector<std::size_t> all(rows.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  keep(rows, label, values, all, checked(run(all), rows.size(), options_.token_output.size()));
}

}  // namespace llmcache::bench
