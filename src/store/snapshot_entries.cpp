#include "store/snapshot_entries.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "store/byte_io.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

constexpr std::size_t kMostTensors = 65'536;
constexpr std::size_t kMostSizes = 16;

void write_tensors(ByteWriter& writer, const std::vector<TensorRecord>& tensors) {
  writer.number(static_cast<std::uint32_t>(tensors.size()));
  for (const TensorRecord& tensor : tensors) {
    writer.number(static_cast<std::uint8_t>(tensor.type));
    writer.numbers(tensor.sizes.data(), tensor.sizes.size());
  }
}

/// Of all its numbers. Throws for sizes that no tensor has.
std::uint64_t record_bytes(const TensorRecord& tensor) {
  std::uint64_t bytes = bytes_of_number(tensor.type);
  if (bytes == 0 || tensor.sizes.size() > kMostSizes) throw DamagedData("it has a tensor of no known form");
  for (const std::int64_t size : tensor.sizes) {
    const auto most = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(bytes > 0 ? bytes : 1);
    if (size < 0 || size > most) throw DamagedData("it has a tensor of impossible size");
    bytes *= static_cast<std::uint64_t>(size);
  }
  return bytes;
}

/// Up to the end of the entry.
std::vector<TensorRecord> read_tensors(ByteReader& reader) {
  const auto count = reader.number<std::uint32_t>();
  if (count > kMostTensors) throw DamagedData("it has too many tensors");
  std::vector<TensorRecord> tensors;
  for (std::uint32_t i = 0; i < count; ++i) {
    TensorRecord& tensor = tensors.emplace_back();
    tensor.type = static_cast<NumberType>(reader.number<std::uint8_t>());
    tensor.sizes = reader.numbers<std::int64_t>();
  }
  for (TensorRecord& tensor : tensors) {
    tensor.bytes = reader.take(record_bytes(tensor));
    if (tensor.type != NumberType::kBool) continue;
    for (const char value : tensor.bytes) {
      if (value != 0 && value != 1) throw DamagedData("it has neither yes nor no where one of them is expected");
    }
  }
  reader.finish();
  return tensors;
}

/// Whole tokens, and at least one.
std::vector<std::int64_t> read_sequence(ByteReader& reader, std::uint32_t ids_per_token) {
  auto tokens = reader.numbers<std::int64_t>();
  if (ids_per_token == 0 || tokens.empty() || tokens.size() % ids_per_token != 0)
    throw DamagedData("it has no whole tokens");
  return tokens;
}

}  // namespace

std::uint64_t bytes_of_number(NumberType type) noexcept {
  switch (type) {
    case NumberType::kUInt8:
    case NumberType::kInt8:
    case NumberType::kBool:
      return 1;
    case NumberType::kInt16:
    case NumberType::kFloat16:
    case NumberType::kBFloat16:
      return 2;
    case NumberType::kInt32:
    case NumberType::kFloat32:
      return 4;
    case NumberType::kInt64:
    case NumberType::kFloat64:
      return 8;
  }
  return 0;
}

std::string write_output(const OutputRecord& record) {
  ByteWriter writer;
  writer.text(record.key);
  writer.number(static_cast<std::uint8_t>(record.exact));
  writer.number(record.rows);
  writer.number(record.padded_length);
  write_tensors(writer, record.tensors);
  return writer.bytes();
}

OutputRecord read_output(std::string_view bytes) {
  ByteReader reader(bytes);
  OutputRecord record;
  record.key = reader.text();
  record.exact = reader.flag();
  record.rows = reader.number<std::int32_t>();
  record.padded_length = reader.number<std::int32_t>();
  if (record.rows < 0 || record.padded_length < 0) throw DamagedData("it has a batch of negative size");
  record.tensors = read_tensors(reader);
  return record;
}

std::string write_prefix(const PrefixRecord& record) {
  ByteWriter writer;
  writer.text(record.partition);
  writer.number(record.ids_per_token);
  writer.number(record.begin);
  writer.numbers(record.tokens.data(), record.tokens.size());
  writer.number(record.shortest);
  writer.number(record.longest);
  writer.number(record.saved_ms);
  write_tensors(writer, record.tensors);
  return writer.bytes();
}

PrefixRecord read_prefix(std::string_view bytes) {
  ByteReader reader(bytes);
  PrefixRecord record;
  record.partition = reader.text();
  record.ids_per_token = reader.number<std::uint32_t>();
  record.begin = reader.number<std::uint64_t>();
  record.tokens = read_sequence(reader, record.ids_per_token);
  if (record.begin >= record.end()) throw DamagedData("it has the states of no token");
  record.shortest = reader.number<std::uint8_t>();
  record.longest = reader.number<std::uint8_t>();
  constexpr std::uint8_t kMostClass = 64;
  if (record.shortest > record.longest || record.longest > kMostClass) throw DamagedData("it has impossible classes");
  record.saved_ms = reader.number<float>();
  record.tensors = read_tensors(reader);
  return record;
}

std::string write_token_states(const TokenRecord& record) {
  ByteWriter writer;
  writer.text(record.partition);
  writer.number(record.ids_per_token);
  writer.numbers(record.tokens.data(), record.tokens.size());
  writer.numbers(record.counts.data(), record.counts.size());
  writer.number(record.saved_ms);
  writer.numbers(record.encoded.data(), record.encoded.size());
  write_tensors(writer, record.tensors);
  return writer.bytes();
}

