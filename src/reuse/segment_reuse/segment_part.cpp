#include "reuse/segment_reuse/segment_part.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <limits>

#include "bank/tensor_record.h"
#include "store/damaged_data.h"

namespace llmcache {

std::string SegmentPart::layout() const {
  const SegmentBank::Settings& settings = bank_.settings();
  std::string text =
      fmt::format("{}; {} numbers a token; held as {};", order_, settings.ids_per_token, to_string(settings.format));
  for (const KeySpec& spec : settings.specs) {
    auto sizes = spec.sizes;
    sizes[static_cast<std::size_t>(spec.token_dim)] = 1;
    text += fmt::format(" {} [{}] over {};", c10::toString(c10::typeMetaToScalarType(spec.options.dtype())),
                        fmt::join(sizes, ", "), spec.token_dim);
  }
  return text;
}

void SegmentPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  for (const auto& listed : bank_.listed()) {
    const auto entry = listed.lock();
    if (!entry) continue;  // it went meanwhile
    SegmentRecord record;
    record.partition = entry->partition();
    record.ids_per_token = static_cast<std::uint32_t>(bank_.settings().ids_per_token);
    record.tokens.assign(entry->tokens().begin(), entry->tokens().end());
    record.position = entry->origin().position;
    record.averaged = entry->origin().averaged;
    record.saved_ms = entry->saved_ms();
    std::vector<at::Tensor> tensors;
    entry->each_tensor([&](const at::Tensor& tensor) { tensors.push_back(tensor); });
    record.tensors = records_of(tensors).value();
    write_entry(writer, kind(), write_segment(record), tensors);
    ++report.entries;
    report.tokens += record.tokens.size() / record.ids_per_token;
  }
}

/// Throws DamagedData unless there is one for each spec, of its form. On the device kMeta nothing is copied.
std::vector<StoredStates> SegmentPart::states_in(const SegmentRecord& record, at::Device device) const {
  const SegmentBank::Settings& settings = bank_.settings();
  if (record.ids_per_token != settings.ids_per_token) throw DamagedData("it has a segment of another form");
  const std::size_t tensors_each = settings.format == BankFormat::kInt8 ? 2 : 1;
  if (record.tensors.size() != settings.specs.size() * tensors_each) {
    throw DamagedData("it has a segment with another number of tensors");
  }
  const auto make = [&](const TensorRecord& one) {
    return device.is_meta() ? at::empty(one.sizes, at::dtype(type_of(one)).device(device)) : tensor_of(one, device);
  };
  std::vector<StoredStates> states;
  std::size_t next = 0;
  for (const KeySpec& spec : settings.specs) {
    const std::int64_t tokens = static_cast<std::int64_t>(record.tokens.size() / record.ids_per_token);
    const SegmentEntry::Form form = SegmentEntry::form_of(spec, tokens);
    const at::Tensor values = make(record.tensors[next++]);
    const at::Tensor scales = tensors_each == 2 ? make(record.tensors[next++]) : at::Tensor();
    auto stored =
        StoredStates::of(form.sizes, form.token_dim, spec.options.device(device), settings.format, values, scales);
    if (!stored) throw DamagedData("it has a segment of another form");
    states.push_back(std::move(*stored));
  }
  return states;
}

std::size_t SegmentPart::check(std::string_view entry) const {
  const SegmentRecord record = read_segment(entry);
  static_cast<void>(states_in(record, at::kMeta));
  const auto bytes = bank_.bytes_for(record.partition, record.tokens);
  return bytes ? *bytes : std::numeric_limits<std::size_t>::max();
}

SnapshotPart::Outcome SegmentPart::take(std::string_view entry, SnapshotPartReport& report) {
  const SegmentRecord record = read_segment(entry);
  const SegmentOrigin origin{record.position, record.averaged};
  if (bank_.knows(record.partition, record.tokens, origin)) return Outcome::kKnown;
  auto taken =
      bank_.restore(record.partition, record.tokens, origin, states_in(record, device_), record.saved_ms, now_());
  if (taken.expired()) return Outcome::kNoRoom;
  report.tokens += record.tokens.size() / record.ids_per_token;
  taken_.push_back(std::move(taken));
  return Outcome::kTaken;
}

void SegmentPart::finish() {
  for (auto one = taken_.rbegin(); one != taken_.rend(); ++one) {
    if (const auto entry = one->lock()) bank_.use(*entry, now_());
  }
}

}  // namespace llmcache
