#include "reuse/answers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "execute/engine.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

/// Of a row's real tokens, the number of those whose results were asked for: the last ones.
std::int64_t asked_of(std::int64_t tokens, std::int64_t known, Output output) {
  switch (output) {
    case Output::kLastToken:
      return std::min<std::int64_t>(1, tokens);
    case Output::kNewTokens:
      return tokens - known;
    default:
      return tokens;
  }
}

}  // namespace

Answers::Answers(const Call& call, ForwardReport& report)
    : call_(call),
      report_(report),
      known_(static_cast<std::size_t>(call.batch.rows)),
      done_(known_.size()),
      mechanisms_(known_.size(), Mechanism::kDense),
      evicted_(known_.size(), MissReason::kNew),
      stored_(known_.size(), MissReason::kNew) {
  report_.sequences = count_tokens(call.batch.full_plan(call.wrapped.layers()));
  for (std::size_t row = 0; row < report_.sequences.size(); ++row) {
    report_.sequences[row].number = call.first_number + row;
    if (!call.batch.source.tokens.empty()) report_.sequences[row].source_tokens = call.batch.source.tokens[row];
  }
}

bool Answers::complete() const { return (any_known_ || !passes_.empty()) && open_rows().empty(); }

const std::vector<std::int64_t>& Answers::open_rows() const {
  if (!stale_) return open_rows_;
  const bool skips_empty = (any_known_ || !passes_.empty()) && call_.wrapped.all_per_token();
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < call_.batch.rows; ++row) {
    const auto i = static_cast<std::size_t>(row);
    const bool empty = call_.batch.spans[i].tokens == 0;
    if (!done_[i] && !(empty && skips_empty)) rows.push_back(row);
  }
  open_rows_ = std::move(rows);
  stale_ = false;
  return open_rows_;
}

const Batch& Answers::open() {
  if (!open_ && static_cast<std::int64_t>(open_rows().size()) == call_.batch.rows) return call_.batch;
  if (!open_) open_.emplace(call_.batch.select(open_rows_));
  return *open_;
}

void Answers::know_source(KnownSource known) {
  const std::vector<std::int64_t>& rows = open_rows();
  if (!open_) open_.emplace(open());
  sizes_.insert(sizes_.end(), known.sizes.begin(), known.sizes.end());
  owners_.insert(owners_.end(), known.owners.begin(), known.owners.end());
  // Nothing fails from here on.
  open_->source.values = std::move(known.values);
  reused_source_ = !known.as_model;
  for (std::size_t k = 0; k < rows.size(); ++k) {
    report_.sequences[static_cast<std::size_t>(rows[k])].source_reused = known.reused_tokens[k];
  }
  report_.lookup_ms += known.lookup_ms;
  report_.embed_ms += known.compute_ms;
}

void Answers::forget_source() noexcept {
  if (!open_ || open_->source.values.empty()) return;
  open_->source.values.clear();
  for (const std::int64_t row : open_rows_) report_.sequences[static_cast<std::size_t>(row)].source_reused = 0;
}

void Answers::put_known(std::int64_t row, std::vector<at::Tensor> tensors, std::vector<SizeCode> sizes,
                        std::shared_ptr<const void> owner) {
  owners_.reserve(owners_.size() + 1);
  sizes_.insert(sizes_.end(), sizes.begin(), sizes.end());
  // Nothing fails from here on.
  owners_.push_back(std::move(owner));
  known_[static_cast<std::size_t>(row)] = std::move(tensors);
  done_[static_cast<std::size_t>(row)] = 1;
  mechanisms_[static_cast<std::size_t>(row)] = Mechanism::kExactMatch;
  any_known_ = true;
  SequenceReport& sequence = report_.sequences[static_cast<std::size_t>(row)];
  sequence.source = Source::kIdentical;
  sequence.similarity = 1;
  sequence.reused_tokens = sequence.tokens;
  sequence.source_reused = sequence.source_tokens;
  for (LayerTokens& layer : sequence.layers) {
    layer.reused += layer.computed;
    layer.computed = 0;
  }
  open_.reset();
  stale_ = true;
}

void Answers::put(PassResult pass) { put(std::vector<std::int64_t>(open_rows()), std::move(pass)); }

