#include "model_files.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>

#include "failure.h"
#include "files.h"
#include "store/bounded_file.h"
#include "store/bounded_json.h"

namespace llmcache::bench {
namespace {

namespace fs = std::filesystem;
constexpr std::uintmax_t kMaxSidecarBytes = std::uintmax_t{1} << 20;

void read_sidecar(const fs::path& path, std::uintmax_t model_bytes, ModelFile& model) {
  std::int64_t bytes = 0;
  try {
    const nlohmann::json json = parse_bounded_json(read_bounded_file(path, kMaxSidecarBytes));
    const JsonObject sidecar(json);
    model.weights = sidecar.text("weights");
    model.tokenizer = sidecar.text("tokenizer");
    model.dtype = sidecar.text("dtype");
    model.vocabulary = sidecar.whole("vocab", 1);
    model.max_tokens = sidecar.whole("max_tokens", 1);
    if (sidecar.has("family")) model.family = sidecar.text("family");
    if (sidecar.has("output")) model.output = sidecar.text("output");
    if (sidecar.has("sha256")) model.sha256 = sidecar.text("sha256");
    const JsonObject versions = sidecar.object("versions");
    model.torch_version = versions.text("torch");
    model.transformers_version = versions.text("transformers");
    bytes = sidecar.whole("bytes", 1);
  } catch (const std::runtime_error& error) {  // DamagedData, UnreadableFile
    throw Failure(fmt::format("{}: damaged sidecar: {}; export the model again", path.string(), error.what()));
  }
  if (static_cast<std::uintmax_t>(bytes) != model_bytes) {
    throw Failure(fmt::format("{}: it has {} bytes, its sidecar says {}; export the model again", model.path.string(),
                              model_bytes, bytes));
  }
}

}  // namespace

std::vector<std::string> model_names(const fs::path& folder) {
  std::vector<std::string> names;
  for (const fs::path& path : files_in(folder, "models")) {
    if (path.extension() == ".pt") names.push_back(path.stem().string());
  }
  std::ranges::sort(names);
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
