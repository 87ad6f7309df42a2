// Which models run on which workloads.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "model_files.h"
#include "token_file.h"

namespace llmcache::bench {

/// DATA/WORKLOAD.TOKENIZER.safetensors
struct WorkloadFile {
  std::string workload;
  std::string tokenizer;
  std::filesystem::path path;
};

/// Sorted by name. Throws Failure if there is no such folder.
std::vector<WorkloadFile> workload_files(const std::filesystem::path& folder);

/// A model and what it shall run on.
struct Selected {
  ModelFile model;
  std::vector<std::shared_ptr<const TokenFile>> workloads;  ///< read, checked against the model's vocabulary
};

/// Throws Failure for names that are not there, files that are damaged, or if nothing is left to do.
std::vector<Selected> select(const Arguments& arguments);

/// What --list prints.
std::string list_files(const Arguments& arguments);

}  // namespace llmcache::bench
