#include "llmcache/match/plan.h"

#include <fmt/core.h>

#include "llmcache/error.h"

namespace llmcache {

bool SequencePlan::active(std::int64_t token, std::int32_t layer) const noexcept {
  for (const TokenRange& range : ranges) {
    if (token >= range.begin && token < range.end) return layer >= range.first_layer && layer < range.last_layer;
  }
  return false;
}

bool SequencePlan::computes_all(std::int32_t layers) const noexcept {
  for (const TokenRange& range : ranges) {
    if (range.first_layer != 0 || range.last_layer != layers) return false;
  }
  return true;
}

void Plan::validate(std::size_t donors) const {
  const auto invalid = [](const std::string& what) { throw Error(ErrorCode::kInvalidOptions, "plan: " + what); };
  if (rows < 0 || padded_length < 0 || layers < 1)
    invalid(fmt::format("{} rows, padded length {}, layers {}", rows, padded_length, layers));
  std::int64_t last_row = -1;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const SequencePlan& sequence = sequences[i];
    const auto at = [&](const std::string& what) { invalid(fmt::format("sequence {}: {}", i, what)); };
    if (sequence.row <= last_row || sequence.row >= rows) {
      at(fmt::format("row {} is out of order or not below {}", sequence.row, rows));
    }
    last_row = sequence.row;
    if (sequence.tokens < 1 || sequence.tokens > padded_length || sequence.first < 0 ||
        sequence.first > padded_length - sequence.tokens) {
      at(fmt::format("{} tokens from position {} do not fit into a padded length of {}", sequence.tokens,
                     sequence.first, padded_length));
    }
    if (sequence.donor < -1 || sequence.donor >= static_cast<std::int32_t>(donors)) {
      at(fmt::format("donor {} of {}", sequence.donor, donors));
    }
    std::int64_t next = 0;
    for (const TokenRange& range : sequence.ranges) {
      if (range.begin != next || range.end <= range.begin) {
        at(fmt::format("range [{}, {}) leaves a gap, overlaps or is empty; {} was expected next", range.begin,
                       range.end, next));
      }
      next = range.end;
      if (range.first_layer < 0 || range.first_layer > range.last_layer || range.last_layer > layers) {
        at(fmt::format("layers [{}, {}) of {}", range.first_layer, range.last_layer, layers));
      }
      const bool whole = range.first_layer == 0 && range.last_layer == layers;
      if (!whole && (sequence.donor < 0 || range.donor_begin < 0)) {
        at(fmt::format("tokens [{}, {}) are not computed in every layer and have no donor", range.begin, range.end));
      }
    }
    if (next != sequence.tokens) at(fmt::format("its ranges end at {}, it has {} tokens", next, sequence.tokens));
  }
}

std::string Plan::to_string() const {
  std::string text = fmt::format("plan: {} rows, padded length {}, {} layers\n", rows, padded_length, layers);
  for (const SequencePlan& sequence : sequences) {
    text += fmt::format("  row {}: {} tokens from position {}", sequence.row, sequence.tokens, sequence.first);
    if (sequence.donor >= 0) text += fmt::format(", donor {}", sequence.donor);
    text += "\n";
    for (const TokenRange& range : sequence.ranges) {
      text += fmt::format("    tokens [{}, {})", range.begin, range.end);
      text += range.first_layer == range.last_layer
                  ? " reused"
                  : fmt::format(" computed in layers [{}, {})", range.first_layer, range.last_layer);
      if (range.first_layer != 0 || range.last_layer != layers) {
        text += fmt::format(", else from donor position {}", range.donor_begin);
      }
      text += "\n";
    }
  }
  return text;
}

SequencePlan compute_all(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers) {
  return {row, first, tokens, -1, {{0, tokens, 0, layers, 0}}};
}

SequencePlan compute_some(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers,
                          const std::vector<std::int64_t>& active, std::int32_t donor) {
  SequencePlan plan{row, first, tokens, donor, {}};
  const auto add = [&](std::int64_t begin, std::int64_t end, std::int32_t last_layer) {
    if (end <= begin) return;
    if (!plan.ranges.empty() && plan.ranges.back().last_layer == last_layer) {
      plan.ranges.back().end = end;
    } else {
      plan.ranges.push_back({begin, end, 0, last_layer, begin});
    }
  };
  std::int64_t next = 0;
  for (const std::int64_t token : active) {
    if (token < next || token >= tokens) {
      throw Error(ErrorCode::kInvalidOptions,
                  fmt::format("active token {} is out of order or not below {}", token, tokens));
    }
    add(next, token, 0);
    add(token, token + 1, layers);
    next = token + 1;
  }
  add(next, tokens, 0);
  return plan;
}

}  // namespace llmcache
