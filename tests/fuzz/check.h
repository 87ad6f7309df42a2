// What must hold of a reader for any bytes whatever. The fuzz targets and ordinary tests share the checks below: they
// return if the bytes are refused in the right way, or what was read is sound, and throw std::logic_error otherwise.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace llmcache::fuzz {

inline void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

/// parse_bounded_json and JsonObject.
void check_json(std::string_view bytes);
/// The JSON of a calibration profile, and, behind a byte of 0, its tensors. Hashes are not looked at.
void check_profile(std::string_view bytes);
/// An exported program, the list of its weights, and a guard.
void check_exported(std::string_view bytes);
/// A snapshot as a file, and as an entry of each kind.
void check_snapshot(std::string_view bytes);
/// A token file of the benchmark.
void check_token_file(std::string_view bytes);

}  // namespace llmcache::fuzz
