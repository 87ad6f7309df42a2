// What the frames of a snapshot hold: entries of banks, without LibTorch. docs/snapshot-format.md has every byte.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "store/model_identity.h"

namespace llmcache {

/// Types of numbers that tensors in snapshots may have. The values are part of the format.
enum class NumberType : std::uint8_t {
  kUInt8 = 1,
  kInt8 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 6,
  kBFloat16 = 7,
  kFloat32 = 8,
  kFloat64 = 9,
  kBool = 10,
};

/// Of one number; 0 for what is no NumberType.
[[nodiscard]] std::uint64_t bytes_of_number(NumberType type) noexcept;

/// A tensor's numbers, contiguous.
struct TensorRecord {
  NumberType type = NumberType::kFloat32;
  std::vector<std::int64_t> sizes;
  std::string_view bytes;  ///< of what was read; to write an entry they are given apart
};

/// An entry refers to the bytes that it was read from. Each write_() gives all of an entry but the bytes of its
/// tensors, which stand behind it, in their order. Each read_() throws DamagedData unless the bytes are one whole
/// entry.
struct OutputRecord {
  std::string_view key;
  bool exact = false;
  std::int32_t rows = 0;           ///< of the batch it was computed in
  std::int32_t padded_length = 0;  ///< likewise
  std::vector<TensorRecord> tensors;
};
std::string write_output(const OutputRecord& record);
OutputRecord read_output(std::string_view bytes);

/// A part of a sequence in the prefix tree, named by all tokens up to its end.
struct PrefixRecord {
  std::string_view partition;
  std::uint32_t ids_per_token = 1;   ///< numbers a token
  std::uint64_t begin = 0;           ///< first token that it has states of; they go up to the last
  std::vector<std::int64_t> tokens;  ///< of the sequence, up to its end
  std::uint8_t shortest = 0;         ///< see KeyRange
  std::uint8_t longest = 0;
  float saved_ms = 0;  ///< by one token
  std::vector<TensorRecord> tensors;

  [[nodiscard]] std::uint64_t end() const noexcept { return tokens.size() / ids_per_token; }
};
std::string write_prefix(const PrefixRecord& record);
PrefixRecord read_prefix(std::string_view bytes);

/// A sequence with the states of all its tokens.
struct TokenRecord {
  std::string_view partition;
  std::uint32_t ids_per_token = 1;  ///< numbers a token
  std::vector<std::int64_t> tokens;
  std::vector<std::uint16_t> counts;  ///< by token: of how many sequences its states are the mean
  double saved_ms = 0;
  std::vector<std::uint8_t> encoded;  ///< by tensor of the layout: it is held in the bank's format, not as computed
  std::vector<TensorRecord> tensors;
};
std::string write_token_states(const TokenRecord& record);
TokenRecord read_token_states(std::string_view bytes);

/// A calibration profile, as its two files hold it.
struct CalibrationRecord {
  std::string_view json;
  std::string_view tensors;  ///< empty: there are none
};
std::string write_calibration(const CalibrationRecord& record);
CalibrationRecord read_calibration(std::string_view bytes);

/// The first frame.
struct SnapshotHeader {
  std::string library;  ///< version that wrote it
  ModelIdentity identity;
  struct Part {
    std::string name;
    std::uint32_t kind = 0;  ///< of its frames
    std::string layout;      ///< what its entries hold: they fit only where this is the same
  };
  std::vector<Part> parts;
};
std::string write_header(const SnapshotHeader& header);
SnapshotHeader read_header(std::string_view bytes);

}  // namespace llmcache
