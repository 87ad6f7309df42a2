#include "model/probe.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>

#include "llmcache/error.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

/// Largest absolute difference of two results, position `skip` (if any) of their tokens left out.
double difference(const c10::IValue& a, const c10::IValue& b, const OutputSpec& spec, std::int64_t skip_from,
                  std::int64_t skip_to) {
  const auto left = tensors_of(a);
  const auto right = tensors_of(b);
  if (left.size() != right.size()) return 1e30;
  double largest = 0;
  for (std::size_t i = 0; i < left.size(); ++i) {
    auto x = left[i].to(at::kDouble);
    auto y = right[i].to(at::kDouble);
    if (x.sizes() != y.sizes()) return 1e30;
    const int tokens = i < spec.leaves.size() ? spec.leaves[i].tokens : -1;
    if (tokens >= 0 && skip_to > skip_from) {
      const auto n = x.size(tokens);
      const auto keep = [&](const at::Tensor& t) {
        return at::cat({t.narrow(tokens, 0, skip_from), t.narrow(tokens, skip_to, n - skip_to)}, tokens);
      };
      x = keep(x);
      y = keep(y);
    }
    if (x.numel() == 0) continue;
    largest = std::max(largest, (x - y).nan_to_num(0.0).abs().max().item<double>());
  }
  return largest;
}

using Shapes = std::array<std::array<std::int64_t, 2>, 3>;
using Marks = std::vector<int>;
constexpr Shapes kShapes = {{{2, 5}, {3, 7}, {2, 7}}};

std::vector<PlainRun> run_shapes(const Model& model, const InputSpec& spec) {
  std::vector<PlainRun> runs;
  for (const auto& [rows, tokens] : kShapes) {
    auto inputs = probe_inputs(spec, model.device(), rows, tokens);
    auto result = model.plain(inputs);
    runs.push_back({rows, tokens, std::move(inputs), std::move(result)});
  }
  return runs;
}

/// By three runs of unlike shapes.
OutputSpec output_spec(const std::vector<PlainRun>& runs) {
  std::vector<std::vector<at::Tensor>> seen;
  OutputSpec spec;
  spec.per_row = true;
  for (const PlainRun& run : runs) {
    bool pure = true;
    seen.push_back(tensors_of(run.result, &pure));
    if (!pure || seen.back().size() != seen.front().size()) spec.per_row = false;
  }
  if (seen[0].empty()) spec.per_row = false;
  for (std::size_t i = 0; i < seen[0].size() && seen[1].size() == seen[0].size() && seen[2].size() == seen[0].size();
       ++i) {
    TokenDims dims;
    const auto rank = seen[0][i].dim();
    for (std::int64_t d = 0; d < rank && seen[1][i].dim() == rank && seen[2][i].dim() == rank; ++d) {
      const auto matches = [&](auto measure) {
        for (std::size_t s = 0; s < 3; ++s) {
          if (seen[s][i].size(d) != measure(runs[s].rows, runs[s].tokens)) return false;
        }
        return true;
      };
      if (matches([](auto b, auto) { return b; })) {
        dims.batch = dims.batch == -1 ? static_cast<int>(d) : -2;
      } else if (matches([](auto, auto t) { return t; })) {
        // Pairs of tokens (attention maps) belong to a row, but have no single token dimension.
        dims.tokens = dims.tokens == -1 ? static_cast<int>(d) : -2;
      } else if (matches([](auto b, auto t) { return b * t; })) {
        dims.merged = static_cast<int>(d);
      } else if (seen[0][i].size(d) != seen[1][i].size(d) || seen[0][i].size(d) != seen[2][i].size(d)) {
        spec.per_row = false;
      }
    }
    if (dims.batch < 0 || dims.tokens == -2 || dims.merged >= 0) spec.per_row = false;
    spec.leaves.push_back(dims);
  }
  return spec;
}

Inputs with_id(const Inputs& inputs, int argument, std::int64_t row, std::int64_t position, std::int64_t vocabulary) {
  Inputs changed = inputs;
  auto ids = inputs[static_cast<std::size_t>(argument)].toTensor().clone();
  auto cell = ids[row][position];
  const auto old = cell.item<std::int64_t>();
  cell.fill_(old > 0 ? old - 1 : std::min<std::int64_t>(1, std::max<std::int64_t>(vocabulary - 1, 0)));
  changed[static_cast<std::size_t>(argument)] = ids;
  return changed;
}

