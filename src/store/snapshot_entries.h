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

/// What follows from the source of an encoder-decoder's row is kept as outputs are, and written as one.

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

/// A sequence of a causal model, or a passage that several have, found by any run of its tokens.
struct SegmentRecord {
  std::string_view partition;
  std::uint32_t ids_per_token = 1;  ///< numbers a token
  std::vector<std::int64_t> tokens;
  std::int64_t position = 0;   ///< of its first token, which its keys are turned to
  std::uint16_t averaged = 1;  ///< sequences that its states are the mean over; 1: those of one whole sequence
  double saved_ms = 0;
  std::vector<TensorRecord> tensors;
};
std::string write_segment(const SegmentRecord& record);
SegmentRecord read_segment(std::string_view bytes);

/// By layer that is fingerprinted: what fingerprints there are relative to, in the paper's mode.
struct CentresRecord {
  struct Centre {
    std::uint64_t observations = 0;  ///< states that were taken in
    std::vector<double> sums;        ///< of these, by value
    std::vector<float> centre;       ///< in force; empty: there is none yet
  };
  std::vector<Centre> centres;
};
std::string write_centres(const CentresRecord& record);
CentresRecord read_centres(std::string_view bytes);

/// The state of a sequence behind one layer, and what its fingerprints are made of.
struct LayerRecord {
  std::uint32_t layer = 0;
  std::string_view partition;
  std::vector<float> states;        ///< one after the other; empty: fingerprints are made of token ids
  std::vector<std::uint8_t> given;  ///< by input of the model: 1, it was there
  std::uint32_t audits = 0;         ///< of hits on it
  double error_sum = 0;             ///< that these found
  double saved_ms = 0;
  std::vector<TensorRecord> tensors;  ///< the state, and the inputs that were there
};
std::string write_layer_state(const LayerRecord& record);
LayerRecord read_layer_state(std::string_view bytes);

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
