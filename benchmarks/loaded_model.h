// A TorchScript model as the benchmark runs it: plain, and wrapped in a LayerCache.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "files.h"
#include "llmcache/llmcache.h"
#include "outputs.h"
#include "records.h"

namespace llmcache::bench {

using Cache = LayerCache<torch::jit::Module>;

/// One line about `error`; TorchScript's errors have many.
std::string one_line(const std::exception& error);

class LoadedModel {
 public:
  /// Loads the module on the CPU and runs it on a few ids. Throws Failure.
  explicit LoadedModel(const ModelFile& file);

  /// Of all wrapping from here on: Options::weights_sample, and whether what probing finds is kept beside the model for
  /// the next time, as NAME.pt.WEIGHTS.profile. Where the folder cannot be written to, the model is probed each time.
  void prepare_wrapping(std::vector<std::vector<std::int64_t>> weights_sample, bool saved_profiles) {
    weights_sample_ = std::move(weights_sample);
    saved_profiles_ = saved_profiles;
  }

  /// Wraps the module: the weights are shared with the plain one. The first cache so made is cache(); cache_named()
  /// knows it by `name`. Throws Failure.
  WrapCost wrap(const Options& options, const std::string& name = {});

  /// The module's inputs for a request: padded on the right to its longest sequence. Ids and masks by position and
  /// name. `marks`: one for each row, or none: then all tokens are of type 0, and all are to be pooled.
  [[nodiscard]] Inputs inputs(const Rows& rows, const std::vector<RowMarks>& marks = {}) const;

  /// The plain module, without gradients.
  c10::IValue plain(const Inputs& inputs);

  /// Set by wrap().
  [[nodiscard]] Cache& cache() { return *cache_; }
  [[nodiscard]] bool wrapped() const { return cache_ != nullptr; }

  /// Another cache around the module, which is wrapped once for each way to hold its weights. Throws Failure.
  [[nodiscard]] std::shared_ptr<Cache> make_cache(const Options& options);
  /// The same, made once for each `name`; the caller clears it.
  [[nodiscard]] std::shared_ptr<Cache> cache_named(const std::string& name, const Options& options);

  /// One an output: true if its second dimension is the token.
  [[nodiscard]] const std::vector<bool>& token_output() const { return token_output_; }
  [[nodiscard]] const OutputShape& output_shape() const { return shape_; }

  /// Relative L2 distance of all outputs together, where an output has one entry a token at the tokens that came back:
  /// ||other - reference|| / ||reference||. `reference` has all tokens. Of several calls the last one has the outputs
  /// of one entry a sequence. Infinite where the shapes do not fit; NaN where no token came back.
  [[nodiscard]] double divergence(const c10::IValue& reference, const std::vector<Returned>& others) const;

 private:
  enum class Input { kIds, kMask, kPool, kTypes };

  void find_inputs();
  void find_token_outputs();

  ModelFile file_;
  torch::jit::Module module_;
  std::vector<Input> inputs_;
  std::vector<bool> token_output_;
  OutputShape shape_;
  std::vector<std::vector<std::int64_t>> weights_sample_;
  bool saved_profiles_ = false;
  std::shared_ptr<Cache> cache_;
  std::map<std::string, std::shared_ptr<Cache>> named_;
  std::map<Weights, std::shared_ptr<Cache>> wrapped_;  // the first one of each
};

}  // namespace llmcache::bench
