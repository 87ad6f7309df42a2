#include "llmcache/padding.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "llmcache/error.h"

namespace llmcache {

namespace {

bool is_source(const ModelProfile& profile, int input) {
  const auto& all = profile.source_arguments;
  return std::find(all.begin(), all.end(), input) != all.end();
}

/// By the name of an input.
at::Tensor input_of(const PaddedBatch& batch, const std::string& name, int number, bool is_mask) {
  const auto named = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (is_mask || named("mask") || named("pool")) return batch.mask;
  if (named("type") || named("segment")) return at::zeros_like(batch.ids);
  throw Error(ErrorCode::kInvalidInput,
              fmt::format("what belongs into input {} ('{}') of this model is not known: ids, masks and token types "
                          "are; make a tensor [batch, tokens] for it",
                          number, name));
}

}  // namespace

Inputs PaddedBatch::inputs(const ModelProfile& profile) const {
  if (!profile.source_arguments.empty()) {
    throw Error(
        ErrorCode::kInvalidInput,
        "this model computes a target from a source: pad() both, and call inputs(profile, source) of the target");
  }
  return inputs(profile, {});
}

Inputs PaddedBatch::inputs(const ModelProfile& profile, const PaddedBatch& source) const {
  if (!profile.source_arguments.empty() && !(source.ids.defined() && source.mask.defined())) {
    throw Error(ErrorCode::kInvalidInput, "the source is empty: pad() the sources, one for each target");
  }
  const at::Device device(profile.device.empty() ? std::string("cpu") : profile.device);
  if (profile.mask_argument < 0 && !mask.all().item<bool>()) {
    throw Error(ErrorCode::kInvalidInput,
                "the sequences have different lengths, and this model takes no attention mask that would tell padding "
                "from tokens; run sequences of one length together");
  }
  if (profile.source_arguments.size() == 1 && !source.mask.all().item<bool>()) {
    throw Error(ErrorCode::kInvalidInput,
                "the sources have different lengths, and this model takes no mask that would tell their padding from "
                "tokens; run sources of one length together");
  }
  Inputs inputs;
  for (int i = 0; i < static_cast<int>(profile.inputs.size()); ++i) {
    const std::string& name = profile.inputs[static_cast<std::size_t>(i)];
    const bool of_source = is_source(profile, i);
    const bool is_ids = of_source ? i == profile.source_arguments.front() : i == profile.ids_argument;
    const bool is_mask = i == profile.mask_argument || i == profile.source_mask_argument;
    const PaddedBatch& own = of_source ? source : *this;
    inputs.emplace_back((is_ids ? own.ids : input_of(own, name, i, is_mask)).to(device));
  }
  return inputs;
}

PaddedBatch pad(const std::vector<std::vector<std::int64_t>>& sequences, std::int64_t pad_id) {
  std::size_t padded_length = 0;
  for (const auto& sequence : sequences) padded_length = std::max(padded_length, sequence.size());
  if (padded_length == 0) {
    throw Error(ErrorCode::kInvalidInput,
                sequences.empty() ? "pad: there is no sequence" : "pad: no sequence has a token");
  }
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(sequences.size()),
                                           static_cast<std::int64_t>(padded_length)};
  PaddedBatch batch{.ids = at::full(shape, pad_id, at::kLong), .mask = at::zeros(shape, at::kLong)};
  auto* ids = batch.ids.mutable_data_ptr<std::int64_t>();
  auto* mask = batch.mask.mutable_data_ptr<std::int64_t>();
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    std::copy(sequences[row].begin(), sequences[row].end(), ids + row * padded_length);
    std::fill_n(mask + row * padded_length, sequences[row].size(), std::int64_t{1});
  }
  return batch;
}

}  // namespace llmcache
