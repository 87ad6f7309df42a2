#include "reuse/exact_match/exact_match.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "execute/clock.h"
#include "reuse/exact_match/output_part.h"
#include "reuse/exact_match/stored_outputs.h"
#include "reuse/miss_reason.h"

namespace llmcache {
namespace {

/// Of one row's output that takes no more of the capacity than this, a second copy beside its states is worth room.
constexpr std::size_t kSmallPart = 8;

/// Sizes of the batches that a known row was computed in, and is served in.
std::vector<SizeCode> sizes_of(const OutputEntry& entry, const Batch& batch) {
  const bool same_call = batch.rows == 1 && entry.rows() == 1 && entry.padded_length() == batch.padded_length;
  if (same_call) return {};  // the plain model would be given just what it was given then
  return {{SizeCode::Kind::kMatchRows, entry.rows_class(), size_class(batch.rows)},
          {SizeCode::Kind::kMatchLength, entry.length_class(), size_class(batch.padded_length)}};
}

}  // namespace

bool ExactMatch::accepts(const Call& call) const {
  return wrapped_.keeps_rows() && bank_.capacity() > 0 && call.batch.rows > 0 && call.batch.padded_length > 0 &&
         !(call.cuts_output && call.request.output != Output::kAll) && !verification_.closed(Mechanism::kExactMatch);
}

std::string ExactMatch::key_of(const Call& call, std::int64_t row) const {
  const bool padding = !cuts(call.batch) || !call.batch.reads_real_token(row);
  return call.batch.whole_key(row, call.request.tenant, padding);
}

void ExactMatch::serve(const Call& call, Answers& answers) {
  Stopwatch clock;
  bool any = false;
  for (std::int64_t row = 0; row < call.batch.rows; ++row) {
    if (call.batch.spans[static_cast<std::size_t>(row)].tokens == 0) continue;
    const std::string key = key_of(call, row);
    const auto entry = bank_.find(key, call.fidelity == Fidelity::kIdentical);
    if (!entry) {
      if (const auto cause = bank_.why_gone(key)) answers.was_evicted(row, miss_reason_of(*cause));
      continue;
    }
    any = true;
    for (const at::Tensor& tensor : entry->tensors()) wrapped_.streams->uses(tensor);
    answers.put_known(row, {entry->tensors().begin(), entry->tensors().end()}, sizes_of(*entry, call.batch), entry);
  }
  if (any) wrapped_.streams->enter(wrapped_.model->device());
  answers.report().lookup_ms += clock.lap();
}

void ExactMatch::store(const Call& call, Answers& answers) {
  for (const Answers::Pass& pass : answers.passes()) {
    if (pass.result.storable && !pass.result.value.isNone()) store(call, pass, answers);
  }
}

void ExactMatch::store(const Call& call, const Answers::Pass& pass, Answers& answers) {
  const auto approximate = [](Source source) { return source == Source::kEarlyExit || source == Source::kPartial; };
  const Batch& batch = call.batch;
  struct Row {
    std::string key;
    std::vector<at::Tensor> tensors;
  };
  std::vector<Row> rows;
  for (std::size_t k = 0; k < pass.rows.size(); ++k) {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(pass.rows[k])];
    const SequenceReport& report = answers.report().sequences[static_cast<std::size_t>(pass.rows[k])];
    if (span.tokens == 0 || approximate(report.source)) continue;
    const bool own = k < pass.result.rows.size() && !pass.result.rows[k].empty();
    auto tensors =
        own ? pass.result.rows[k]
            : row_of(pass.result.value, wrapped_.output, static_cast<std::int64_t>(k), cuts(batch) ? span.first : 0,
                     cuts(batch) ? span.tokens : batch.padded_length, batch.padded_length);
    if (call.cuts_output) {
      // Its states are kept too, which give the output again: worth room only for whole requests and small outputs.
      std::size_t bytes = 0;
      for (const at::Tensor& tensor : tensors) bytes += tensor.nbytes();
      if (report.reused_tokens > 0 || bytes > bank_.capacity() / kSmallPart) continue;
    }
    rows.push_back({key_of(call, pass.rows[k]), std::move(tensors)});
  }
  if (rows.empty()) return;
  const bool exact = pass.result.report.execution == Execution::kDense && !answers.reused_source();
  const BatchSize size{static_cast<std::int32_t>(pass.rows.size()), static_cast<std::int32_t>(batch.padded_length)};
  answers.writes().add([this, rows = std::move(rows), exact, size] {
    for (const Row& row : rows) bank_.insert(row.key, row.tensors, exact, size);
  });
}

void ExactMatch::add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) {
  if (!wrapped_.keeps_rows()) return;
  parts.push_back(std::make_unique<OutputPart>("whole outputs", FrameKind::kOutput,
                                               std::make_shared<const RowForms>(forms_of_outputs(wrapped_)), bank_,
                                               wrapped_.model->device()));
}

void ExactMatch::add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) {
  if (!wrapped_.keeps_rows()) return;
  const auto rows = [this](const Call& call) {
    std::vector<StoredRow> all;
    if (!accepts(call)) return all;
    for (std::int64_t row = 0; row < call.batch.rows; ++row) {
      const std::int64_t tokens = call.batch.spans[static_cast<std::size_t>(row)].tokens;
      const bool exact = call.fidelity == Fidelity::kIdentical;
      if (tokens > 0) all.push_back({row, tokens, call.request.tenant, key_of(call, row), {}, 1, exact});
    }
    return all;
  };
  parts.push_back(std::make_unique<StoredOutputs>(TierDomain::kOutput, forms_of_outputs(wrapped_), bank_,
                                                  wrapped_.model->device(), rows));
}

void ExactMatch::add_to(Stats& stats) const { add(stats, "outputs", bank_.counters()); }

}  // namespace llmcache