/// An argument is a padding mask if a token that it marks 0 no longer influences the others. Other marks of the token
/// (a pooling mask's) are 0 all the while: padding has none.
bool is_mask(const Model& model, const Inputs& inputs, int argument, const OutputSpec& spec,
             const ModelProfile& profile, const InputSpec& spec_of_inputs, std::int64_t ids) {
  constexpr std::int64_t kMasked = 2;
  const auto other = with_id(inputs, profile.ids_argument, 0, kMasked, ids);
  const auto marked = [&](Inputs given, bool open) {
    for (const int i : marks(spec_of_inputs, profile.ids_argument)) {
      if (open && i == argument) continue;
      auto mark = given[static_cast<std::size_t>(i)].toTensor().clone();
      mark[0][kMasked].fill_(0);
      given[static_cast<std::size_t>(i)] = mark;
    }
    return model.plain(given);
  };
  const double open = difference(marked(inputs, true), marked(other, true), spec, kMasked, kMasked + 1);
  const double closed = difference(marked(inputs, false), marked(other, false), spec, kMasked, kMasked + 1);
  return open > 0 && closed <= 1e-3 * open;
}

/// Is a padded row the same alone and among many others, some of them longer than it?
bool padded_rows_independent(const Model& model, const InputSpec& spec_of_inputs, const OutputSpec& spec,
                             const ModelProfile& profile) {
  constexpr std::int64_t kRows = 9;
  constexpr std::int64_t kWidth = 14;
  auto many = probe_inputs(spec_of_inputs, model.device(), kRows, kWidth, 9);
  // One of the two that are compared is padded, the other is not, alone or among padded ones.
  const auto length = [&](std::int64_t row) {
    return profile.mask_argument < 0 || row == 4 ? kWidth : row * 7 % 11 + 4;
  };
  for (const int i : source_marks(spec_of_inputs)) {
    const auto mark = many[static_cast<std::size_t>(i)].toTensor();
    for (std::int64_t row = 0; row < kRows; ++row) mark[row].narrow(0, mark.size(1) - row % 5, row % 5).zero_();
  }
  for (const int i : marks(spec_of_inputs, profile.ids_argument)) {
    const auto mark = many[static_cast<std::size_t>(i)].toTensor();
    for (std::int64_t row = 0; row < kRows; ++row) mark[row].narrow(0, length(row), kWidth - length(row)).zero_();
  }
  const auto together = model.plain(many);
  for (const std::int64_t row : {std::int64_t{0}, std::int64_t{4}}) {
    Inputs one = many;
    for (c10::IValue& input : one) input = input.toTensor().narrow(0, row, 1).contiguous();
    const auto alone = row_of(model.plain(one), spec, 0, 0, length(row), kWidth);
    const auto among = row_of(together, spec, row, 0, length(row), kWidth);
    for (std::size_t i = 0; i < among.size(); ++i) {
      if (alone.size() != among.size() || !nearly_equal(among[i], alone[i], model.rounding())) return false;
    }
  }
  return true;
}

}  // namespace

std::vector<int> marks(const InputSpec& inputs, int ids_argument) {
  std::vector<int> arguments;
  for (std::size_t i = 0; i < inputs.vocabulary.size(); ++i) {
    const bool mark = inputs.vocabulary[i] == 0 && !inputs.is_source(i);
    if (mark && static_cast<int>(i) != ids_argument) arguments.push_back(static_cast<int>(i));
  }
  return arguments;
}

std::vector<int> source_marks(const InputSpec& inputs) {
  std::vector<int> arguments;
  for (std::size_t i = 0; i < inputs.vocabulary.size(); ++i) {
    if (inputs.vocabulary[i] == 0 && inputs.is_source(i)) arguments.push_back(static_cast<int>(i));
  }
  return arguments;
}

std::vector<std::int64_t> special_values(const InputSpec& inputs, std::size_t argument) {
  std::vector<std::int64_t> values{0};
  if (argument >= inputs.compared.size()) return values;
  const std::int64_t limit = inputs.vocabulary[argument] > 0 ? inputs.vocabulary[argument] : 2;
  for (const std::int64_t value : inputs.compared[argument]) {
    if (value > 0 && value < limit) values.push_back(value);
  }
  return values;
}

Inputs probe_inputs(const InputSpec& spec, at::Device device, std::int64_t batch, std::int64_t tokens,
                    std::int64_t seed) {
  Inputs inputs;
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  for (std::size_t i = 0; i < spec.vocabulary.size(); ++i) {
    const std::int64_t rows = spec.vocabulary[i];
    const std::int64_t length = spec.is_source(i) ? probe_source_tokens(batch) : tokens;
    if (rows == 0) {
      inputs.emplace_back(at::ones({batch, length}, options));
      continue;
    }
    // The first ids are often padding and other marks: leave them out where there are enough.
    const std::int64_t low = std::min<std::int64_t>(rows / 8, 1000);
    const auto ids =
        at::arange(batch * length, options).add(seed * 31).mul(7919).add(13).remainder(rows - low).add(low);
    inputs.emplace_back(ids.view({batch, length}));
  }
  return inputs;
}

