#include "safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
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

std::uint64_t dtype_bytes(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> kBytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
      {"I32", 4},  {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

template <class T>
constexpr const char* kDtype = nullptr;
template <>
constexpr const char* kDtype<float> = "F32";
template <>
constexpr const char* kDtype<std::int32_t> = "I32";
template <>
constexpr const char* kDtype<std::int64_t> = "I64";

/// Parses a header, refusing deep nesting and doubled keys.
Json parse_header(std::string_view text, const Safetensors& file) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxDepth) file.damaged("its header is nested too deeply");
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      file.damaged(fmt::format("its header has '{}' twice", value.get<std::string>()));
    }
    return true;
  };
  try {
    Json header = Json::parse(text, check);
    if (!header.is_object()) file.damaged("its header is not a JSON object");
    return header;
  } catch (const Json::exception& error) {
    file.damaged(fmt::format("its header is not JSON ({})", error.what()));
  }
}

}  // namespace

void Safetensors::damaged(const std::string& what) const {
  throw Failure(fmt::format("{}: not a usable {}: {}; prepare the data again", name_, kind_, what));
}

Safetensors::Safetensors(std::string_view bytes, std::string name, std::string kind)
    : name_(std::move(name)), kind_(std::move(kind)) {
  constexpr std::size_t kLengthBytes = 8;
  if (bytes.size() < kLengthBytes) damaged(fmt::format("it has {} bytes", bytes.size()));
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - kLengthBytes) {
    damaged(fmt::format("it announces a header of {} bytes, {} follow and {} are allowed", header_bytes,
                        bytes.size() - kLengthBytes, kMaxHeaderBytes));
  }
  const Json header = parse_header(bytes.substr(kLengthBytes, header_bytes), *this);
  data_ = bytes.substr(kLengthBytes + header_bytes);

  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") continue;
    const auto bad = [&, tensor = key](const std::string& what) {
      damaged(fmt::format("tensor '{}' {}", tensor, what));
    };
    const auto unsigned_number = [&](const Json& value) {
      if (!value.is_number_unsigned()) bad("has a shape or offset that is not a whole number");
      return value.get<std::uint64_t>();
    };
    if (!entry.is_object()) bad("is not described by an object");
    const auto dtype = entry.find("dtype");
    const auto shape = entry.find("shape");
    const auto offsets = entry.find("data_offsets");
    if (dtype == entry.end() || !dtype->is_string()) bad("has no dtype");
    if (shape == entry.end() || !shape->is_array()) bad("has no shape");
    if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) bad("has no pair of data_offsets");

    View tensor;
    tensor.dtype = dtype->get<std::string>();
    tensor.begin = unsigned_number((*offsets)[0]);
    tensor.end = unsigned_number((*offsets)[1]);
    if (tensor.begin > tensor.end || tensor.end > data_.size()) {
      bad(fmt::format("lies at bytes {} to {} of {}: truncated or damaged", tensor.begin, tensor.end, data_.size()));
    }
    std::uint64_t size = dtype_bytes(tensor.dtype);
    if (size == 0) bad(fmt::format("has unknown dtype '{}'", tensor.dtype));
    for (const Json& dimension : *shape) {
      const std::uint64_t factor = unsigned_number(dimension);
      tensor.shape.push_back(factor);
      if (factor != 0 && size > std::numeric_limits<std::uint64_t>::max() / factor) bad("has a shape that overflows");
      size *= factor;
    }
    if (size != tensor.end - tensor.begin) {
      bad(fmt::format("needs {} bytes by dtype and shape, its offsets give {}", size, tensor.end - tensor.begin));
    }
    tensors_.emplace(key, std::move(tensor));
  }
  check_layout();

  const auto metadata = header.find("__metadata__");
  if (metadata == header.end() || !metadata->is_object()) damaged("it has no __metadata__");
  for (const auto& [key, value] : metadata->items()) {
    metadata_.emplace(key, value.is_string() ? std::optional(value.get<std::string>()) : std::nullopt);
  }
}

