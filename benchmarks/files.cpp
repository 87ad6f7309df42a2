#include "files.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>

#include "failure.h"
#include "store/bounded_file.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

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

std::vector<fs::path> files_in(const fs::path& folder, const char* option) {
  std::error_code error;
  std::vector<fs::path> paths;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    paths.push_back(entry->path());
  }
  if (error) {
    throw Failure(
        fmt::format("{} folder {}: {}; see benchmarks/README.md, Files, for what belongs there, or name another "
                    "with --{}",
                    option, folder.string(), error.message(), option));
  }
  std::ranges::sort(paths);
  return paths;
}

void refuse_data(const std::string& name, const std::string& kind, const std::string& what) {
  throw Failure(fmt::format("{}: not a usable {}: {}; prepare the data again", name, kind, what));
}

fs::path program_folder() {
  std::error_code error;
  const auto program = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::current_path() : program.parent_path();
}

std::string read_file(const fs::path& path, const std::string& kind) {
  constexpr std::uintmax_t kMaxFileBytes = std::uintmax_t{1} << 30;
  try {
    return read_bounded_file(path, kMaxFileBytes);
  } catch (const UnreadableFile& error) {
    throw Failure(fmt::format("{}: cannot be read ({}); prepare the data", path.string(), error.what()));
  } catch (const DamagedData& error) {
    refuse_data(path.string(), kind, error.what());
  }
}

void write_atomically(const fs::path& path, const std::string& content) {
  fs::path temporary = path;
  temporary += fmt::format(".{}.tmp", ::getpid());
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  out << content;
  out.close();
  std::error_code error = std::make_error_code(std::errc::io_error);  // of whatever kind: streams do not say
  if (out) fs::rename(temporary, path, error);
  if (!error) return;
  std::error_code ignored;
  fs::remove(temporary, ignored);
  throw Failure(
      fmt::format("{}: cannot be written ({}); check folder, permissions and space", path.string(), error.message()));
}

void write_json(const fs::path& path, const nlohmann::ordered_json& json) {
  write_atomically(path, json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

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
