// What an exported archive says about its weights: which file, and which part of it, each tensor is.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache::exported {

/// A tensor in a file of the archive. Tensors of one file share memory.
struct StoredTensor {
  std::string file;
  std::int64_t scalar_type = 0;  ///< by the number that the schema gives it
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;  ///< not negative
  std::int64_t offset = 0;            ///< of its first number in the file, in numbers
};

/// Tensors by name (the dotted path of the attribute). Throws DamagedData, or Refused (pickled tensors, layouts other
/// than strided).
std::map<std::string, StoredTensor> parse_weights(std::string_view text);

/// How many numbers the file must hold for it. Throws DamagedData where that is beyond all memory.
std::int64_t numbers_needed(const StoredTensor& tensor);

}  // namespace llmcache::exported
