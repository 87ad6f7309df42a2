// What is to be loaded as a model must be a file.
#pragma once

#include <fmt/core.h>

#include <filesystem>
#include <system_error>

#include "refusal.h"

namespace llmcache {

/// Throws Error(kInvalidFile).
inline void check_is_file(const std::filesystem::path& path) {
  const auto refuse = [&](const char* what) { refuse_file(fmt::format("{}: {}", path.string(), what)); };
  std::error_code error;
  if (!std::filesystem::exists(path, error)) refuse("there is no such file");
  if (std::filesystem::is_directory(path, error)) refuse("it is a folder");
  if (!std::filesystem::is_regular_file(path, error)) refuse("it is no ordinary file");  // a pipe would be waited for
}

}  // namespace llmcache