void Answers::put(std::vector<std::int64_t> rows, PassResult pass) {
  ForwardReport& own = pass.report;
  sizes_.insert(sizes_.end(), pass.sizes.begin(), pass.sizes.end());
  report_.layer_ms.resize(std::max(report_.layer_ms.size(), own.layer_ms.size()));
  passes_.reserve(passes_.size() + 1);
  // Nothing fails from here on.
  const bool packed = own.execution == Execution::kPacked;
  const bool source_given = open_ && !open_->source.values.empty();
  for (std::size_t k = 0; k < rows.size(); ++k) {
    const auto row = static_cast<std::size_t>(rows[k]);
    SequenceReport& sequence = report_.sequences[row];
    SequenceReport made = std::move(own.sequences[k]);
    made.number = sequence.number;
    made.source_tokens = sequence.source_tokens;
    made.source_reused = sequence.source_reused;
    sequence = std::move(made);
    sequence.miss = reason_for(sequence, row);
    done_[row] = 1;
    const bool known = sequence.source != Source::kComputed || sequence.shared_tokens > 0;
    // The one whose closing closes all that had a part.
    mechanisms_[row] = known          ? Mechanism::kPrefix
                       : source_given ? Mechanism::kSource
                       : packed       ? Mechanism::kPacked
                                      : Mechanism::kDense;
    if (packed) padding_skipped_ += call_.batch.padded_length - sequence.tokens;
  }
  if (report_.execution != Execution::kPacked) report_.execution = own.execution;
  report_.lookup_ms += own.lookup_ms;
  report_.embed_ms += own.embed_ms;
  report_.head_ms += own.head_ms;
  report_.store_ms += own.store_ms;
  for (std::size_t l = 0; l < own.layer_ms.size(); ++l) report_.layer_ms[l] += own.layer_ms[l];
  passes_.push_back({std::move(rows), std::move(pass)});
  open_.reset();
  stale_ = true;
}

/// The reason that says most.
MissReason Answers::reason_for(const SequenceReport& sequence, std::size_t row) const noexcept {
  if (!fallbacks_.empty()) return MissReason::kFallback;
  if (sequence.audited) return MissReason::kAudit;
  const MissReason stored = stored_[row];
  // A store may have what the memory has lost: that it gave no answer says more.
  if (stored == MissReason::kStoreTimeout || stored == MissReason::kStoreFailed) return stored;
  if (evicted_[row] != MissReason::kNew) return evicted_[row];
  if (sequence.miss != MissReason::kNew) return sequence.miss;
  return stored == MissReason::kNew ? expected_miss_ : stored;
}

bool Answers::cuts() const { return !passes_.empty() && passes_.front().result.cut; }

c10::IValue Answers::result() const {
  const auto empty = [](const std::vector<at::Tensor>& row) { return row.empty(); };
  const bool one_pass =
      !any_known_ && passes_.size() == 1 && static_cast<std::int64_t>(passes_[0].rows.size()) == call_.batch.rows;
  const bool as_it_is = one_pass && !passes_[0].result.value.isNone() &&
                        std::all_of(passes_[0].result.rows.begin(), passes_[0].result.rows.end(), empty);
  auto whole = as_it_is ? passes_[0].result.value : assemble();
  return cuts() ? whole : cut_output(whole, call_.wrapped.output, call_.batch, known_tokens(), call_.request.output);
}

std::vector<std::int64_t> Answers::known_tokens() const {
  std::vector<std::int64_t> known;
  for (const SequenceReport& sequence : report_.sequences) known.push_back(sequence.reused_tokens);
  return known;
}

std::int64_t Answers::asked_tokens(std::int64_t row) const {
  const auto i = static_cast<std::size_t>(row);
  return asked_of(call_.batch.spans[i].tokens, report_.sequences[i].reused_tokens, call_.request.output);
}

c10::IValue Answers::assemble() const {
  std::vector<std::vector<at::Tensor>> computed;  // by pass; empty: nobody needs its result
  for (const Pass& pass : passes_) {
    computed.push_back(pass.result.value.isNone() ? std::vector<at::Tensor>{} : tensors_of(pass.result.value));
  }
  std::size_t leaf = 0;
  return map_tensors(call_.wrapped.result_form, [&](const at::Tensor& form) {
    const auto all = assemble_leaf(leaf++, computed);
    // No row has a token that was asked for.
    if (!all.defined()) {
      auto sizes = form.sizes().vec();
      const TokenDims& dims = call_.wrapped.output.leaves[leaf - 1];
      sizes[static_cast<std::size_t>(dims.batch)] = call_.batch.rows;
      if (dims.tokens >= 0) sizes[static_cast<std::size_t>(dims.tokens)] = 0;
      return at::zeros(sizes, form.options().device(call_.wrapped.model->device()));
    }
    return all;
  });
}