std::string reason_of(const std::exception& error) {
  std::string text = error.what();
  while (!text.empty() && text.back() == '\n') text.pop_back();
  const auto last = text.rfind("RuntimeError: ");
  return last == std::string::npos ? text.substr(0, text.find('\n')) : text.substr(last);
}

c10::IValue run_dense(const Model& model, const Inputs& inputs) {
  Activations activations = model.embed(inputs);
  for (std::int64_t l = 0; l < model.layers(); ++l) model.layer(l, activations);
  return model.head(activations);
}

OutputSpec states_output() { return {{{0, 1, -1}}, true}; }

namespace {

/// Asks a model, or its layers alone, about rows, order and masks. `model` and `spec` are of what is asked.
class Prober {
 public:
  Prober(const Model& model, const OutputSpec& spec, const InputSpec& inputs, const ModelProfile& profile)
      : model_(model), spec_(spec), inputs_(inputs), profile_(profile) {}

  /// Row 0 must notice neither what stands in row 1 nor whether there is one.
  [[nodiscard]] bool rows_independent(const Inputs& two_rows, const c10::IValue& result) const {
    const auto ids = static_cast<std::size_t>(profile_.ids_argument);
    const auto tokens = two_rows[ids].toTensor().size(1);
    auto others = two_rows[ids].toTensor().clone();
    // The lowest ids are often marks, and some models look for them.
    const auto special = special_values(inputs_, ids);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto i = static_cast<std::size_t>(t);
      const auto id = i < special.size() ? special[special.size() - 1 - i] : t;
      others[1][t].fill_(std::min(id, std::max<std::int64_t>(ids_vocabulary() - 1, 0)));
    }
    auto changed = two_rows;
    changed[ids] = others;
    for (std::size_t i = 0; i < two_rows.size(); ++i) {
      if (!inputs_.is_source(i) || inputs_.vocabulary[i] == 0) continue;
      auto source = two_rows[i].toTensor().clone();
      source[1].copy_(source[1].flip(0));
      changed[i] = source;
    }
    Inputs one = two_rows;
    for (c10::IValue& input : one) input = input.toTensor().narrow(0, 0, 1).contiguous();
    const auto own = row_of(result, spec_, 0, 0, tokens, tokens);
    for (const Inputs& given : {changed, one}) {
      const auto again = row_of(model_.plain(given), spec_, 0, 0, tokens, tokens);
      if (again.size() != own.size()) return false;
      for (std::size_t i = 0; i < own.size(); ++i) {
        if (!nearly_equal(own[i], again[i], model_.rounding())) return false;
      }
    }
    return true;
  }

  /// Final states before the last token do not notice a change of the last token.
  [[nodiscard]] bool causal(const Inputs& single) const {
    const auto states = [&](const Inputs& given) {
      Activations activations = model_.embed(given);
      for (std::int64_t l = 0; l < model_.layers(); ++l) model_.layer(l, activations);
      return activations.hidden.to(at::kDouble).nan_to_num(0.0);
    };
    const auto last = single[static_cast<std::size_t>(profile_.ids_argument)].toTensor().size(1) - 1;
    const auto other = with_id(single, profile_.ids_argument, 0, last, ids_vocabulary());
    const auto change = (states(single) - states(other)).abs();
    const double own = change.select(1, last).max().item<double>();
    const double before = change.narrow(1, 0, last).max().item<double>();
    return own > 0 && before <= 1e-6 * own;
  }

  /// -1: none.
  [[nodiscard]] int mask_argument(const Inputs& single) const {
    for (const int i : marks(inputs_, profile_.ids_argument)) {
      if (is_mask(model_, single, i, spec_, profile_, inputs_, ids_vocabulary())) return i;
    }
    return -1;
  }

  /// -1: none. A mask of the source counts only if what it closes at the end changes nothing by being there.
  [[nodiscard]] int source_mask_argument(const Inputs& single) const {
    if (inputs_.source_length_counts) return -1;
    for (const int i : source_marks(inputs_)) {
      if (closes_source(single, i) && source_padding_is_ignored(single)) return i;
    }
    return -1;
  }

