// Numbers and texts as bytes, little-endian, and back again from bytes of which nothing is known.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "store/damaged_data.h"

namespace llmcache {

static_assert(std::endian::native == std::endian::little, "files hold numbers as this processor does");

/// Appends to a text.
class ByteWriter {
 public:
  template <class T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T>);
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    bytes_.append(bytes, sizeof(T));
  }
  /// With its length in front.
  void text(std::string_view value) {
    number<std::uint64_t>(value.size());
    bytes_ += value;
  }
  /// With their number in front.
  template <class T>
  void numbers(const T* values, std::size_t count) {
    static_assert(std::is_arithmetic_v<T>);
    number<std::uint64_t>(count);
    if (count > 0) bytes_.append(reinterpret_cast<const char*>(values), count * sizeof(T));
  }

  [[nodiscard]] const std::string& bytes() const noexcept { return bytes_; }

 private:
  std::string bytes_;
};

/// Reads what a ByteWriter wrote. Throws DamagedData where there are fewer bytes than that takes; nothing is allocated
/// for what is not there. Refers to the bytes, which must live as long.
class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : left_(bytes) {}

  template <class T>
  T number() {
    static_assert(std::is_arithmetic_v<T>);
    const std::string_view bytes = take(sizeof(T));
    T value;
    std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
  }
  /// A number that is 0 or 1.
  bool flag() {
    const auto value = number<std::uint8_t>();
    if (value > 1) throw DamagedData("it has neither yes nor no where one of them is expected");
    return value == 1;
  }
  std::string_view text() { return take(number<std::uint64_t>()); }
  template <class T>
  std::vector<T> numbers() {
    const auto count = number<std::uint64_t>();
    if (count > left_.size() / sizeof(T)) refuse();
    std::vector<T> values(count);
    const std::string_view bytes = take(count * sizeof(T));
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  std::string_view take(std::uint64_t count) {
    if (count > left_.size()) refuse();
    const std::string_view taken = left_.substr(0, count);
    left_.remove_prefix(count);
    return taken;
  }
  /// What has not been read.
  [[nodiscard]] std::string_view left() const noexcept { return left_; }
  /// Throws if anything is left.
  void finish() const {
    if (!left_.empty()) throw DamagedData("it has bytes behind its end");
  }

 private:
  [[noreturn]] static void refuse() { throw DamagedData("it ends in the midst of a value"); }

  std::string_view left_;
};

}  // namespace llmcache
