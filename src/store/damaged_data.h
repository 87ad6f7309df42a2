// What the readers and writers of this folder throw.
#pragma once

#include <stdexcept>

namespace llmcache {

/// Bytes that are not what they should be. The text says what is wrong ("its header has 'a' twice"); which file that
/// is, and what to do about it, adds who asked for it.
class DamagedData : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that is missing, is not to be read, or is no file at all. The text says why ("it is a directory").
class UnreadableFile : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that cannot be written. The text says why ("No space left on device").
class UnwritableFile : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace llmcache
