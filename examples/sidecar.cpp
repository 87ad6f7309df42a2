#include "sidecar.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace llmcache::examples {

namespace fs = std::filesystem;

Sidecar read_sidecar(const fs::path& model) {
  const fs::path path = fs::path(model).replace_extension(".json");
  std::ifstream file(path);
  if (!file) return {};
  Sidecar sidecar;
  try {
    const auto json = nlohmann::json::parse(file);
    sidecar.tokenizer = json.value("tokenizer", "");
    sidecar.weights = json.value("weights", "");
    sidecar.max_tokens = json.value("max_tokens", std::int64_t{0});
  } catch (const nlohmann::json::exception&) {
    throw std::runtime_error(path.string() + " does not describe a model; export the model again");
  }
  return sidecar;
}

fs::path tokenizer_beside(const fs::path& model) {
  const std::string name = read_sidecar(model).tokenizer;
  if (name.empty()) {
    throw std::runtime_error(model.string() +
                             " has no sidecar that names its tokenizer; give a tokenizer.json by --tokenizer");
  }
  return model.parent_path() / "tokenizers" / name;
}

std::filesystem::path tokenizer_for(const std::filesystem::path& model, const std::string& chosen) {
  return chosen.empty() ? tokenizer_beside(model) : std::filesystem::path(chosen);
}

}  // namespace llmcache::examples
