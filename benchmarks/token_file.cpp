#include "token_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "failure.h"

namespace llmcache::bench {
namespace {

using Json = nlohmann::json;

constexpr std::uintmax_t kMaxFileBytes = std::uintmax_t{1} << 30;
constexpr std::uint64_t kMaxHeaderBytes = std::uint64_t{1} << 20;
constexpr int kMaxDepth = 4;

[[noreturn]] void damaged(const std::string& name, const std::string& what) {
  throw Failure(fmt::format("{}: not a usable token file: {}; prepare the data again", name, what));
}

/// One tensor of the file: bytes that have been checked against dtype and shape.
struct TensorView {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

std::uint64_t dtype_bytes(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> kBytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
      {"I32", 4},  {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

/// Parses the header, refusing deep nesting and doubled keys.
Json parse_header(std::string_view text, const std::string& name) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxDepth) damaged(name, "its header is nested too deeply");
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      damaged(name, fmt::format("its header has '{}' twice", value.get<std::string>()));
    }
    return true;
  };
  try {
    Json header = Json::parse(text, check);
    if (!header.is_object()) damaged(name, "its header is not a JSON object");
    return header;
  } catch (const Json::exception& error) {
    damaged(name, fmt::format("its header is not JSON ({})", error.what()));
  }
}

std::uint64_t unsigned_number(const Json& value, const std::string& tensor, const std::string& name) {
  if (!value.is_number_unsigned()) {
    damaged(name, fmt::format("tensor '{}' has a shape or offset that is not a whole number", tensor));
  }
  return value.get<std::uint64_t>();
}

TensorView parse_tensor(const Json& entry, std::uint64_t data_bytes, const std::string& tensor,
                        const std::string& name) {
  const auto bad = [&](const std::string& what) { damaged(name, fmt::format("tensor '{}' {}", tensor, what)); };
  if (!entry.is_object()) bad("is not described by an object");
  const auto dtype = entry.find("dtype");
  const auto shape = entry.find("shape");
  const auto offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string()) bad("has no dtype");
  if (shape == entry.end() || !shape->is_array()) bad("has no shape");
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) bad("has no pair of data_offsets");

  TensorView view;
  view.dtype = dtype->get<std::string>();
  view.begin = unsigned_number((*offsets)[0], tensor, name);
  view.end = unsigned_number((*offsets)[1], tensor, name);
  if (view.begin > view.end || view.end > data_bytes) {
    bad(fmt::format("lies at bytes {} to {} of {}: truncated or damaged", view.begin, view.end, data_bytes));
  }
  std::uint64_t bytes = dtype_bytes(view.dtype);
  if (bytes == 0) bad(fmt::format("has unknown dtype '{}'", view.dtype));
  for (const Json& size : *shape) {
    view.shape.push_back(unsigned_number(size, tensor, name));
    const std::uint64_t factor = view.shape.back();
    if (factor != 0 && bytes > std::numeric_limits<std::uint64_t>::max() / factor) bad("has a shape that overflows");
    bytes *= factor;
  }
  if (bytes != view.end - view.begin) {
    bad(fmt::format("needs {} bytes by dtype and shape, its offsets give {}", bytes, view.end - view.begin));
  }
  return view;
}

/// Tensors must fill the data exactly, without overlap or gap.
void check_layout(const std::map<std::string, TensorView>& tensors, std::uint64_t data_bytes, const std::string& name) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  for (const auto& [key, view] : tensors) spans.emplace_back(view.begin, view.end);
  std::sort(spans.begin(), spans.end());
  std::uint64_t position = 0;
  for (const auto& [begin, end] : spans) {
    if (begin < position) damaged(name, fmt::format("tensors overlap at byte {}", begin));
    if (begin > position) damaged(name, fmt::format("bytes {} to {} belong to no tensor", position, begin));
    position = end;
  }
  if (position != data_bytes) {
    damaged(name, fmt::format("its tensors end at byte {} of {}: truncated or appended to", position, data_bytes));
  }
}

template <class T>
std::vector<T> copy_vector(const std::map<std::string, TensorView>& tensors, const std::string& tensor,
                           const std::string& dtype, std::string_view data, const std::string& name) {
  const auto found = tensors.find(tensor);
  if (found == tensors.end()) damaged(name, fmt::format("it has no tensor '{}'", tensor));
  const TensorView& view = found->second;
  if (view.dtype != dtype || view.shape.size() != 1) {
    damaged(name, fmt::format("tensor '{}' is {} with {} dimensions, expected {} with one", tensor, view.dtype,
                              view.shape.size(), dtype));
  }
  std::vector<T> values(view.shape[0]);
  if (!values.empty()) std::memcpy(values.data(), data.data() + view.begin, view.end - view.begin);
  return values;
}

/// Offsets must start at 0, rise, and end at `total`.
void check_offsets(const std::vector<std::int64_t>& offsets, std::size_t total, const std::string& tensor,
                   const std::string& name) {
  if (offsets.size() < 2) damaged(name, fmt::format("{} has {} entries, expected 2 or more", tensor, offsets.size()));
  if (offsets.front() != 0) damaged(name, fmt::format("{} starts at {}, not at 0", tensor, offsets.front()));
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] <= offsets[i - 1]) {
      damaged(name, fmt::format("{}[{}] is {} after {}: they must rise", tensor, i, offsets[i], offsets[i - 1]));
    }
  }
  if (static_cast<std::uint64_t>(offsets.back()) != total) {
    damaged(name, fmt::format("{} ends at {}, expected {}", tensor, offsets.back(), total));
  }
}

