#include "known_outputs.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "execute/engine.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

void append(std::string& key, const void* data, std::size_t bytes) {
  key.append(static_cast<const char*>(data), bytes);
}
void append(std::string& key, std::int64_t number) { append(key, &number, sizeof(number)); }

/// Answers that are not to be taken for the model's own.
bool is_approximate(Source source) { return source == Source::kEarlyExit || source == Source::kPartial; }

}  // namespace

KnownRows::KnownRows(std::size_t rows) : keys(rows), entries(rows), missing(rows) {
  std::iota(missing.begin(), missing.end(), std::int64_t{0});
}

KnownOutputs::KnownOutputs(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                           const ModelProfile& profile, std::size_t capacity_bytes, MemoryAccount* total)
    : model_(model), output_(output), profile_(profile), bank_(capacity_bytes, total) {
  all_per_token_ =
      std::all_of(output.leaves.begin(), output.leaves.end(), [](const TokenDims& dims) { return dims.tokens >= 0; });
  if (!keeps_rows(profile)) return;
  const auto given = probe_inputs(inputs.vocabulary, model.device(), 1, 5);
  auto result = model.plain(given);
  if (result.isNone()) result = run_dense(model, given);
  skeleton_ =
      map_tensors(result, [](const at::Tensor& t) { return at::empty(t.sizes(), t.options().device(at::kMeta)); });
}

std::string KnownOutputs::key_of(const Batch& batch, const std::vector<at::Tensor>& on_cpu, std::int64_t row,
                                 const std::string& tenant) const {
  const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
  const bool cut = ignores_padding() && batch.contiguous;
  const std::int64_t first = cut ? span.first : 0;
  const std::int64_t count = cut ? span.tokens : batch.width;
  std::string key;
  append(key, static_cast<std::int64_t>(tenant.size()));
  key += tenant;
  append(key, first);
  append(key, count);
  // Padding in front is part of it: ids there may decide positions. Padding behind is not.
  for (std::size_t i = 0; i < on_cpu.size(); ++i) {
    if (!on_cpu[i].defined()) {
      key.push_back(static_cast<char>(-1));
      continue;
    }
    key.push_back(static_cast<char>(on_cpu[i].scalar_type()));
    const auto size = static_cast<std::int64_t>(on_cpu[i].element_size());
    append(key, static_cast<const char*>(on_cpu[i].const_data_ptr()) + row * batch.width * size,
           static_cast<std::size_t>((first + count) * size));
  }
  return key;
}

c10::IValue KnownOutputs::assemble(const Batch& batch, const std::vector<std::vector<at::Tensor>>& known,
                                   const std::vector<std::int64_t>& missing, const c10::IValue& computed) const {
  const auto fresh = missing.empty() ? std::vector<at::Tensor>{} : tensors_of(computed);
  std::size_t leaf = 0;
  return map_tensors(skeleton_, [&](const at::Tensor&) {
    const TokenDims& dims = output_.leaves[leaf];
    at::Tensor all;
    const auto sample = [&]() -> at::Tensor {
      for (const auto& tensors : known) {
        if (!tensors.empty()) return tensors[leaf];
      }
      return fresh[leaf];
    }();
    auto shape = sample.sizes().vec();
    shape[static_cast<std::size_t>(dims.batch)] = batch.rows;
    // Whole rows are kept as the model made them, which may be shorter than its input.
    if (dims.tokens >= 0 && ignores_padding()) shape[static_cast<std::size_t>(dims.tokens)] = batch.width;
    all = at::empty(shape, sample.options());
    if (batch.padded) all.zero_();
    for (std::size_t i = 0; i < missing.size(); ++i) {
      all.narrow(dims.batch, missing[i], 1).copy_(fresh[leaf].narrow(dims.batch, static_cast<std::int64_t>(i), 1));
    }
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const auto& tensors = known[static_cast<std::size_t>(row)];
      if (tensors.empty()) continue;
      auto target = all.narrow(dims.batch, row, 1);
      const auto& kept = tensors[leaf];
      if (dims.tokens >= 0) {
        const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
        const bool whole = kept.size(dims.tokens) == all.size(dims.tokens);
        target = target.narrow(dims.tokens, whole ? 0 : span.first, kept.size(dims.tokens));
      }
      target.copy_(kept);
    }
    ++leaf;
    return all;
  });
}

