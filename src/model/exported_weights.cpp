#include "model/exported_weights.h"

#include <fmt/core.h>

#include <algorithm>

#include "model/exported_json.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

constexpr std::int64_t kMostNumbers = std::int64_t{1} << 44;

std::vector<std::int64_t> sizes_of(const Json& meta, const char* key, const std::string& subject) {
  constexpr std::size_t kMostDimensions = 16;
  std::vector<std::int64_t> sizes;
  for (const Json& size : list_field(meta, key, subject)) {
    sizes.push_back(fixed_size(size, subject));
    if (sizes.back() < 0) throw DamagedData(fmt::format("{} has a negative size", subject));
  }
  if (sizes.size() > kMostDimensions) throw DamagedData(fmt::format("{} has {} dimensions", subject, sizes.size()));
  return sizes;
}

StoredTensor stored_tensor(const std::string& name, const Json& entry) {
  const std::string subject = fmt::format("the weight '{}'", shown(name));
  const Json& pickled = field(entry, "use_pickle", subject);
  if (pickled != false) {
    throw Refused(
        fmt::format("{} is pickled, as tensor subclasses (quantised weights, say) and custom objects are: "
                    "replace it by a plain tensor, then export again",
                    subject));
  }
  const Json& meta = object_field(entry, "tensor_meta", subject);
  constexpr std::int64_t kStrided = 7;
  if (whole_field(meta, "layout", subject) != kStrided) {
    throw Refused(fmt::format("{} is not strided: convert it by to_dense(), then export again", subject));
  }
  StoredTensor tensor;
  tensor.file = text_field(entry, "path_name", subject);
  tensor.scalar_type = whole_field(meta, "dtype", subject);
  tensor.sizes = sizes_of(meta, "sizes", subject);
  tensor.strides = sizes_of(meta, "strides", subject);
  tensor.offset = fixed_size(field(meta, "storage_offset", subject), subject);
  if (tensor.strides.size() != tensor.sizes.size() || tensor.offset < 0) {
    throw DamagedData(fmt::format("{} has strides that do not fit its sizes", subject));
  }
  numbers_needed(tensor);
  return tensor;
}

}  // namespace

std::map<std::string, StoredTensor> parse_weights(std::string_view text) {
  const Json json = parse_json(text, "the list of weights");
  std::map<std::string, StoredTensor> tensors;
  for (const auto& [name, entry] : object_field(json, "config", "the list of weights").items()) {
    tensors.emplace(name, stored_tensor(name, entry));
  }
  return tensors;
}

std::int64_t numbers_needed(const StoredTensor& tensor) {
  std::int64_t all = 1;
  std::int64_t last = tensor.offset;
  for (std::size_t d = 0; d < tensor.sizes.size(); ++d) {
    if (tensor.sizes[d] == 0) return 0;
    std::int64_t reach = 0;
    if (__builtin_mul_overflow(all, tensor.sizes[d], &all) || all > kMostNumbers ||
        __builtin_mul_overflow(tensor.sizes[d] - 1, tensor.strides[d], &reach) ||
        __builtin_add_overflow(last, reach, &last) || last > kMostNumbers) {
      throw DamagedData("a weight is larger than any memory");
    }
  }
  if (last > kMostNumbers) throw DamagedData("a weight begins beyond any memory");
  return last + 1;
}

}  // namespace llmcache::exported