  [[nodiscard]] bool padded_rows_independent() const {
    return llmcache::padded_rows_independent(model_, inputs_, spec_, profile_);
  }

 private:
  /// As is_mask(), of a token of the source.
  [[nodiscard]] bool closes_source(const Inputs& single, int argument) const {
    constexpr std::int64_t kMasked = 2;
    Inputs other = single;
    for (std::size_t i = 0; i < single.size(); ++i) {
      if (!inputs_.is_source(i) || inputs_.vocabulary[i] == 0) continue;
      other = with_id(other, static_cast<int>(i), 0, kMasked, inputs_.vocabulary[i]);
    }
    const auto marked = [&](Inputs given, bool open) {
      for (const int i : source_marks(inputs_)) {
        if (open && i == argument) continue;
        auto mark = given[static_cast<std::size_t>(i)].toTensor().clone();
        mark[0][kMasked].fill_(0);
        given[static_cast<std::size_t>(i)] = mark;
      }
      return model_.plain(given);
    };
    const double open = difference(marked(single, true), marked(other, true), spec_, 0, 0);
    const double closed = difference(marked(single, false), marked(other, false), spec_, 0, 0);
    return open > 0 && closed <= 1e-3 * open;
  }

  [[nodiscard]] bool source_padding_is_ignored(const Inputs& single) const {
    constexpr std::int64_t kReal = 7;
    Inputs padded = single;
    Inputs cut = single;
    for (std::size_t i = 0; i < single.size(); ++i) {
      if (!inputs_.is_source(i)) continue;
      auto own = single[i].toTensor().clone();
      auto behind = own.narrow(1, kReal, own.size(1) - kReal);
      const auto special = special_values(inputs_, i);
      for (std::int64_t t = 0; t < behind.size(1); ++t) {
        const bool mark = inputs_.vocabulary[i] == 0;
        behind[0][t].fill_(mark ? 0 : special[static_cast<std::size_t>(t) % special.size()]);
      }
      cut[i] = own.narrow(1, 0, kReal).contiguous();
      padded[i] = own;
    }
    const auto want = tensors_of(model_.plain(cut));
    const auto got = tensors_of(model_.plain(padded));
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (want.size() != got.size() || !nearly_equal(got[i], want[i], model_.rounding())) return false;
    }
    return true;
  }

  [[nodiscard]] std::int64_t ids_vocabulary() const {
    return inputs_.vocabulary.at(static_cast<std::size_t>(profile_.ids_argument));
  }

  const Model& model_;
  const OutputSpec& spec_;
  const InputSpec& inputs_;
  const ModelProfile& profile_;
};

/// What is not a number is equal to nothing: no way of running the model could be compared with another.
bool comparable(const Model& model, const c10::IValue& result) {
  const auto tensors = tensors_of(result);
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const at::Tensor& t) { return nearly_equal(t, t, model.rounding()); });
}

/// As few runs of the plain model as tell of its result and can be compared with other ways of running it: each takes
/// all weights through the processor. Of a model whose other questions were asked of a shallow one.
Probed run_few(const Model& model, const InputSpec& inputs, const ModelProfile& profile) {
  constexpr Shapes kFewShapes = {{{3, 1}, {2, 3}, {1, kLongProbe}}};
  Probed found;
  for (const auto& [rows, tokens] : kFewShapes) {
    PlainRun run{rows, tokens, probe_inputs(inputs, model.device(), rows, tokens), {}};
    if (rows == 2) run.real = {tokens, profile.mask_argument < 0 ? tokens : tokens - 1};
    for (const int i : rows == 2 && profile.mask_argument >= 0 ? marks(inputs, profile.ids_argument) : Marks{}) {
      run.inputs[static_cast<std::size_t>(i)].toTensor()[1][tokens - 1].fill_(0);
    }
    run.result = model.plain(run.inputs);
    found.runs.push_back(std::move(run));
  }
  found.output = output_spec(found.runs);
  return found;
}

Probed run_usual(const Model& model, const InputSpec& inputs) {
  Probed found{{}, run_shapes(model, inputs)};
  found.output = output_spec(found.runs);
  found.runs.pop_back();
  return found;
}

/// The runs that are enough if each tensor of the result has one entry a row, and the model takes them; else others.
Probed run_plain(const Model& model, const InputSpec& inputs, const ModelProfile& profile) {
  try {
    auto found = run_few(model, inputs, profile);
    if (found.output.per_row) return found;
  } catch (const std::exception&) {
    // Some models take no single token, and some none as long.
  }
  return run_usual(model, inputs);
}

