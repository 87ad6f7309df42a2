#include "reuse/exact_match/output_part.h"

#include <fmt/core.h>

#include "bank/tensor_bytes.h"
#include "bank/tensor_record.h"
#include "model/tensors_of.h"
#include "store/byte_io.h"

namespace llmcache {
namespace {

/// Of containers, index and policy, with what allocators add.
constexpr std::size_t kOutputEntryBytes = 512;

/// Tokens that the tensors of a key's row have: Batch::whole_key() puts tenant and first token in front of them.
std::int64_t tokens_of_key(std::string_view key) {
  ByteReader reader(key);
  const std::string_view tenant = reader.text();
  static_cast<void>(tenant);
  const auto first = reader.number<std::int64_t>();
  const auto tokens = reader.number<std::int64_t>();
  if (first < 0 || tokens < 1) throw DamagedData("it has the output of no token");
  return tokens;
}

}  // namespace

std::string RowForms::text() const {
  std::string text;
  for (const at::Tensor& form : tensors) text += fmt::format("{} ", form.toString());
  for (const TokenDims& one : dims) text += fmt::format("{}/{} ", one.batch, one.tokens);
  return text;
}

bool RowForms::fit(std::string_view key, const std::vector<TensorRecord>& records) const {
  if (records.size() != tensors.size() || tensors.size() != dims.size()) return false;
  const std::int64_t tokens = tokens_of(key);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    auto sizes = tensors[i].sizes().vec();
    if (dims[i].batch >= 0) sizes[static_cast<std::size_t>(dims[i].batch)] = 1;
    if (dims[i].tokens >= 0) sizes[static_cast<std::size_t>(dims[i].tokens)] = tokens;
    if (!has_form(records[i], sizes, tensors[i].scalar_type())) return false;
  }
  return true;
}

RowForms forms_of_outputs(const WrappedModel& wrapped) {
  return {tensors_of(wrapped.result_form), wrapped.output.leaves, tokens_of_key};
}

void OutputPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  for (const auto& listed : bank_.listed()) {
    const auto entry = listed.lock();
    if (!entry) continue;  // it went meanwhile
    const std::vector<at::Tensor> tensors(entry->tensors().begin(), entry->tensors().end());
    auto records = records_of(tensors);
    if (!records || !forms_->fit(entry->key(), *records)) {
      if (report.left++ == 0) report.why = "an output has a form or a type that files do not hold";
      continue;
    }
    const OutputRecord record{entry->key(), entry->exact(), entry->rows(), entry->padded_length(), std::move(*records)};
    write_entry(writer, kind(), write_output(record), tensors);
    ++report.entries;
  }
}

bool OutputPart::append_entry_of(std::string& to, std::string_view key, bool exact) const {
  const auto entry = bank_.find(key, exact);
  if (!entry) return false;
  const std::vector<at::Tensor> tensors(entry->tensors().begin(), entry->tensors().end());
  auto records = records_of(tensors);
  if (!records || !forms_->fit(entry->key(), *records)) return false;
  const OutputRecord record{entry->key(), entry->exact(), entry->rows(), entry->padded_length(), std::move(*records)};
  append_entry(to, write_output(record), tensors);
  return true;
}

std::size_t OutputPart::check(std::string_view entry) const {
  const OutputRecord record = read_output(entry);
  if (!forms_->fit(record.key, record.tensors)) throw DamagedData("it has an entry of another form than the model's");
  std::size_t bytes = record.key.size() + kOutputEntryBytes;
  for (const TensorRecord& tensor : record.tensors) {
    bytes += taken_bytes(tensor.bytes.size(), device_) + kTensorOverhead;
  }
  return bytes;
}

SnapshotPart::Outcome OutputPart::take(std::string_view entry, SnapshotPartReport& /*report*/) {
  const OutputRecord record = read_output(entry);
  if (bank_.holds(record.key, record.exact)) return Outcome::kKnown;
  if (bank_.room_for(record.key) < check(entry)) return Outcome::kNoRoom;
  std::vector<at::Tensor> tensors;
  for (const TensorRecord& tensor : record.tensors) tensors.push_back(tensor_of(tensor, device_));
  bank_.insert(record.key, tensors, record.exact, {record.rows, record.padded_length});
  taken_.emplace_back(record.key);
  return bank_.holds(record.key, record.exact) ? Outcome::kTaken : Outcome::kNoRoom;
}

void OutputPart::finish() {
  for (auto key = taken_.rbegin(); key != taken_.rend(); ++key) bank_.find(*key, false);
}

}  // namespace llmcache
