#include "model_files.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "failure.h"

namespace llmcache::bench {
namespace {

namespace fs = std::filesystem;
constexpr std::uintmax_t kMaxSidecarBytes = std::uintmax_t{1} << 20;

void read_sidecar(const fs::path& path, std::uintmax_t model_bytes, ModelFile& model) {
  const auto bad = [&](const std::string& what) {
    throw Failure(fmt::format("{}: damaged sidecar: {}; export the model again", path.string(), what));
  };
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error || size > kMaxSidecarBytes) bad("it cannot be read, or is too large");
  std::ifstream in(path);
  const nlohmann::json sidecar = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!sidecar.is_object()) bad("it is not a JSON object");

  const auto text = [&](const nlohmann::json& object, const char* key) -> std::string {
    const auto value = object.find(key);
    if (value == object.end() || !value->is_string()) bad(fmt::format("'{}' is missing or not text", key));
    return value->get<std::string>();
  };
  const auto count = [&](const char* key) -> std::int64_t {
    const auto value = sidecar.find(key);
    if (value == sidecar.end() || !value->is_number_integer() || value->get<std::int64_t>() <= 0) {
      bad(fmt::format("'{}' is missing or not a positive number", key));
    }
    return value->get<std::int64_t>();
  };
  model.weights = text(sidecar, "weights");
  model.tokenizer = text(sidecar, "tokenizer");
  model.dtype = text(sidecar, "dtype");
  model.vocabulary = count("vocab");
  model.max_tokens = count("max_tokens");
  if (sidecar.contains("family")) model.family = text(sidecar, "family");
  if (sidecar.contains("output")) model.output = text(sidecar, "output");
  if (sidecar.contains("sha256")) model.sha256 = text(sidecar, "sha256");
  const auto versions = sidecar.find("versions");
  if (versions == sidecar.end() || !versions->is_object()) bad("'versions' is missing");
  model.torch_version = text(*versions, "torch");
  model.transformers_version = text(*versions, "transformers");
  if (static_cast<std::uintmax_t>(count("bytes")) != model_bytes) {
    throw Failure(fmt::format("{}: it has {} bytes, its sidecar says {}; export the model again", model.path.string(),
                              model_bytes, count("bytes")));
  }
}

}  // namespace

std::vector<std::string> model_names(const fs::path& folder) {
  std::error_code error;
  std::vector<std::string> names;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().extension() == ".pt") names.push_back(entry->path().stem().string());
  }
  if (error) {
    throw Failure(fmt::format("models folder {}: {}; export the models there, or name another with --models",
                              folder.string(), error.message()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

ModelFile read_model_file(const fs::path& path) {
  ModelFile model;
  model.name = path.stem().string();
  model.path = path;
  std::error_code error;
  const std::uintmax_t bytes = fs::file_size(path, error);
  if (error) throw Failure(fmt::format("model {}: {}; give the path of a .pt file", path.string(), error.message()));
  const fs::path sidecar = fs::path(path).replace_extension(".json");
  if (fs::exists(sidecar, error)) read_sidecar(sidecar, bytes, model);
  return model;
}

}  // namespace llmcache::bench
