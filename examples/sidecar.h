// What the examples read of a model's sidecar: MODEL.json beside MODEL.pt, by tools/models/export_models.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace llmcache::examples {

struct Sidecar {
  std::string tokenizer;        ///< empty: unknown
  std::string weights;          ///< where they came from; empty: unknown
  std::int64_t max_tokens = 0;  ///< 0: unknown
};

/// All unknown where there is no sidecar. Throws std::runtime_error if there is one that is damaged.
Sidecar read_sidecar(const std::filesystem::path& model);

/// Where tools/models/export_models.py puts the tokenizer of the model at `model`: MODELS/tokenizers/NAME, the name
/// as in the sidecar. Throws std::runtime_error if no sidecar names one.
std::filesystem::path tokenizer_beside(const std::filesystem::path& model);

/// `chosen`, or where that is empty the one beside the model.
std::filesystem::path tokenizer_for(const std::filesystem::path& model, const std::string& chosen);

}  // namespace llmcache::examples
