#include "reuse/exact_match/stored_outputs.h"

#include <utility>

#include "model/tensors_of.h"
#include "reuse/exact_match/output_part.h"
#include "reuse/tiers/snapshot_outcome.h"
#include "store/damaged_data.h"

namespace llmcache {

StoredOutputs::StoredOutputs(const WrappedModel& wrapped, OutputBank& bank, std::function<bool(const Call&)> accepts,
                             std::function<std::string(const Call&, std::int64_t)> key_of)
    : wrapped_(wrapped), bank_(bank), accepts_(std::move(accepts)), key_of_(std::move(key_of)) {
  layout_ = OutputPart(wrapped_, bank_).layout();
  const auto forms = tensors_of(wrapped_.result_form);
  for (std::size_t i = 0; i < forms.size() && i < wrapped_.output.leaves.size(); ++i) {
    const TokenDims& dims = wrapped_.output.leaves[i];
    std::size_t bytes = forms[i].element_size();
    for (std::int64_t d = 0; d < forms[i].dim(); ++d) {
      if (d != dims.batch && d != dims.tokens) bytes *= static_cast<std::size_t>(forms[i].size(d));
    }
    (dims.tokens >= 0 ? token_bytes_ : fixed_bytes_) += bytes;
  }
}

std::vector<StoredRow> StoredOutputs::rows(const Call& call) const {
  std::vector<StoredRow> rows;
  if (!accepts_(call)) return rows;
  for (std::int64_t row = 0; row < call.batch.rows; ++row) {
    const std::int64_t tokens = call.batch.spans[static_cast<std::size_t>(row)].tokens;
    if (tokens == 0) continue;
    rows.push_back(
        {row, tokens, call.request.tenant, key_of_(call, row), {}, 1, call.fidelity == Fidelity::kIdentical});
  }
  return rows;
}

std::vector<StoredPiece> StoredOutputs::pieces(const StoredRow& row, std::int64_t /*block_tokens*/,
                                               TierKeys& keys) const {
  // What is good enough for one fidelity may not be for another, and must not stand in its place.
  keys.begin(row.exact ? "as the model runs" : "packed or not");
  return {{0, row.tokens, keys.next(row.partition)}};
}

std::int64_t StoredOutputs::known(const StoredRow& row) const {
  return bank_.holds(row.partition, row.exact) ? row.tokens : 0;
}

std::size_t StoredOutputs::bytes(std::int64_t tokens) const {
  return fixed_bytes_ + static_cast<std::size_t>(tokens) * token_bytes_;
}

StoredPart::Outcome StoredOutputs::take(const StoredRow& row, const StoredPiece& /*piece*/,
                                        std::string_view entry) const {
  OutputPart part(wrapped_, bank_);
  static_cast<void>(part.check(entry));
  const OutputRecord record = read_output(entry);
  if (record.key != row.partition) throw DamagedData("it has the output of another row");
  if (row.exact && !record.exact) throw DamagedData("it has an output that the model did not make as it is");
  SnapshotPartReport report;
  return stored_outcome(part.take(entry, report));
}

bool StoredOutputs::append(std::string& to, const StoredRow& row, const StoredPiece& /*piece*/) const {
  return OutputPart(wrapped_, bank_).append_entry_of(to, row.partition, row.exact);
}

}  // namespace llmcache
