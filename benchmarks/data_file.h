// Data files that may be damaged: what the library's readers find is told as a Failure that names the file.
#pragma once

#include <filesystem>
#include <string>

namespace llmcache::bench {

/// Throws Failure: "NAME: not a usable KIND: WHAT; prepare the data again".
[[noreturn]] void refuse_data(const std::string& name, const std::string& kind, const std::string& what);

/// All bytes of a file; `kind` ("token file", "probe file") is for messages. Throws Failure if it cannot be read or is
/// larger than 1 GiB.
std::string read_file(const std::filesystem::path& path, const std::string& kind);

}  // namespace llmcache::bench
