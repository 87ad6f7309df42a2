// Which model states belong to, in a form that holds outside of the process.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "store/bounded_json.h"

namespace llmcache {

/// How the engine lays out what banks keep, and what it means. To be raised by whoever changes that: states that were
/// kept before are then nobody's any more.
inline constexpr std::int64_t kStateLayout = 2;

/// All that decides whether kept states are those that this model would compute. What is not in it: names and places of
/// files, processors, numbers of threads.
struct ModelIdentity {
  std::string contents;   ///< digest of graph, constants, tensors and other attributes (Model::identity)
  std::string weights;    ///< how those of linear layers are held: "as-loaded"
  std::string attention;  ///< the places where tokens meet, and of which kind they are
  std::string numerics;   ///< device, type, and the settings of LibTorch that change results
  std::string torch;      ///< version of LibTorch
  std::int64_t state_layout = kStateLayout;

  /// 64 hexadecimal digits, of all of it.
  [[nodiscard]] std::string digest() const;
  bool operator==(const ModelIdentity&) const = default;
};

nlohmann::ordered_json identity_json(const ModelIdentity& identity);
/// Throws DamagedData.
ModelIdentity identity_from(const JsonObject& json);

/// Why states of `kept` are not those of `own`, for people: "its weights, graph or settings are others". Empty: they
/// are.
std::string identity_difference(const ModelIdentity& kept, const ModelIdentity& own);

}  // namespace llmcache