/// One tensor of the result, padding zero: rows from their own tensors, the others from their pass. Undefined: there is
/// none.
at::Tensor Answers::assemble_leaf(std::size_t leaf, const std::vector<std::vector<at::Tensor>>& computed) const {
  const TokenDims& dims = call_.wrapped.output.leaves[leaf];
  const Batch& batch = call_.batch;
  const bool cut = cuts() && dims.tokens >= 0;
  struct RowSource {
    at::Tensor rows;  // batch dimension 1; undefined: there is none
    bool own = false;
  };
  std::vector<RowSource> sources(static_cast<std::size_t>(batch.rows));
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (!known_[i].empty()) sources[i] = {known_[i][leaf], true};
  }
  for (std::size_t p = 0; p < passes_.size(); ++p) {
    for (std::size_t k = 0; k < passes_[p].rows.size(); ++k) {
      RowSource& source = sources[static_cast<std::size_t>(passes_[p].rows[k])];
      const auto& own = passes_[p].result.rows;
      if (k < own.size() && !own[k].empty()) {
        source = {own[k][leaf], true};
      } else if (!computed[p].empty()) {
        source = {computed[p][leaf].narrow(dims.batch, static_cast<std::int64_t>(k), 1), false};
      }
    }
  }
  at::Tensor sample;
  std::int64_t tokens = cut || !call_.wrapped.ignores_padding() ? 0 : batch.padded_length;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& rows = sources[i].rows;
    if (!rows.defined()) continue;
    if (!sample.defined()) sample = rows;
    if (dims.tokens < 0) continue;
    // Whole rows are kept as the model made them, which may be shorter than its input.
    tokens =
        std::max(tokens, cut && sources[i].own ? asked_tokens(static_cast<std::int64_t>(i)) : rows.size(dims.tokens));
  }
  if (!sample.defined()) return {};
  auto shape = sample.sizes().vec();
  shape[static_cast<std::size_t>(dims.batch)] = batch.rows;
  if (dims.tokens >= 0) shape[static_cast<std::size_t>(dims.tokens)] = tokens;
  auto all = batch.padded || cut ? at::zeros(shape, sample.options()) : at::empty(shape, sample.options());
  for (std::size_t i = 0; i < sources.size(); ++i) {
    at::Tensor rows = sources[i].rows;
    if (!rows.defined()) continue;
    auto target = all.narrow(dims.batch, static_cast<std::int64_t>(i), 1);
    if (dims.tokens >= 0) {
      std::int64_t first = 0;
      if (cut && sources[i].own) {
        const std::int64_t asked = asked_tokens(static_cast<std::int64_t>(i));
        rows = rows.narrow(dims.tokens, rows.size(dims.tokens) - asked, asked);
      } else if (!cut && sources[i].own && rows.size(dims.tokens) != tokens) {
        first = batch.spans[i].first;
      }
      target = target.narrow(dims.tokens, first, rows.size(dims.tokens));
    }
    target.copy_(rows);
  }
  return all;
}

c10::IValue cut_output(const c10::IValue& result, const OutputSpec& spec, const Batch& batch,
                       const std::vector<std::int64_t>& known, Output output) {
  if (output == Output::kAll) return result;
  std::size_t leaf = 0;
  return map_tensors(result, [&](const at::Tensor& all) {
    const TokenDims& dims = spec.leaves.at(leaf++);
    if (dims.tokens < 0 || dims.batch < 0 || all.size(dims.tokens) != batch.padded_length) return all;
    std::vector<std::int64_t> asked;
    std::int64_t padded_length = output == Output::kLastToken ? 1 : 0;
    for (std::size_t row = 0; row < known.size(); ++row) {
      asked.push_back(asked_of(batch.spans[row].tokens, known[row], output));
      padded_length = std::max(padded_length, asked.back());
    }
    auto shape = all.sizes().vec();
    shape[static_cast<std::size_t>(dims.tokens)] = padded_length;
    auto part = at::zeros(shape, all.options());
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
      const std::int64_t tokens = asked[static_cast<std::size_t>(row)];
      part.narrow(dims.batch, row, 1)
          .narrow(dims.tokens, 0, tokens)
          .copy_(all.narrow(dims.batch, row, 1).narrow(dims.tokens, span.first + span.tokens - tokens, tokens));
    }
    return part;
  });
}

}  // namespace llmcache