void check_option(int mask_argument, const InputSpec& inputs, const ModelProfile& profile) {
  const auto count = static_cast<int>(inputs.vocabulary.size());
  const bool of_source = mask_argument >= 0 && inputs.is_source(static_cast<std::size_t>(mask_argument));
  if (mask_argument >= -1 && mask_argument < count && mask_argument != profile.ids_argument && !of_source) return;
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("Options.mask_argument is {}; the model has {} inputs, input_ids is number {}", mask_argument,
                          count, profile.ids_argument));
}

}  // namespace

void check_answers_again(const Model& model, const PlainRun& run) {
  if (difference(run.result, model.plain(run.inputs), {}, 0, 0) == 0) return;
  throw Error(ErrorCode::kUnsupportedModel,
              "the model answers the same inputs differently each time (random numbers, or state kept between "
              "calls); such a model cannot be cached");
}

Probed probe(const Model& model, const Model* shallow, const InputSpec& inputs, std::optional<int> mask_argument,
             ModelProfile& profile) {
  Probed found;
  const auto take_output = [&] {
    profile.per_row_output = found.output.per_row;
    profile.rows_independent =
        profile.rows_independent && profile.per_row_output && comparable(model, found.runs.front().result);
  };
  const auto ask = [&](const Prober& prober, const Inputs& two_rows, const c10::IValue& result) {
    profile.rows_independent = profile.rows_independent && prober.rows_independent(two_rows, result);
    const auto single = probe_inputs(inputs, model.device(), 1, 6);
    profile.causal = prober.causal(single);
    if (mask_argument) check_option(*mask_argument, inputs, profile);
    profile.mask_argument = mask_argument ? *mask_argument : prober.mask_argument(single);
    profile.source_mask_argument = prober.source_mask_argument(single);
    profile.rows_independent = profile.rows_independent && prober.padded_rows_independent();
  };
  try {
    if (shallow != nullptr) {
      const OutputSpec states = states_output();
      const auto two_rows = probe_inputs(inputs, model.device(), 2, 5);
      ask(Prober(*shallow, states, inputs, profile), two_rows, shallow->plain(two_rows));
      found = run_plain(model, inputs, profile);
      take_output();  // self_check() asks whether the model answers alike each time, if its own comparison fails
    } else {
      found = run_usual(model, inputs);
      const PlainRun& first = found.runs.front();
      check_answers_again(model, first);
      take_output();
      ask(Prober(model, found.output, inputs, profile), first.inputs, first.result);
    }
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ErrorCode::kUnsupportedModel,
                fmt::format("probing the model with tiny inputs failed: {}", reason_of(error)));
  }
  return found;
}

void probe_max_tokens(const Model& model, const InputSpec& inputs, ModelProfile& profile) {
  constexpr std::int64_t kMost = 4096;  // longer ones would take memory and time: masks grow with the square
  constexpr std::int64_t kFewTokens = 6;
  const auto takes = [&](std::int64_t tokens, std::int64_t source_tokens) {
    Inputs given = probe_inputs(inputs, model.device(), 1, tokens);
    for (std::size_t i = 0; source_tokens > 0 && i < given.size(); ++i) {
      if (!inputs.is_source(i)) continue;
      const auto source = given[i].toTensor();
      given[i] = source.narrow(1, 0, 1).expand({1, source_tokens}).contiguous();
    }
    try {
      (void)model.embed(given);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  };
  std::int64_t& most = profile.max_tokens;
  if (most > 0 && most <= kMost && (!takes(most, 0) || takes(most + 1, 0))) most = 0;
  std::int64_t& most_source = profile.max_source_tokens;
  if (most_source > 0 && most_source <= kMost &&
      (!takes(kFewTokens, most_source) || takes(kFewTokens, most_source + 1))) {
    most_source = 0;
  }
  if (inputs.most_tokens > 0) most = most == 0 ? inputs.most_tokens : std::min(most, inputs.most_tokens);
}

std::vector<at::Tensor> row_of(const c10::IValue& result, const OutputSpec& spec, std::int64_t row, std::int64_t first,
                               std::int64_t tokens, std::int64_t padded_length) {
  std::vector<at::Tensor> rows;
  const auto leaves = tensors_of(result);
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const TokenDims& dims = spec.leaves.at(i);
    at::Tensor leaf = leaves[i].narrow(dims.batch, row, 1);
    if (dims.tokens >= 0 && leaf.size(dims.tokens) == padded_length) leaf = leaf.narrow(dims.tokens, first, tokens);
    rows.push_back(leaf);
  }
  return rows;
}

}  // namespace llmcache