void read_metadata(const Json& header, TokenFile& file, const std::string& name) {
  const auto metadata = header.find("__metadata__");
  if (metadata == header.end() || !metadata->is_object()) damaged(name, "it has no __metadata__");
  const auto text = [&](const char* key) {
    const auto value = metadata->find(key);
    if (value == metadata->end() || !value->is_string()) damaged(name, fmt::format("its metadata has no '{}'", key));
    return value->get<std::string>();
  };
  if (text("version") != "1") damaged(name, fmt::format("it has version '{}', expected '1'", text("version")));
  file.workload = text("workload");
  file.tokenizer = text("tokenizer");
  file.source = text("source");
  file.description = text("description");
  file.order = text("order");
  const std::string max_tokens = text("max_tokens");
  if (max_tokens.empty() || max_tokens.size() > 9 || max_tokens.find_first_not_of("0123456789") != std::string::npos) {
    damaged(name, fmt::format("its max_tokens is '{}', expected a whole number", max_tokens));
  }
  file.max_tokens = std::stoll(max_tokens);
}

}  // namespace

std::span<const std::int32_t> TokenFile::sequence(std::int64_t i) const {
  const auto index = static_cast<std::size_t>(i);
  const auto begin = static_cast<std::size_t>(sequence_offsets[index]);
  return std::span(tokens).subspan(begin, static_cast<std::size_t>(sequence_offsets[index + 1]) - begin);
}

std::vector<std::span<const std::int32_t>> TokenFile::request(std::int64_t i, std::int64_t limit) const {
  const auto index = static_cast<std::size_t>(i);
  std::vector<std::span<const std::int32_t>> rows;
  for (std::int64_t s = request_offsets[index]; s < request_offsets[index + 1]; ++s) {
    const auto whole = sequence(s);
    rows.push_back(whole.first(std::min(whole.size(), static_cast<std::size_t>(limit))));
  }
  return rows;
}

bool TokenFile::grouped_by_label() const { return order.find("grouped by label") != std::string::npos; }

TokenFile parse_token_file(std::string_view bytes, const std::string& name) {
  constexpr std::size_t kLengthBytes = 8;
  if (bytes.size() < kLengthBytes) damaged(name, fmt::format("it has {} bytes", bytes.size()));
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - kLengthBytes) {
    damaged(name, fmt::format("it announces a header of {} bytes, {} follow and {} are allowed", header_bytes,
                              bytes.size() - kLengthBytes, kMaxHeaderBytes));
  }
  const Json header = parse_header(bytes.substr(kLengthBytes, header_bytes), name);
  const std::string_view data = bytes.substr(kLengthBytes + header_bytes);

  std::map<std::string, TensorView> tensors;
  for (const auto& [key, entry] : header.items()) {
    if (key != "__metadata__") tensors.emplace(key, parse_tensor(entry, data.size(), key, name));
  }
  check_layout(tensors, data.size(), name);

  TokenFile file;
  read_metadata(header, file, name);
  file.tokens = copy_vector<std::int32_t>(tensors, "tokens", "I32", data, name);
  file.sequence_offsets = copy_vector<std::int64_t>(tensors, "sequence_offsets", "I64", data, name);
  file.request_offsets = copy_vector<std::int64_t>(tensors, "request_offsets", "I64", data, name);
  check_offsets(file.sequence_offsets, file.tokens.size(), "sequence_offsets", name);
  check_offsets(file.request_offsets, file.sequence_offsets.size() - 1, "request_offsets", name);
  const auto negative = std::find_if(file.tokens.begin(), file.tokens.end(), [](std::int32_t id) { return id < 0; });
  if (negative != file.tokens.end()) {
    damaged(name, fmt::format("token {} is {}, ids are 0 or more", negative - file.tokens.begin(), *negative));
  }
  return file;
}

TokenFile read_token_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw Failure(fmt::format("{}: cannot be read ({}); prepare the data", path.string(), error.message()));
  if (size > kMaxFileBytes) damaged(path.string(), fmt::format("it has {} bytes, at most {}", size, kMaxFileBytes));
  std::string bytes(size, '\0');
  std::ifstream in(path, std::ios::binary);
  if (!in.read(bytes.data(), static_cast<std::streamsize>(size))) {
    throw Failure(fmt::format("{}: cannot be read; check its permissions", path.string()));
  }
  return parse_token_file(bytes, path.string());
}

void check_vocabulary(const TokenFile& file, std::int64_t vocabulary, const std::string& name) {
  const std::int32_t largest = *std::max_element(file.tokens.begin(), file.tokens.end());
  if (largest >= vocabulary) {
    throw Failure(
        fmt::format("{}: it has token id {}, the model knows ids below {}; use the data of the model's own "
                    "tokenizer",
                    name, largest, vocabulary));
  }
}

}  // namespace llmcache::bench
