#include "check.h"
#include "store/damaged_data.h"
#include "store/snapshot_entries.h"
#include "store/snapshot_file.h"

namespace llmcache::fuzz {
namespace {

void check_tensors(std::string_view bytes, const std::vector<TensorRecord>& tensors) {
  for (const TensorRecord& tensor : tensors) {
    std::uint64_t size = bytes_of_number(tensor.type);
    for (const std::int64_t one : tensor.sizes) size *= static_cast<std::uint64_t>(one);
    require(size == tensor.bytes.size(), "sizes and bytes of a tensor do not fit");
    require(tensor.bytes.empty() || (tensor.bytes.data() >= bytes.data() &&
                                     tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size()),
            "tensor outside the entry");
  }
}

/// Runs a reader of an entry, which may refuse it.
template <class Read>
void entry(const Read& read) {
  try {
    read();
  } catch (const DamagedData&) {
  }
}

void check_entries(std::string_view bytes) {
  entry([&] {
    const OutputRecord record = read_output(bytes);
    require(record.rows >= 0 && record.padded_length >= 0, "batch of negative size");
    check_tensors(bytes, record.tensors);
  });
  entry([&] {
    const PrefixRecord record = read_prefix(bytes);
    require(record.ids_per_token > 0 && record.begin < record.end(), "prefix without tokens");
    require(record.tokens.size() % record.ids_per_token == 0, "half a token");
    check_tensors(bytes, record.tensors);
  });
  entry([&] {
    const TokenRecord record = read_token_states(bytes);
    require(record.counts.size() * record.ids_per_token == record.tokens.size(), "tokens and counts do not fit");
    check_tensors(bytes, record.tensors);
  });
  entry([&] {
    const SegmentRecord record = read_segment(bytes);
    require(record.ids_per_token > 0 && record.tokens.size() % record.ids_per_token == 0, "half a token");
    require(record.averaged > 0 && record.position >= 0, "segment that cannot be");
    check_tensors(bytes, record.tensors);
  });
  entry([&] {
    for (const CentresRecord::Centre& one : read_centres(bytes).centres) {
      require(one.sums.size() * sizeof(double) <= bytes.size(), "sums outside the entry");
    }
  });
  entry([&] {
    const LayerRecord record = read_layer_state(bytes);
    require(record.states.size() * sizeof(float) <= bytes.size(), "states outside the entry");
    require(!record.tensors.empty() && record.tensors.size() <= record.given.size() + 1, "inputs that are not there");
    check_tensors(bytes, record.tensors);
  });
  entry([&] { static_cast<void>(read_calibration(bytes)); });
  entry([&] {
    const SnapshotHeader header = read_header(bytes);
    require(read_header(write_header(header)).identity == header.identity, "another header when written and read");
  });
}

}  // namespace

void check_snapshot(std::string_view bytes) {
  check_entries(bytes);
  try {
    SnapshotReader reader(open_text(bytes));
    SnapshotFrame frame;
    std::string content;
    while (reader.next(frame, content)) {
      require(content.size() == frame.bytes && content.size() < bytes.size(), "frame larger than the file");
      check_entries(content);
    }
  } catch (const DamagedData&) {
  } catch (const LaterVersion&) {
  }
}

}  // namespace llmcache::fuzz
