// Files that the benchmark reads, which may be damaged, and writes.
#pragma once

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

}  // namespace llmcache::bench