c10::IValue KnownOutputs::assemble(const Batch& batch, const KnownRows& known, const c10::IValue& computed) const {
  std::vector<std::vector<at::Tensor>> tensors(known.entries.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (known.entries[i]) tensors[i].assign(known.entries[i]->tensors().begin(), known.entries[i]->tensors().end());
  }
  return assemble(batch, tensors, known.missing, computed);
}

KnownRows KnownOutputs::look_up(const Batch& batch, const std::string& tenant, bool exact, ForwardReport& report) {
  KnownRows known(static_cast<std::size_t>(batch.rows));
  known.missing.clear();
  std::vector<at::Tensor> on_cpu;
  for (const c10::IValue& input : batch.inputs) {
    on_cpu.push_back(input.isTensor() ? input.toTensor().cpu().contiguous() : at::Tensor());
  }
  bool any_known = false;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const auto i = static_cast<std::size_t>(row);
    if (batch.spans[i].tokens == 0) continue;
    known.keys[i] = key_of(batch, on_cpu, row, tenant);
    known.entries[i] = bank_.find(known.keys[i], exact);
    any_known = any_known || known.entries[i];
  }
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const auto i = static_cast<std::size_t>(row);
    const bool only_padding = batch.spans[i].tokens == 0 && all_per_token_ && any_known;
    if (!known.entries[i] && !only_padding) known.missing.push_back(row);
    if (!known.entries[i]) continue;
    SequenceReport& sequence = report.sequences[i];
    sequence.source = Source::kIdentical;
    sequence.similarity = 1;
    sequence.reused_tokens = sequence.tokens;
    for (LayerTokens& layer : sequence.layers) std::swap(layer.computed, layer.reused);
  }
  return known;
}

void KnownOutputs::keep(const Batch& batch, const KnownRows& known, const c10::IValue& result, bool exact,
                        bool small_only, const ForwardReport& report, KeptLater& kept) {
  struct Row {
    std::string key;
    std::vector<at::Tensor> tensors;
  };
  std::vector<Row> rows;
  for (std::size_t m = 0; m < known.missing.size(); ++m) {
    const auto i = static_cast<std::size_t>(known.missing[m]);
    if (known.keys[i].empty() || is_approximate(report.sequences[i].source)) continue;
    const RowSpan& span = batch.spans[i];
    const bool cut = ignores_padding() && batch.contiguous;
    auto tensors = row_of(result, output_, static_cast<std::int64_t>(m), cut ? span.first : 0,
                          cut ? span.tokens : batch.width, batch.width);
    if (small_only) {
      // Its states are kept, which give the output again: worth room only for whole requests and small outputs.
      std::size_t bytes = 0;
      for (const at::Tensor& tensor : tensors) bytes += tensor.nbytes();
      if (report.sequences[i].reused_tokens > 0 || bytes > bank_.capacity() / 8) continue;
    }
    rows.push_back({known.keys[i], std::move(tensors)});
  }
  if (rows.empty()) return;
  const BatchSize size{static_cast<std::int32_t>(known.missing.size()), static_cast<std::int32_t>(batch.width)};
  kept.add([this, rows = std::move(rows), exact, size] {
    for (const Row& row : rows) bank_.insert(row.key, row.tensors, exact, size);
  });
}

c10::IValue KnownOutputs::no_tokens(std::int64_t rows) const {
  std::size_t leaf = 0;
  return map_tensors(skeleton_, [&](const at::Tensor& like) {
    const TokenDims& dims = output_.leaves[leaf++];
    auto shape = like.sizes().vec();
    shape[static_cast<std::size_t>(dims.batch)] = rows;
    if (dims.tokens >= 0) shape[static_cast<std::size_t>(dims.tokens)] = 0;
    return at::zeros(shape, like.options().device(model_.device()));
  });
}

}  // namespace llmcache
