#include "store/model_identity.h"

#include <fmt/core.h>

#include "store/damaged_data.h"
#include "store/digest.h"

namespace llmcache {

std::string ModelIdentity::digest() const {
  Digest digest;
  for (const std::string* part : {&contents, &weights, &attention, &numerics, &torch}) digest.add(*part);
  digest.add(std::to_string(state_layout));
  return digest.hex();
}

nlohmann::ordered_json identity_json(const ModelIdentity& identity) {
  return {{"contents", identity.contents}, {"weights", identity.weights}, {"attention", identity.attention},
          {"numerics", identity.numerics}, {"torch", identity.torch},     {"state_layout", identity.state_layout},
          {"digest", identity.digest()}};
}

ModelIdentity identity_from(const JsonObject& json) {
  ModelIdentity identity;
  identity.contents = json.text("contents");
  identity.weights = json.text("weights");
  identity.attention = json.text("attention");
  identity.numerics = json.text("numerics");
  identity.torch = json.text("torch");
  identity.state_layout = json.whole("state_layout");
  if (json.text("digest") != identity.digest()) throw DamagedData("its identity does not have the digest it names");
  return identity;
}

std::string identity_difference(const ModelIdentity& kept, const ModelIdentity& own) {
  if (kept.state_layout != own.state_layout) {
    return fmt::format("states are laid out as version {} there, and as version {} in this version of the library",
                       kept.state_layout, own.state_layout);
  }
  if (kept.torch != own.torch) {
    return fmt::format("they were computed with LibTorch {}, and this is {}", kept.torch, own.torch);
  }
  if (kept.weights != own.weights) {
    return fmt::format("its weights were held {}, and here they are {}", kept.weights, own.weights);
  }
  if (kept.numerics != own.numerics) {
    return fmt::format("they were computed on {}, and this is {}", kept.numerics, own.numerics);
  }
  if (kept.attention != own.attention) return "its attention is of another kind";
  if (kept.contents != own.contents) return "its weights, graph or settings are others";
  return {};
}

}  // namespace llmcache
