#include "execute/padding_ids.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "model/probe.h"

namespace llmcache {

bool reads_real_tokens(const Model& model, const Inputs& inputs, const std::vector<RowSpan>& spans) {
  const at::Tensor positions = model.read_positions(inputs);
  for (std::size_t i = 0; positions.defined() && i < spans.size(); ++i) {
    const auto token = positions[static_cast<std::int64_t>(i)].item<std::int64_t>() - spans[i].first;
    if (token < 0 || token >= spans[i].tokens) return false;
  }
  return true;
}

void fill_padding(const Model& model, const InputSpec& spec, int ids_argument, const Inputs& inputs,
                  const std::vector<RowSpan>& spans) {
  auto choice = special_values(spec, static_cast<std::size_t>(ids_argument));
  const std::size_t special = choice.size();
  // Where none of these will do: the least and the largest id that the model does not look for.
  const auto is_special = [&](std::int64_t id) { return std::find(choice.begin(), choice.end(), id) != choice.end(); };
  std::int64_t least = 1;
  std::int64_t largest = spec.vocabulary[static_cast<std::size_t>(ids_argument)] - 1;
  while (least < largest && is_special(least)) ++least;
  while (largest > least && is_special(largest)) --largest;
  if (least <= largest) choice.insert(choice.end(), {least, largest});
  const auto ids = inputs[static_cast<std::size_t>(ids_argument)].toTensor();
  const auto fill = [&](std::size_t first, std::size_t end) {
    std::size_t next = first;
    for (std::size_t i = 0; i < spans.size(); ++i) {
      for (std::int64_t t = 0; t < ids.size(1); ++t) {
        if (t >= spans[i].first && t < spans[i].first + spans[i].tokens) continue;
        ids[static_cast<std::int64_t>(i)][t].fill_(choice[next]);
        next = next + 1 == end ? first : next + 1;
      }
    }
    return reads_real_tokens(model, inputs, spans);
  };
  if (fill(0, special)) return;
  for (std::size_t i = 0; i < choice.size(); ++i) {
    if (fill(i, i + 1)) return;
  }
}

}  // namespace llmcache