/// Tensors must fill the data exactly, without overlap or gap.
void Safetensors::check_layout() const {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  for (const auto& [key, tensor] : tensors_) spans.emplace_back(tensor.begin, tensor.end);
  std::sort(spans.begin(), spans.end());
  std::uint64_t position = 0;
  for (const auto& [begin, end] : spans) {
    if (begin < position) damaged(fmt::format("tensors overlap at byte {}", begin));
    if (begin > position) damaged(fmt::format("bytes {} to {} belong to no tensor", position, begin));
    position = end;
  }
  if (position != data_.size()) {
    damaged(fmt::format("its tensors end at byte {} of {}: truncated or appended to", position, data_.size()));
  }
}

const Safetensors::View& Safetensors::view(const std::string& tensor, const std::string& dtype,
                                           std::size_t dimensions) const {
  const auto found = tensors_.find(tensor);
  if (found == tensors_.end()) damaged(fmt::format("it has no tensor '{}'", tensor));
  if (found->second.dtype != dtype || found->second.shape.size() != dimensions) {
    damaged(fmt::format("tensor '{}' is {} with {} dimensions, expected {} with {}", tensor, found->second.dtype,
                        found->second.shape.size(), dtype, dimensions));
  }
  return found->second;
}

template <class T>
std::vector<T> Safetensors::values(const std::string& tensor, std::size_t dimensions,
                                   std::vector<std::int64_t>* shape) const {
  const View& place = view(tensor, kDtype<T>, dimensions);
  if (shape != nullptr) shape->assign(place.shape.begin(), place.shape.end());
  std::vector<T> copy((place.end - place.begin) / sizeof(T));
  if (!copy.empty()) std::memcpy(copy.data(), data_.data() + place.begin, place.end - place.begin);
  return copy;
}
template std::vector<float> Safetensors::values(const std::string&, std::size_t, std::vector<std::int64_t>*) const;
template std::vector<std::int32_t> Safetensors::values(const std::string&, std::size_t,
                                                       std::vector<std::int64_t>*) const;
template std::vector<std::int64_t> Safetensors::values(const std::string&, std::size_t,
                                                       std::vector<std::int64_t>*) const;

std::optional<std::string> Safetensors::optional_text(const std::string& key) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) return std::nullopt;
  if (!found->second) damaged(fmt::format("its metadata has no '{}' that is text", key));
  return found->second;
}

std::string Safetensors::text(const std::string& key) const {
  auto value = optional_text(key);
  if (!value) damaged(fmt::format("its metadata has no '{}'", key));
  return *std::move(value);
}

std::int64_t Safetensors::whole_number(const std::string& key) const {
  const std::string digits = text(key);
  if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) {
    damaged(fmt::format("its {} is '{}', expected a whole number", key, digits));
  }
  return std::stoll(digits);
}

std::vector<std::string> Safetensors::text_list(const std::string& key) const {
  const Json list = Json::parse(text(key), nullptr, /*allow_exceptions=*/false);
  if (!list.is_array()) damaged(fmt::format("its {} is not a JSON list", key));
  std::vector<std::string> texts;
  for (const Json& element : list) {
    if (!element.is_string()) damaged(fmt::format("its {} has an element that is not text", key));
    texts.push_back(element.get<std::string>());
  }
  return texts;
}

std::string read_file(const std::filesystem::path& path, const std::string& kind) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw Failure(fmt::format("{}: cannot be read ({}); prepare the data", path.string(), error.message()));
  if (size > kMaxFileBytes) {
    throw Failure(fmt::format("{}: not a usable {}: it has {} bytes, at most {}; prepare the data again", path.string(),
                              kind, size, kMaxFileBytes));
  }
  std::string bytes(size, '\0');
  std::ifstream in(path, std::ios::binary);
  if (!in.read(bytes.data(), static_cast<std::streamsize>(size))) {
    throw Failure(fmt::format("{}: cannot be read; check its permissions", path.string()));
  }
  return bytes;
}

}  // namespace llmcache::bench
