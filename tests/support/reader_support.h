// What tests of readers have in common: what a reader refuses with, harmful texts, files.
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "store/damaged_data.h"

namespace llmcache {

/// What `read` refuses its file with; empty if it does not.
template <class Refusal = DamagedData, class Read>
std::string refusal(const Read& read) {
  try {
    static_cast<void>(read());
  } catch (const Refusal& error) {
    return error.what();
  }
  return "";
}

inline std::string repeated(const std::string& part, std::size_t times) {
  std::string text;
  for (std::size_t i = 0; i < times; ++i) text += part;
  return text;
}

/// {"k0": 0, "k1": 0, ...}
inline std::string object_of(std::size_t keys) {
  std::string text = "{";
  for (std::size_t i = 0; i < keys; ++i) text += (i > 0 ? ",\"k" : "\"k") + std::to_string(i) + "\":{}";
  return text + "}";
}

/// The same with one bit of byte `at` changed; bits count modulo 8.
inline std::string flipped(std::string bytes, std::size_t at, std::size_t bit) {
  bytes[at] = static_cast<char>(bytes[at] ^ (1 << bit % 8));
  return bytes;
}

inline std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::remove(path);  // ext4 flushes a file that replaces what it held, which takes long a thousand times
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace llmcache
