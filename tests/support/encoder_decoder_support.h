// What tests of models of a source and a target have in common.
#pragma once

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support.h"

namespace llmcache::test {

using Ids = std::vector<std::int64_t>;

/// A row: its source, and the target so far.
struct Row {
  Ids source, target;
};

/// Two layers over what a model of its own makes of source and target ids, both below 300.
class TwoLayers : public Model {
 public:
  std::int64_t layers() const override { return 2; }
  void layer(std::int64_t /*i*/, Activations& activations) const override {
    activations.hidden = activations.hidden.tanh();
  }
  c10::IValue head(Activations& activations) const override { return activations.hidden; }
  at::Device device() const override { return at::kCPU; }
  at::ScalarType dtype() const override { return at::kFloat; }
  InputSpec input_spec() const override {
    InputSpec spec{{"source_ids", "target_ids"}, {false, false}, {300, 300}};
    spec.source = {true, false};
    return spec;
  }
  void describe(ModelProfile& profile) const override {
    Model::describe(profile);
    profile.ids_argument = 1;
    profile.source_arguments = {0};
  }
};

inline Ids random_ids(std::mt19937& random, std::size_t tokens) {
  std::uniform_int_distribution<std::int64_t> id(10, 299);  // the first ids are special
  Ids ids(tokens);
  for (auto& one : ids) one = id(random);
  return ids;
}

/// Rows padded to their longest, and `extra` tokens more. Targets of models without a mask for them are of one length.
inline Request request_of(const ModelProfile& profile, const std::vector<Row>& rows, std::int64_t extra_source = 0,
                          std::int64_t extra_target = 0) {
  const auto padded = [&](auto part, std::int64_t extra) {
    std::vector<Ids> all;
    for (const Row& row : rows) all.push_back(part(row));
    PaddedBatch batch = pad(all);
    const auto longer = [&](const at::Tensor& t) { return at::constant_pad_nd(t, {0, extra}, 0); };
    return PaddedBatch{longer(batch.ids), longer(batch.mask)};
  };
  const auto source = padded([](const Row& row) { return row.source; }, extra_source);
  const auto target = padded([](const Row& row) { return row.target; }, extra_target);
  Request request{target.inputs(profile, source), {}, target.ids.size(1)};
  for (const Row& row : rows) request.spans.push_back({0, static_cast<std::int64_t>(row.target.size())});
  return request;
}

inline std::vector<std::int64_t> reused_of_source(const LayerCacheBase& cache) {
  std::vector<std::int64_t> all;
  for (const auto& sequence : cache.last_report().sequences) all.push_back(sequence.source_reused);
  return all;
}

/// A test of one exported encoder-decoder, by name.
class EncoderDecoder : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] Subject& model() const { return subject(GetParam()); }
  [[nodiscard]] const ModelProfile& profile() const { return model().cache.profile(); }
  [[nodiscard]] bool masked() const { return profile().mask_argument >= 0; }
  [[nodiscard]] LayerCache<Module> cache_with(Options options) const {
    return model().cache.with_options(std::move(options));
  }
  [[nodiscard]] c10::IValue plain(const Request& request) const { return run_plain(model().plain, request.inputs); }
  [[nodiscard]] double tolerance() const { return tolerance_of(model().info); }

  /// Rows with sources and targets of these lengths; without a mask all targets have the last one's.
  std::vector<Row> rows(const std::vector<std::pair<std::size_t, std::size_t>>& lengths, unsigned seed) const {
    std::mt19937 random(seed);
    std::vector<Row> all;
    for (const auto& [source, target] : lengths) {
      all.push_back({random_ids(random, source), random_ids(random, masked() ? target : lengths.back().second)});
    }
    return all;
  }
};

}  // namespace llmcache::test
