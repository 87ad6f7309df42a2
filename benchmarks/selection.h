// Which models run on which workloads, how the time is divided among them, and in which order requests are sent.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config.h"
#include "files.h"
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

/// An experiment, and the requests that it sends: read, and checked against the model's vocabulary.
struct SelectedExperiment : Experiment {
  std::shared_ptr<const TokenFile> tokens;
};

/// A model and what it shall run.
struct Selected {
  ModelFile model;
  std::vector<SelectedExperiment> experiments = {};
};

/// Throws Failure for names that are not there, files that are damaged, or if nothing is left to do.
std::vector<Selected> select(const Configuration& configuration);

/// How much of the time a model gets on a workload, in proportion to the others, where no configuration says so. Most
/// goes to where quality can be measured and reuse comes only with the requests behind the first ones: 12 for classes
/// with a linear probe, whose training queries fill the caches; 2 where log-likelihoods are scored, and for duplicates;
/// 1 for other tasks; 0.5 for speed alone (random weights, no task, classes without a probe).
double default_share(const ModelFile& model, const TokenFile& tokens, bool linear_probe);

/// Seconds for a share of 1, where all experiments together have `shares`; infinite with a limit of requests.
double seconds_per_share(const Configuration& configuration, double shares);

/// What --list prints.
std::string list_files(const Settings& settings);

struct StreamOptions {
  std::optional<std::uint64_t> shuffle = {};  ///< seed; unset: the order of the file
  std::optional<std::int64_t> limit = {};     ///< number of requests; unset: as many as the file has that ask
};

struct Stream {
  std::vector<std::int64_t> requests;    ///< numbers of requests of the file, in sending order
  std::optional<std::uint64_t> shuffle;  ///< seed that was used; set also where the file demanded it
};

/// Only requests that ask are sent: those behind the file's fill part. With `limit` and `shuffle` it is the first
/// requests of the file that are shuffled. A file that is grouped by label is shuffled even if nobody asked, with seed
/// 0, and as a whole.
Stream make_stream(const TokenFile& file, const StreamOptions& options);

/// 0 .. count-1 in an order that depends on the seed only.
std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed);

}  // namespace llmcache::bench
