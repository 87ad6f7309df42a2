// Models in a folder: NAME.pt and its sidecar NAME.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace llmcache::bench {

struct ModelFile {
  std::string name;
  std::filesystem::path path;       ///< of the .pt
  std::string weights = "unknown";  ///< "hub:ID", "pypi:PACKAGE VERSION", "random (seed N)" or "unknown"
  std::string tokenizer;            ///< empty: unknown
  std::string family;               ///< "encoder" or "decoder"; empty: unknown
  std::string dtype;
  std::int64_t vocabulary = 0;  ///< 0: unknown
  std::int64_t max_tokens = 0;  ///< 0: unknown
  std::string torch_version;    ///< that exported it; empty: unknown
  std::string transformers_version;
  std::string output;  ///< what forward returns, such as "sentence_embedding"; empty: unknown
  std::string sha256;  ///< of the .pt, as its sidecar says; empty: unknown

  [[nodiscard]] bool random_weights() const { return weights.starts_with("random"); }
};

/// Names of the models in `folder`, sorted. Throws Failure if there is no such folder.
std::vector<std::string> model_names(const std::filesystem::path& folder);

/// Reads the sidecar of the .pt at `path`. Without sidecar, most fields stay unknown. Throws Failure
/// if the .pt is missing, is not of the size that the sidecar gives, or the sidecar is damaged.
ModelFile read_model_file(const std::filesystem::path& path);

}  // namespace llmcache::bench
