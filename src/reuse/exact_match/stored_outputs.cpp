#include "reuse/exact_match/stored_outputs.h"

#include <utility>

#include "reuse/tiers/snapshot_outcome.h"
#include "store/damaged_data.h"

namespace llmcache {

StoredOutputs::StoredOutputs(TierDomain domain, RowForms forms, OutputBank& bank, at::Device device,
                             std::function<std::vector<StoredRow>(const Call&)> rows)
    : domain_(domain),
      forms_(std::make_shared<const RowForms>(std::move(forms))),
      bank_(bank),
      device_(device),
      rows_(std::move(rows)) {
  for (std::size_t i = 0; i < forms_->tensors.size() && i < forms_->dims.size(); ++i) {
    const at::Tensor& form = forms_->tensors[i];
    const TokenDims& dims = forms_->dims[i];
    std::size_t bytes = form.element_size();
    for (std::int64_t d = 0; d < form.dim(); ++d) {
      if (d != dims.batch && d != dims.tokens) bytes *= static_cast<std::size_t>(form.size(d));
    }
    (dims.tokens >= 0 ? token_bytes_ : fixed_bytes_) += bytes;
  }
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
  OutputPart taking = part();
  static_cast<void>(taking.check(entry));
  const OutputRecord record = read_output(entry);
  if (record.key != row.partition) throw DamagedData("it has the output of another row");
  if (row.exact && !record.exact) throw DamagedData("it has an output that the model did not make as it is");
  SnapshotPartReport report;
  return stored_outcome(taking.take(entry, report));
}

bool StoredOutputs::append(std::string& to, const StoredRow& row, const StoredPiece& /*piece*/) const {
  return part().append_entry_of(to, row.partition, row.exact);
}

}  // namespace llmcache
