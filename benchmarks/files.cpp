#include "files.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "failure.h"
#include "store/bounded_file.h"
#include "store/damaged_data.h"

namespace llmcache::bench {

std::vector<std::filesystem::path> files_in(const std::filesystem::path& folder, const char* option) {
  std::error_code error;
  std::vector<std::filesystem::path> paths;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
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

std::filesystem::path program_folder() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::filesystem::current_path() : program.parent_path();
}

std::string read_file(const std::filesystem::path& path, const std::string& kind) {
  constexpr std::uintmax_t kMaxFileBytes = std::uintmax_t{1} << 30;
  try {
    return read_bounded_file(path, kMaxFileBytes);
  } catch (const UnreadableFile& error) {
    throw Failure(fmt::format("{}: cannot be read ({}); prepare the data", path.string(), error.what()));
  } catch (const DamagedData& error) {
    refuse_data(path.string(), kind, error.what());
  }
}

void write_atomically(const std::filesystem::path& path, const std::string& content) {
  std::filesystem::path temporary = path;
  temporary += fmt::format(".{}.tmp", ::getpid());
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  out << content;
  out.close();
  std::error_code error;
  std::string reason = "check folder, permissions and space";
  if (out) {
    std::filesystem::rename(temporary, path, error);
    if (!error) return;
    reason = error.message();
  }
  std::filesystem::remove(temporary, error);
  throw Failure(fmt::format("{}: cannot be written ({})", path.string(), reason));
}

void write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json) {
  write_atomically(path, json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

}  // namespace llmcache::bench
