#include "llmcache/model/profile.h"

#include <c10/core/ScalarType.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include "units.h"

namespace llmcache {

const char* to_string(Granularity granularity) noexcept {
  switch (granularity) {
    case Granularity::kWholeLayers:
      return "whole layers";
    case Granularity::kPacked:
      return "packed sequences";
    case Granularity::kTokens:
      return "tokens";
  }
  return "unknown";
}

std::string ModelProfile::to_string() const {
  const auto yes = [](bool value) { return value ? "yes" : "no"; };
  std::string text;
  text += fmt::format("layers:            {}", layers);
  text += layers_path.empty() ? "\n" : fmt::format(" at '{}', hidden {}\n", layers_path, hidden);
  text += fmt::format("inputs:            {} (ids: {}, mask: {}), vocabulary {}, {}\n", fmt::join(inputs, ", "),
                      ids_argument, mask_argument, vocabulary,
                      max_tokens > 0 ? fmt::format("at most {} tokens", max_tokens) : "no known limit of tokens");
  if (!source_arguments.empty()) {
    std::vector<std::string> names;
    for (const int i : source_arguments) names.push_back(inputs.at(static_cast<std::size_t>(i)));
    text += fmt::format("source:            {}{}, its states are {}", fmt::join(names, ", "),
                        source_mask_argument < 0 ? ", with its padding" : "", source_reuse ? "kept" : "not kept");
    text += max_source_tokens > 0 ? fmt::format(", at most {} tokens\n", max_source_tokens) : "\n";
  }
  std::string kinds;
  for (const AttentionOp& attention_op : attention) {
    if (kinds.find(attention_op.kind) == std::string::npos) kinds += (kinds.empty() ? "" : ", ") + attention_op.kind;
  }
  text += fmt::format("attention ops:     {}{}\n", attention.size(), kinds.empty() ? "" : " (" + kinds + ")");
  text += fmt::format("causal:            {}\n", yes(causal));
  text += fmt::format("granularity:       {}{}\n", llmcache::to_string(granularity),
                      granularity != Granularity::kWholeLayers && mask_argument >= 0
                          ? (left_padding ? ", right and left padding packed" : ", right padding packed")
                          : "");
  text += fmt::format("prefix reuse:      {}\n", yes(prefix_reuse));
  const bool chooses = head_chooses && granularity != Granularity::kWholeLayers;
  text += fmt::format("head:              {}\n", head_tokenwise ? "token-wise"
                                                 : chooses      ? "on one token a row, which the inputs tell"
                                                                : "on the padded batch");
  text +=
      fmt::format("rows independent:  {}, one output entry a row: {}\n", yes(rows_independent), yes(per_row_output));
  text += fmt::format("dtype, device:     {}, {}\n", c10::toString(dtype), device);
  if (weight_bytes > 0) {
    text += fmt::format("weights:           {}{}\n", size_text(weight_bytes),
                        packed_weights == 0 ? ", shared with the caller's module" : " in the module");
  }
  if (packed_weights > 0) {
    text += fmt::format("packed weights:    {}, {} linear layers, {}; {} of the weights released\n", weights,
                        packed_weights, size_text(packed_weight_bytes), size_text(released_weight_bytes));
  }
  if (!weights_reason.empty()) text += fmt::format("weights chosen:    {}, as {}\n", weights, weights_reason);
  text += fmt::format("digest:            {}\n", digest);
  if (!file_note.empty()) text += fmt::format("saved profile:     {}\n", file_note);
  text += fmt::format("wrapping took:     {:.0f} ms\n", wrap_ms);
  for (const std::string& note : notes) text += "note:              " + note + "\n";
  return text;
}

}  // namespace llmcache