TokenRecord read_token_states(std::string_view bytes) {
  ByteReader reader(bytes);
  TokenRecord record;
  record.partition = reader.text();
  record.ids_per_token = reader.number<std::uint32_t>();
  record.tokens = read_sequence(reader, record.ids_per_token);
  record.counts = reader.numbers<std::uint16_t>();
  if (record.counts.size() != record.tokens.size() / record.ids_per_token) {
    throw DamagedData("it has another number of tokens than of counts");
  }
  for (const std::uint16_t count : record.counts) {
    if (count == 0) throw DamagedData("it has states that are the mean over nothing");
  }
  record.saved_ms = reader.number<double>();
  record.encoded = reader.numbers<std::uint8_t>();
  record.tensors = read_tensors(reader);
  return record;
}

std::string write_segment(const SegmentRecord& record) {
  ByteWriter writer;
  writer.text(record.partition);
  writer.number(record.ids_per_token);
  writer.numbers(record.tokens.data(), record.tokens.size());
  writer.number(record.position);
  writer.number(record.averaged);
  writer.number(record.saved_ms);
  write_tensors(writer, record.tensors);
  return writer.bytes();
}

SegmentRecord read_segment(std::string_view bytes) {
  ByteReader reader(bytes);
  SegmentRecord record;
  record.partition = reader.text();
  record.ids_per_token = reader.number<std::uint32_t>();
  record.tokens = read_sequence(reader, record.ids_per_token);
  record.position = reader.number<std::int64_t>();
  record.averaged = reader.number<std::uint16_t>();
  constexpr std::int64_t kFarthest = std::int64_t{1} << 31;
  if (record.position < 0 || record.position > kFarthest) throw DamagedData("it has a segment at an impossible place");
  if (record.averaged == 0) throw DamagedData("it has states that are the mean over nothing");
  if (record.averaged == 1 && record.position != 0) throw DamagedData("it has a sequence that does not begin at 0");
  record.saved_ms = reader.number<double>();
  record.tensors = read_tensors(reader);
  return record;
}

std::string write_centres(const CentresRecord& record) {
  ByteWriter writer;
  writer.number(static_cast<std::uint32_t>(record.centres.size()));
  for (const CentresRecord::Centre& one : record.centres) {
    writer.number(one.observations);
    writer.numbers(one.sums.data(), one.sums.size());
    writer.numbers(one.centre.data(), one.centre.size());
  }
  return writer.bytes();
}

CentresRecord read_centres(std::string_view bytes) {
  const auto finite = [](const auto& values) {
    return std::all_of(values.begin(), values.end(), [](auto value) { return std::isfinite(value); });
  };
  ByteReader reader(bytes);
  CentresRecord record;
  const auto count = reader.number<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) {
    CentresRecord::Centre& one = record.centres.emplace_back();
    one.observations = reader.number<std::uint64_t>();
    one.sums = reader.numbers<double>();
    one.centre = reader.numbers<float>();
    if (!finite(one.sums) || !finite(one.centre)) throw DamagedData("it has a mean that is no number");
  }
  reader.finish();
  return record;
}

std::string write_layer_state(const LayerRecord& record) {
  ByteWriter writer;
  writer.number(record.layer);
  writer.text(record.partition);
  writer.numbers(record.states.data(), record.states.size());
  writer.numbers(record.given.data(), record.given.size());
  writer.number(record.audits);
  writer.number(record.error_sum);
  writer.number(record.saved_ms);
  write_tensors(writer, record.tensors);
  return writer.bytes();
}

LayerRecord read_layer_state(std::string_view bytes) {
  ByteReader reader(bytes);
  LayerRecord record;
  record.layer = reader.number<std::uint32_t>();
  record.partition = reader.text();
  record.states = reader.numbers<float>();
  record.given = reader.numbers<std::uint8_t>();
  record.audits = reader.number<std::uint32_t>();
  record.error_sum = reader.number<double>();
  if (!(record.error_sum >= 0) || !std::isfinite(record.error_sum)) throw DamagedData("it has an impossible error");
  record.saved_ms = reader.number<double>();
  record.tensors = read_tensors(reader);
  std::size_t there = 1;
  for (const std::uint8_t one : record.given) {
    if (one > 1) throw DamagedData("it has neither yes nor no where one of them is expected");
    there += one;
  }
  if (record.tensors.size() != there) throw DamagedData("it has another number of inputs than it says");
  return record;
}

std::string write_calibration(const CalibrationRecord& record) {
  ByteWriter writer;
  writer.text(record.json);
  writer.text(record.tensors);
  return writer.bytes();
}

CalibrationRecord read_calibration(std::string_view bytes) {
  ByteReader reader(bytes);
  CalibrationRecord record;
  record.json = reader.text();
  record.tensors = reader.text();
  reader.finish();
  return record;
}

std::string write_header(const SnapshotHeader& header) {
  nlohmann::ordered_json parts = nlohmann::ordered_json::array();
  for (const auto& [name, kind, layout] : header.parts) {
    parts.push_back({{"name", name}, {"kind", kind}, {"layout", layout}});
  }
  const nlohmann::ordered_json json = {
      {"library", header.library}, {"model", identity_json(header.identity)}, {"parts", std::move(parts)}};
  return json.dump();
}

SnapshotHeader read_header(std::string_view bytes) {
  const nlohmann::json json = parse_bounded_json(bytes, {}, "its header");
  const JsonObject object(json, "its header");
  SnapshotHeader header;
  header.library = object.text("library");
  header.identity = identity_from(object.object("model"));
  for (const JsonObject& part : object.objects("parts")) {
    const auto kind = part.whole("kind", 0, std::numeric_limits<std::uint32_t>::max());
    header.parts.push_back({part.text("name"), static_cast<std::uint32_t>(kind), part.text("layout")});
  }
  return header;
}

}  // namespace llmcache
