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
  for (const Json& size : JsonObject(meta, subject).list(key)) sizes.push_back(fixed_size(size, subject));
  if (sizes.size() > kMostDimensions) throw DamagedData(fmt::format("{} has {} dimensions", subject, sizes.size()));
  return sizes;
}

StoredTensor stored_tensor(const std::string& name, const Json& entry) {
  const std::string subject = fmt::format("the weight '{}'", shown(name));
  const Json& pickled = JsonObject(entry, subject).at("use_pickle");
  if (pickled != false) {
    throw Refused(
        fmt::format("{} is pickled, as tensor subclasses (quantised weights, say) and custom objects are: "
                    "replace it by a plain tensor, then export again",
                    subject));
  }
  const Json& meta = JsonObject(entry, subject).at("tensor_meta");
  constexpr std::int64_t kStrided = 7;
  if (JsonObject(meta, subject).whole("layout") != kStrided) {
    throw Refused(fmt::format("{} is not strided: convert it by to_dense(), then export again", subject));
  }
  StoredTensor tensor;
  tensor.file = JsonObject(entry, subject).text("path_name");
  tensor.scalar_type = JsonObject(meta, subject).whole("dtype");
  tensor.sizes = sizes_of(meta, "sizes", subject);
  tensor.strides = sizes_of(meta, "strides", subject);
  tensor.offset = fixed_size(JsonObject(meta, subject).at("storage_offset"), subject);
  if (tensor.strides.size() != tensor.sizes.size()) {
    throw DamagedData(fmt::format("{} has strides that do not fit its sizes", subject));
  }
  numbers_needed(tensor);
  return tensor;
}

}  // namespace

std::map<std::string, StoredTensor> parse_weights(std::string_view text) {
  const Json json = parse_json(text, "the list of weights");
  std::map<std::string, StoredTensor> tensors;
  const Json& config = JsonObject(json, "the list of weights").at("config");
  if (!config.is_object()) throw DamagedData("'config' of the list of weights is not a JSON object");
  for (const auto& [name, entry] : config.items()) {
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
