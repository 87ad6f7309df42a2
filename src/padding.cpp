#include "llmcache/padding.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "llmcache/error.h"

namespace llmcache {

Inputs PaddedBatch::inputs(const ModelProfile& profile) const {
  const at::Device device(profile.device.empty() ? std::string("cpu") : profile.device);
  if (profile.mask_argument < 0 && !mask.all().item<bool>()) {
    throw Error(ErrorCode::kInvalidInput,
                "the sequences have different lengths, and this model takes no attention mask that would tell padding "
                "from tokens; run sequences of one length together");
  }
  Inputs inputs;
  for (int i = 0; i < static_cast<int>(profile.inputs.size()); ++i) {
    const std::string& name = profile.inputs[static_cast<std::size_t>(i)];
    const auto named = [&](const char* part) { return name.find(part) != std::string::npos; };
    if (i == profile.ids_argument) {
      inputs.emplace_back(ids.to(device));
    } else if (i == profile.mask_argument || named("mask") || named("pool")) {
      inputs.emplace_back(mask.to(device));
    } else if (named("type") || named("segment")) {
      inputs.emplace_back(at::zeros_like(ids).to(device));
    } else {
      throw Error(
          ErrorCode::kInvalidInput,
          fmt::format("what belongs into input {} ('{}') of this model is not known: ids, masks and token types "
                      "are; make a tensor [batch, tokens] for it",
                      i, name));
    }
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
