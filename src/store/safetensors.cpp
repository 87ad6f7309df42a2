#include "store/safetensors.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

using Header = nlohmann::json;
using Tensor = Safetensors::Tensor;

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

/// Reads the header's entry of one tensor.
class Entry {
 public:
  Entry(const std::string& name, const Header& entry) : name_(name), entry_(entry) {}

  [[nodiscard]] Tensor read(std::string_view data) const {
    if (!entry_.is_object()) bad("is not described by an object");
    const auto dtype = entry_.find("dtype");
    const auto shape = entry_.find("shape");
    const auto offsets = entry_.find("data_offsets");
    if (dtype == entry_.end() || !dtype->is_string()) bad("has no dtype");
    if (shape == entry_.end() || !shape->is_array()) bad("has no shape");
    if (offsets == entry_.end() || !offsets->is_array() || offsets->size() != 2) bad("has no pair of data_offsets");
    const std::uint64_t begin = unsigned_number((*offsets)[0]);
    const std::uint64_t end = unsigned_number((*offsets)[1]);
    if (begin > end || end > data.size()) {
      bad(fmt::format("lies at bytes {} to {} of {}: truncated or damaged", begin, end, data.size()));
    }
    Tensor tensor;
    tensor.dtype = dtype->get<std::string>();
    tensor.bytes = data.substr(begin, end - begin);
    const std::uint64_t size = read_shape(*shape, tensor);
    if (size != tensor.bytes.size()) {
      bad(fmt::format("needs {} bytes by dtype and shape, its offsets give {}", size, tensor.bytes.size()));
    }
    return tensor;
  }

 private:
  [[noreturn]] void bad(const std::string& what) const {
    Safetensors::damaged(fmt::format("tensor '{}' {}", shown(name_), what));
  }

  [[nodiscard]] std::uint64_t unsigned_number(const Header& value) const {
    if (!value.is_number_unsigned()) bad("has a shape or offset that is not a whole number");
    return value.get<std::uint64_t>();
  }

  /// Its size in bytes. A dimension of 0 does not excuse the others: they must fit by themselves.
  std::uint64_t read_shape(const Header& shape, Tensor& tensor) const {
    if (shape.size() > Safetensors::kMostDimensions) bad(fmt::format("has {} dimensions", shape.size()));
    std::uint64_t size = dtype_bytes(tensor.dtype);
    if (size == 0) bad(fmt::format("has unknown dtype '{}'", shown(tensor.dtype)));
    bool empty = false;
    for (const Header& dimension : shape) {
      const std::uint64_t factor = unsigned_number(dimension);
      empty |= factor == 0;
      if (factor != 0 && size > std::numeric_limits<std::int64_t>::max() / factor) bad("has a shape that overflows");
      if (factor != 0) size *= factor;
      tensor.shape.push_back(static_cast<std::int64_t>(factor));
    }
    return empty ? 0 : size;
  }

  const std::string& name_;
  const Header& entry_;
};

}  // namespace

void Safetensors::damaged(const std::string& what) { throw DamagedData(what); }

Safetensors::Safetensors(std::string_view bytes) {
  constexpr std::size_t kLengthBytes = 8;
  if (bytes.size() < kLengthBytes) damaged(fmt::format("it has {} bytes", bytes.size()));
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  if (header_bytes > kMostHeaderBytes || header_bytes > bytes.size() - kLengthBytes) {
    damaged(fmt::format("it announces a header of {} bytes, {} follow and {} are allowed", header_bytes,
                        bytes.size() - kLengthBytes, kMostHeaderBytes));
  }
  const Header header = parse_bounded_json(bytes.substr(kLengthBytes, header_bytes),
                                           {.bytes = kMostHeaderBytes, .depth = 4}, "its header");
  if (!header.is_object()) damaged("its header is not a JSON object");
  const std::string_view data = bytes.substr(kLengthBytes + header_bytes);
  for (const auto& [key, entry] : header.items()) {
    if (key != "__metadata__") tensors_.emplace(key, Entry(key, entry).read(data));
  }
  check_layout(data);
  const auto metadata = header.find("__metadata__");
  if (metadata == header.end()) return;
  if (!metadata->is_object()) damaged("its __metadata__ is not a JSON object");
  metadata_.emplace();
  for (const auto& [key, value] : metadata->items()) {
    metadata_->emplace(key, value.is_string() ? std::optional(value.get<std::string>()) : std::nullopt);
  }
}

