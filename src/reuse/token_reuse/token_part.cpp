#include "reuse/token_reuse/token_part.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include "bank/tensor_record.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// What an entry takes beside its tensors: index and counts for each token, and what allocators add.
constexpr std::size_t kTokenIndexBytes = 96;
constexpr std::size_t kTokenEntryBytes = 1024;

TokenView view_of_tokens(const TokenRecord& record) { return {record.tokens, record.ids_per_token}; }

}  // namespace

std::string TokenPart::layout() const {
  const StateLayout& layout = bank_.layout();
  std::string text = fmt::format("{} numbers a token; held as {}; hidden {};", ids_per_token_, to_string(layout.format),
                                 fmt::join(layout.hidden, ","));
  for (const auto& attention_ops : layout.first_key) text += fmt::format(" keys {};", fmt::join(attention_ops, ","));
  for (const StateLayout::Spec& spec : layout.specs) {
    text += fmt::format(" {} [{}];", c10::toString(c10::typeMetaToScalarType(spec.options.dtype())),
                        fmt::join(spec.sizes, ", "));
  }
  return text;
}

void TokenPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  for (const TokenBank::Listed& listed : bank_.listed()) {
    const auto entry = listed.entry.lock();
    if (!entry) continue;  // it went meanwhile
    TokenRecord record;
    record.partition = listed.partition;
    record.ids_per_token = static_cast<std::uint32_t>(entry->view().ids_per_token);
    record.tokens.assign(entry->view().values.begin(), entry->view().values.end());
    record.counts.assign(entry->counts().begin(), entry->counts().end());
    record.saved_ms = listed.saved_ms;
    std::vector<at::Tensor> tensors;
    for (std::size_t i = 0; i < bank_.layout().specs.size(); ++i) {
      const EncodedTensor& encoded = entry->encoded(i);
      record.encoded.push_back(encoded.encoded() ? 1 : 0);
      for (at::Tensor& held : encoded.held()) tensors.push_back(std::move(held));
    }
    record.tensors = records_of(tensors).value();
    write_entry(writer, kind(), write_token_states(record), tensors);
    ++report.entries;
    report.tokens += record.counts.size();
  }
}

/// Throws DamagedData unless there is one for each spec, of its form. On the device kMeta nothing is copied.
std::vector<EncodedTensor> TokenPart::tensors_in(const TokenRecord& record, at::Device device) const {
  const StateLayout& layout = bank_.layout();
  if (record.ids_per_token != ids_per_token_ || record.encoded.size() != layout.specs.size())
    throw DamagedData("it has token states of another form");
  const auto make = [&](const TensorRecord& one) {
    return device.is_meta() ? at::empty(one.sizes, at::dtype(type_of(one)).device(device)) : tensor_of(one, device);
  };
  std::vector<EncodedTensor> tensors;
  std::size_t next = 0;
  const auto take = [&]() -> const TensorRecord& {
    if (next == record.tensors.size()) throw DamagedData("it has token states with too few tensors");
    return record.tensors[next++];
  };
  for (std::size_t i = 0; i < layout.specs.size(); ++i) {
    const StateLayout::Spec& spec = layout.specs[i];
    auto sizes = spec.sizes;
    sizes.insert(sizes.begin(), static_cast<std::int64_t>(record.counts.size()));
    const at::ScalarType type = c10::typeMetaToScalarType(spec.options.dtype());
    if (record.encoded[i] == 0) {
      const TensorRecord& rows = take();
      if (!has_form(rows, sizes, type)) throw DamagedData("it has token states of another form");
      tensors.emplace_back(make(rows), BankFormat::kAsComputed);
      continue;
    }
    const at::Tensor values = sizes.size() < 2 ? at::Tensor() : make(take());
    const at::Tensor scales = layout.format == BankFormat::kInt8 ? make(take()) : at::Tensor();
    auto stored = values.defined()
                      ? StoredStates::of(sizes, 0, at::dtype(type).device(device), layout.format, values, scales)
                      : std::nullopt;
    if (!stored) throw DamagedData("it has token states of another form");
    tensors.emplace_back(std::move(*stored));
  }
  if (next != record.tensors.size()) throw DamagedData("it has token states with too many tensors");
  return tensors;
}

std::size_t TokenPart::check(std::string_view entry) const {
  const TokenRecord record = read_token_states(entry);
  static_cast<void>(tensors_in(record, at::kMeta));
  std::size_t bytes =
      kTokenEntryBytes + record.counts.size() * (kTokenIndexBytes + record.ids_per_token * sizeof(std::int64_t));
  for (const TensorRecord& tensor : record.tensors) bytes += tensor.bytes.size() + 2 * sizeof(at::TensorImpl);
  return bytes;
}

SnapshotPart::Outcome TokenPart::take(std::string_view entry, SnapshotPartReport& report) {
  const TokenRecord record = read_token_states(entry);
  const TokenView tokens = view_of_tokens(record);
  if (bank_.knows(record.partition, tokens)) return Outcome::kKnown;
  if (!bank_.restore(record.partition, tokens, record.counts, tensors_in(record, device_), record.saved_ms, now_())) {
    return Outcome::kNoRoom;
  }
  report.tokens += record.counts.size();
  taken_.push_back({std::string(record.partition), record.tokens});
  return Outcome::kTaken;
}

void TokenPart::finish() {
  for (auto one = taken_.rbegin(); one != taken_.rend(); ++one) {
    bank_.use(one->partition, {one->tokens, ids_per_token_}, now_());
  }
}

}  // namespace llmcache
