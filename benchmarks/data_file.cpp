#include "data_file.h"

#include <fmt/core.h>

#include <cstdint>

#include "failure.h"
#include "store/bounded_file.h"
#include "store/damaged_data.h"

namespace llmcache::bench {

void refuse_data(const std::string& name, const std::string& kind, const std::string& what) {
  throw Failure(fmt::format("{}: not a usable {}: {}; prepare the data again", name, kind, what));
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

}  // namespace llmcache::bench