/// Tensors must fill the data exactly, without overlap or gap.
void Safetensors::check_layout(std::string_view data) const {
  std::vector<std::pair<std::size_t, std::size_t>> spans;
  for (const auto& [key, tensor] : tensors_) {
    const auto begin = static_cast<std::size_t>(tensor.bytes.data() - data.data());
    spans.emplace_back(begin, begin + tensor.bytes.size());
  }
  std::sort(spans.begin(), spans.end());
  std::size_t position = 0;
  for (const auto& [begin, end] : spans) {
    if (begin < position) damaged(fmt::format("tensors overlap at byte {}", begin));
    if (begin > position) damaged(fmt::format("bytes {} to {} belong to no tensor", position, begin));
    position = end;
  }
  if (position != data.size()) {
    damaged(fmt::format("its tensors end at byte {} of {}: truncated or appended to", position, data.size()));
  }
}

const Tensor& Safetensors::tensor(const std::string& name, const std::string& dtype, std::size_t dimensions) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) damaged(fmt::format("it has no tensor '{}'", name));
  if (found->second.dtype != dtype || found->second.shape.size() != dimensions) {
    damaged(fmt::format("tensor '{}' is {} with {} dimensions, expected {} with {}", name, found->second.dtype,
                        found->second.shape.size(), dtype, dimensions));
  }
  return found->second;
}

template <class T>
std::vector<T> Safetensors::values(const std::string& name, std::size_t dimensions,
                                   std::vector<std::int64_t>* shape) const {
  const Tensor& own = tensor(name, kDtype<T>, dimensions);
  if (shape != nullptr) *shape = own.shape;
  std::vector<T> copy(own.bytes.size() / sizeof(T));
  if (!copy.empty()) std::memcpy(copy.data(), own.bytes.data(), own.bytes.size());
  return copy;
}
template std::vector<float> Safetensors::values(const std::string&, std::size_t, std::vector<std::int64_t>*) const;
template std::vector<std::int32_t> Safetensors::values(const std::string&, std::size_t,
                                                       std::vector<std::int64_t>*) const;
template std::vector<std::int64_t> Safetensors::values(const std::string&, std::size_t,
                                                       std::vector<std::int64_t>*) const;

std::optional<std::string> Safetensors::optional_text(const std::string& key) const {
  if (!metadata_) damaged("it has no __metadata__");
  const auto found = metadata_->find(key);
  if (found == metadata_->end()) return std::nullopt;
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
    damaged(fmt::format("its {} is '{}', expected a whole number", key, shown(digits)));
  }
  return std::stoll(digits);
}

std::vector<std::string> Safetensors::text_list(const std::string& key) const {
  const Header list = parse_bounded_json(text(key), {.bytes = kMostHeaderBytes, .depth = 1}, "its " + key);
  if (!list.is_array()) damaged(fmt::format("its {} is not a JSON list", key));
  std::vector<std::string> texts;
  for (const Header& element : list) {
    if (!element.is_string()) damaged(fmt::format("its {} has an element that is not text", key));
    texts.push_back(element.get<std::string>());
  }
  return texts;
}

bool all_finite(const Tensor& tensor) {
  constexpr std::uint32_t kExponent = 0x7f800000;  // all ones: NaN or infinite
  std::uint32_t broken = 0;
  for (std::size_t at = 0; at + sizeof(std::uint32_t) <= tensor.bytes.size(); at += sizeof(std::uint32_t)) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, tensor.bytes.data() + at, sizeof(bits));
    broken |= static_cast<std::uint32_t>((bits & kExponent) == kExponent);
  }
  return broken == 0;
}

}  // namespace llmcache
