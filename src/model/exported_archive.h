// The files in an archive of torch.export.save(): the program's text, and its weights as tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>

namespace llmcache::exported {

using ReadAdapter = caffe2::serialize::ReadAdapterInterface;

struct Archive {
  std::string program;                        ///< JSON
  std::map<std::string, at::Tensor> tensors;  ///< by name; those that were saved sharing memory share it
};

/// Is it an archive of torch.export, whatever else may be wrong with it? False where it cannot be read.
bool is_exported_archive(const std::filesystem::path& path);

/// Reads all of it; tensors are put on `device`. Throws DamagedData, Refused, and what LibTorch throws.
Archive read_archive(std::shared_ptr<ReadAdapter> bytes, at::Device device);

/// The type that the schema's number stands for. Throws Refused for those that no model has been tried with.
at::ScalarType scalar_type_of(std::int64_t code);

}  // namespace llmcache::exported
