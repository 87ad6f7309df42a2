// What several tests of the benchmark need: failures, folders, safetensors files.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "failure.h"

namespace llmcache::bench {

/// Expects `function` to throw Failure with `part` in its text.
inline void expect_failure(const std::function<void()>& function, const std::string& part) {
  try {
    function();
    FAIL() << "no Failure; expected one with: " << part;
  } catch (const Failure& failure) {
    EXPECT_THAT(failure.what(), ::testing::HasSubstr(part));
  }
}

/// A folder that is removed again.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "llmcache-bench-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

template <class T>
std::string raw(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// Builds a safetensors file tensor by tensor.
class FileBuilder {
 public:
  std::map<std::string, std::string> metadata;

  template <class T>
  void add(const std::string& name, const char* dtype, const std::vector<std::size_t>& shape,
           const std::vector<T>& values) {
    tensors_[name] = {dtype, shape, raw(values)};
  }
  void remove(const std::string& name) { tensors_.erase(name); }

  [[nodiscard]] std::string bytes() const {
    nlohmann::ordered_json header = {{"__metadata__", metadata}};
    std::string data;
    for (const auto& [name, tensor] : tensors_) {
      header[name] = {{"dtype", tensor.dtype},
                      {"shape", tensor.shape},
                      {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
      data += tensor.bytes;
    }
    const std::string head = header.dump();
    return raw(std::vector<std::uint64_t>{head.size()}) + head + data;
  }

 private:
  struct Tensor {
    std::string dtype;
    std::vector<std::size_t> shape;
    std::string bytes;
  };
  std::map<std::string, Tensor> tensors_;
};

}  // namespace llmcache::bench
