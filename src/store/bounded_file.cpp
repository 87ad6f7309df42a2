#include "store/bounded_file.h"

#include <fmt/core.h>

#include <fstream>
#include <new>
#include <system_error>

#include "store/damaged_data.h"

namespace llmcache {

std::string read_bounded_file(const std::filesystem::path& path, std::uintmax_t most) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) throw UnreadableFile("there is no such file");
  if (error) throw UnreadableFile(error.message());
  if (status.type() == fs::file_type::directory) throw UnreadableFile("it is a directory");
  if (status.type() != fs::file_type::regular) throw UnreadableFile("it is a device or pipe, not a file");
  const std::uintmax_t size = fs::file_size(path, error);
  if (error) throw UnreadableFile(error.message());
  if (size > most) throw DamagedData(fmt::format("it has {} bytes, at most {} are expected", size, most));
  std::ifstream in(path, std::ios::binary);
  if (!in) throw UnreadableFile("it cannot be opened; check its permissions");
  std::string bytes;
  try {
    bytes.resize(size);
  } catch (const std::bad_alloc&) {
    throw UnreadableFile(fmt::format("there is no memory for its {} bytes", size));
  }
  in.read(bytes.data(), static_cast<std::streamsize>(size));
  if (static_cast<std::uintmax_t>(in.gcount()) != size || in.peek() != std::ifstream::traits_type::eof()) {
    throw DamagedData("its size changed while it was read");
  }
  return bytes;
}

}  // namespace llmcache
