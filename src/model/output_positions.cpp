#include "model/output_positions.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "model/tensors_of.h"

namespace llmcache {
namespace {

constexpr std::int64_t kProbeTokens = 7;
constexpr std::int64_t kMarked = 3;

at::Tensor final_states(const Model& model, const Inputs& inputs) {
  Activations activations = model.embed(inputs);
  for (std::int64_t l = 0; l < model.layers(); ++l) model.layer(l, activations);
  return activations.hidden.clone();
}

std::vector<at::Tensor> head(const Model& model, const Inputs& inputs, const at::Tensor& states) {
  Activations activations = model.embed(inputs);
  // Layers may leave something for the head in the context.
  for (std::int64_t l = 0; l < model.layers(); ++l) model.layer(l, activations);
  activations.hidden = states.clone();
  return tensors_of(model.head(activations));
}

/// What changing one token's final state moves.
struct Moved {
  std::vector<bool> any;    ///< by token
  bool only_itself = true;  ///< in tensors with a token dimension no other token's entry moved, and there are no others
};

Moved probe_tokens(const Model& model, const Inputs& inputs, const OutputSpec& spec) {
  const auto states = final_states(model, inputs);
  const auto base = head(model, inputs, states);
  Moved moved;
  for (std::int64_t t = 0; t < kProbeTokens; ++t) {
    auto changed = states.clone();
    // Not by a multiple, and not by the same everywhere: a norm would not notice.
    auto token = changed.select(1, t);
    token.add_(at::arange(token.size(-1), token.options()).remainder(5).sub(1.7));
    const auto after = head(model, inputs, changed);
    bool any = false;
    for (std::size_t i = 0; i < base.size(); ++i) {
      const auto difference = after[i].to(at::kDouble).sub(base[i].to(at::kDouble)).nan_to_num(0.0).abs();
      if (difference.numel() == 0) continue;
      any = any || difference.max().item<double>() > 0;
      const int dim = spec.leaves.at(i).tokens;
      if (dim < 0 || difference.size(dim) != kProbeTokens) {
        moved.only_itself = false;
        continue;
      }
      auto others = difference.clone();
      others.select(dim, t).zero_();
      if (others.max().item<double>() > 0) moved.only_itself = false;
    }
    moved.any.push_back(any);
  }
  return moved;
}

}  // namespace

const char* to_string(OutputRead read) noexcept {
  switch (read) {
    case OutputRead::kAllTokens:
      return "all tokens";
    case OutputRead::kFirstToken:
      return "first token";
    case OutputRead::kLastToken:
      return "last token";
    case OutputRead::kPerToken:
      return "per token";
    case OutputRead::kMaskedOnes:
      return "masked tokens";
    case OutputRead::kOther:
      break;
  }
  return "other";
}

bool OutputPositions::reads(std::int64_t token, std::int64_t tokens) const noexcept {
  switch (read) {
    case OutputRead::kFirstToken:
      return token == 0;
    case OutputRead::kLastToken:
      return token == tokens - 1;
    default:
      return true;
  }
}

OutputPositions output_positions(const Model& model, const InputSpec& spec_of_inputs, const OutputSpec& spec,
                                 const ModelProfile& profile) {
  OutputPositions found;
  const auto inputs = probe_inputs(spec_of_inputs, model.device(), 1, kProbeTokens, 11);
  const auto states = final_states(model, inputs);
  for (std::size_t i = 0; i < spec_of_inputs.vocabulary.size(); ++i) {
    bool only = false;
    const auto own = static_cast<int>(i);
    if (own != profile.ids_argument && own != profile.mask_argument && spec_of_inputs.vocabulary[i] == 0) {
      // One token marked with one, the others with zero.
      auto marked = inputs;
      auto mark = at::zeros_like(inputs[i].toTensor());
      mark.select(1, kMarked).fill_(1);
      marked[i] = mark;
      only = at::equal(final_states(model, marked).nan_to_num(0.0), states.nan_to_num(0.0));
      if (only && found.mask_argument < 0) {
        const auto moved = probe_tokens(model, marked, spec).any;
        const auto alone = std::count(moved.begin(), moved.end(), true) == 1;
        if (alone && moved[kMarked]) found.mask_argument = own;
      }
    }
    found.head_only.push_back(only);
  }
  const auto moved = probe_tokens(model, inputs, spec);
  const auto count = std::count(moved.any.begin(), moved.any.end(), true);
  if (count == kProbeTokens && moved.only_itself) {
    found.read = OutputRead::kPerToken;
  } else if (found.mask_argument >= 0) {
    found.read = OutputRead::kMaskedOnes;
  } else if (count == kProbeTokens) {
    found.read = OutputRead::kAllTokens;
  } else if (count == 1 && moved.any.front()) {
    found.read = OutputRead::kFirstToken;
  } else if (count == 1 && moved.any.back()) {
    found.read = OutputRead::kLastToken;
  }
  found.note = found.read == OutputRead::kMaskedOnes
                   ? fmt::format("the output is read at the tokens that input {} ('{}') marks", found.mask_argument,
                                 profile.inputs.at(static_cast<std::size_t>(found.mask_argument)))
                   : fmt::format("the output is read at: {} ({} of {} final states of a tiny sequence move it)",
                                 to_string(found.read), count, kProbeTokens);
  return found;
}

bool layers_ignore_places(const Model& model, const InputSpec& spec_of_inputs) {
  const auto inputs = probe_inputs(spec_of_inputs, model.device(), 1, kProbeTokens, 23);
  const auto order = at::tensor({4, 0, 6, 2, 1, 5, 3}, at::TensorOptions().dtype(at::kLong)).to(model.device());
  const auto run = [&](bool reordered) {
    Activations activations = model.embed(inputs);
    if (reordered) activations.hidden = activations.hidden.index_select(1, order);
    for (std::int64_t l = 0; l < model.layers(); ++l) model.layer(l, activations);
    return activations.hidden;
  };
  return nearly_equal(run(true), run(false).index_select(1, order), model.rounding());
}

}  // namespace llmcache
