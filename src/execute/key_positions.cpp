#include "execute/key_positions.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "execute/engine.h"
#include "model/probe.h"

namespace llmcache {
namespace {

constexpr std::int64_t kSequences = 2;

/// Key-side tensors of a pass, by layer, attention operator and tensor: of all sequences, put together as if they were
/// heads.
using Keys = std::vector<std::vector<std::vector<at::Tensor>>>;

/// Keeps the keys of a pass that computes everything, and nothing else.
class KeyRecorder final : public EngineHook {
 public:
  explicit KeyRecorder(const Model& model) {
    for (std::int64_t l = 0; l < model.layers(); ++l) {
      keys_.emplace_back(static_cast<std::size_t>(model.token_level()->attention_ops(l)));
    }
  }

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override {
    auto& kept = keys_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)];
    const bool first = kept.empty();
    for (std::size_t i = 0; i < fresh.size(); ++i) {
      if (first) {
        kept.push_back(fresh[i].unsqueeze(0).clone());
      } else {
        kept[i] = at::cat({kept[i], fresh[i].unsqueeze(0)});
      }
    }
    return EngineHook::keys(sequence, layer, attention_op, std::move(fresh));
  }

  Keys run(const Model& model, const Inputs& inputs, std::int64_t tokens) {
    const auto layers = static_cast<std::int32_t>(model.layers());
    Plan plan{kSequences, tokens, layers, {}};
    Selection nothing{0, {}, {}};
    for (std::int64_t row = 0; row < kSequences; ++row) {
      plan.sequences.push_back(compute_all(row, 0, tokens, layers));
      nothing.spans.push_back({});
    }
    ForwardReport report;
    execute_packed(model, inputs, plan, *this, nothing, report);
    return std::move(keys_);
  }

 private:
  Keys keys_;
};

/// Keys of sequences of one repeated token each.
Keys repeated(const Model& model, const InputSpec& spec, std::int64_t tokens) {
  auto inputs = probe_inputs(spec, model.device(), kSequences, 1, 3);
  for (c10::IValue& input : inputs) input = input.toTensor().expand({kSequences, tokens}).contiguous();
  return KeyRecorder(model).run(model, inputs, tokens);
}

/// The same for the longest of some lengths that the model takes.
Keys longest(const Model& model, const InputSpec& spec, std::int64_t& tokens) {
  for (const std::int64_t length : {320, 160, 80}) {
    try {
      tokens = length;
      return repeated(model, spec, length);
    } catch (const std::exception&) {  // longer than its table of positions
    }
  }
  tokens = 40;
  return repeated(model, spec, tokens);
}

/// Of different tokens, the keys of the first layer depend on nothing but the token and its position either. Moves a
/// sequence by some tokens, and compares.
bool moves_as_found(const Model& model, const InputSpec& spec, const KeyPositions& found) {
  constexpr std::int64_t kTokens = 30;
  constexpr std::int64_t kMove = 7;
  const auto inputs = probe_inputs(spec, model.device(), kSequences, kTokens, 11);
  Inputs rolled;
  for (const c10::IValue& input : inputs) rolled.emplace_back(input.toTensor().roll({kMove}, {1}));
  const Keys before = KeyRecorder(model).run(model, inputs, kTokens);
  const Keys after = KeyRecorder(model).run(model, rolled, kTokens);
  for (std::size_t s = 0; s < before[0].size(); ++s) {
    for (std::size_t i = 0; i < before[0][s].size(); ++i) {
      const auto dim = model.token_level()->key_dims(0, static_cast<std::int64_t>(s))[i] + 1;
      auto moved = before[0][s][i].narrow(dim, 0, kTokens - kMove).clone();
      if (const int number = found.rotation_of[0][s][i]; number >= 0) {
        const KeyRotation& rotation = found.rotations[static_cast<std::size_t>(number)];
        rotate_(moved, dim, rotation,
                angles_of(rotation, std::vector<std::int64_t>(kTokens - kMove, kMove), model.device()));
      }
      const auto own = after[0][s][i].narrow(dim, kMove, kTokens - kMove);
      const auto allowed = key_tolerance(model.rounding()) * own.abs().max().item<double>();
      if ((own - moved).abs().max().item<double>() > allowed) return false;
    }
  }
  return true;
}

}  // namespace

KeyPositions find_key_positions(const Model& model, const InputSpec& spec) {
  KeyPositions found;
  const Keys keys = longest(model, spec, found.positions);
  const std::int64_t few = 24;
  const Keys shorter = repeated(model, spec, few);
  for (std::size_t l = 0; l < keys.size(); ++l) {
    found.rotation_of.emplace_back(keys[l].size());
    for (std::size_t s = 0; s < keys[l].size(); ++s) {
      for (std::size_t i = 0; i < keys[l][s].size(); ++i) {
        const at::Tensor& key = keys[l][s][i];
        const auto dim =
            model.token_level()->key_dims(static_cast<std::int64_t>(l), static_cast<std::int64_t>(s))[i] + 1;
        int& rotation = found.rotation_of[l][s].emplace_back(-1);
        if (same_at_all_positions(key, dim)) continue;
        const auto known = std::find_if(found.rotations.begin(), found.rotations.end(),
                                        [&](const KeyRotation& other) { return foretells(other, key, dim); });
        rotation = static_cast<int>(known - found.rotations.begin());
        if (known == found.rotations.end()) {
          std::string why;
          auto fresh = find_rotation(key, dim, why);
          if (!fresh) {
            found.why = fmt::format("positions are not rotary (layer {}, tensor {} of its attention): {}", l, i, why);
            return found;
          }
          found.rotations.push_back(std::move(*fresh));
        }
        const auto& same = found.rotations[static_cast<std::size_t>(rotation)];
        const auto both = at::cat({key.narrow(dim, 0, 1), shorter[l][s][i].narrow(dim, 1, few - 1)}, dim);
        if (foretells(same, both, dim)) continue;
        found.why = fmt::format("the rotation of layer {} changes with the length of the sequence", l);
        return found;
      }
    }
  }
  found.movable = moves_as_found(model, spec, found);
  if (!found.movable) found.why = "keys of different tokens do not turn as those of equal ones do";
  return found;
}

}  // namespace llmcache
