// Reads whole files of which nothing is known.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace llmcache {

/// All bytes of a regular file of at most `most` bytes; no more memory is taken than it has bytes. Throws
/// UnreadableFile if there is none, or it is a directory, a device or a pipe; DamagedData if it is larger, or changes
/// its size while it is read.
std::string read_bounded_file(const std::filesystem::path& path, std::uintmax_t most);

}  // namespace llmcache
