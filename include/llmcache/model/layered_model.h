// What LayerCache needs of a model: the LayeredModel concept, and the interface that the library's
// own code works with.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "llmcache/model/profile.h"
#include "llmcache/model/token_level.h"

namespace llmcache {

struct GraphFindings;

/// Positional inputs of a model. Input tensors are token-level: integral or bool, `[batch, tokens]`.
using Inputs = std::vector<c10::IValue>;

/// What flows through a model: the hidden state, and whatever else its layers and head need
/// (masks, position tables). Movable; belongs to one running request.
struct Activations {
  at::Tensor hidden;              ///< `[batch, tokens, hidden]`
  std::shared_ptr<void> context;  ///< the model's own; untouched by the library
};

/// A transformer as LayerCache sees it. All members are const and may be called from many threads
/// at once; they may throw anything derived from std::exception.
///
///  - embed(inputs): everything before the first layer.
///  - layers(): their number, constant.
///  - layer(i, activations): runs layer i in place, on `activations.hidden`.
///  - head(activations): everything behind the last layer; returns what the model returns.
///  - device(), dtype(): of the weights.
///  - digest(): text that differs between models whose structure or weights differ. Snapshots go by it
///    (LayerCacheBase::save()): it must then differ between processes too, and be the same for the same model.
///
/// If the model also has `input_spec()` (see InputSpec), that says what it takes; otherwise it takes
/// input_ids and an optional attention_mask, and is probed with the ids 0 and 1 only.
///
/// Such a model runs whole layers. A head() of one tensor, or of a tuple of tensors, each with the
/// batch as its first dimension, lets the library keep and find single rows.
template <class M>
concept LayeredModel = requires(const M& model, const Inputs& inputs, Activations& activations, std::int64_t i) {
  { model.embed(inputs) } -> std::convertible_to<Activations>;
  { model.layers() } -> std::convertible_to<std::int64_t>;
  { model.layer(i, activations) } -> std::same_as<void>;
  { model.head(activations) } -> std::convertible_to<c10::IValue>;
  { model.device() } -> std::convertible_to<at::Device>;
  { model.dtype() } -> std::convertible_to<at::ScalarType>;
  { model.digest() } -> std::convertible_to<std::string>;
};

/// What a model takes, as far as its adapter knows before it is probed.
struct InputSpec {
  std::vector<std::string> names;        ///< one an input
  std::vector<bool> optional;            ///< input may be None or left out
  std::vector<std::int64_t> vocabulary;  ///< rows of the embedding the input selects from directly; 0: none
  bool vocabulary_known = true;          ///< false: `vocabulary` holds what may be probed, ids may be larger
  /// By input, numbers that the model compares its values with: separators, padding, types. Probes hold them. May be
  /// shorter than `names`.
  std::vector<std::vector<std::int64_t>> compared = {};
  /// By input, where which tokens attend to which follows from what it holds; empty text: nowhere. May be shorter.
  std::vector<std::string> opens_attention = {};
  /// By input: it is of the source of an encoder-decoder. Such inputs are `[batch, source tokens]`, of one length; the
  /// others are those of the target, `[batch, tokens]`. May be shorter.
  std::vector<bool> source = {};
  /// A number follows from the length that the sources of a batch are padded to: they are known with their padding
  /// only.
  bool source_length_counts = false;
  /// The largest padded length that the model says its answers hold for, though it may run longer ones; 0: any. Longer
  /// requests are refused. An exported program has been made for a range of lengths.
  std::int64_t most_tokens = 0;
  /// The same of the sources of an encoder-decoder.
  std::int64_t most_source_tokens = 0;
  /// True: inputs of other whole numbers than int64, or of bool, are refused. What an exported program does follows
  /// from the types that it was exported with.
  bool only_int64 = false;

  [[nodiscard]] bool is_source(std::size_t input) const { return input < source.size() && source[input]; }
  /// True for an encoder-decoder.
  [[nodiscard]] bool has_source() const {
    for (const bool own : source) {
      if (own) return true;
    }
    return false;
  }
};

/// Of an encoder-decoder: the part of its work that follows from the source alone, such as its encoder, and keys and
/// values that its layers make of the encoder's states. Const and thread-safe.
class SourceModel {
 public:
  virtual ~SourceModel() = default;

  /// What the rest of the model takes of the sources of `inputs`, which has one entry for every input of the model; of
  /// those that are not the source's only the type is looked at. Tensors `[rows, ...]`, always as many.
  [[nodiscard]] virtual std::vector<at::Tensor> run(const Inputs& inputs) const = 0;
  /// By tensor: its dimension over the tokens of the source; -1: it has none.
  [[nodiscard]] virtual const std::vector<int>& token_dims() const = 0;
  /// True if nobody writes to the tensors, and nothing that the model returns shares their memory.
  [[nodiscard]] virtual bool shareable() const = 0;
};

/// Type-erased model. Thread safety: const members may be called from many threads at once.
class Model {
 public:
  virtual ~Model() = default;

  /// `inputs`: one entry for every input; or one more, a list of the tensors that source()->run() gives for these rows,
  /// which then are not computed. Those over the tokens of the source have as many as its inputs, and at padding any
  /// finite numbers.
  [[nodiscard]] virtual Activations embed(const Inputs& inputs) const = 0;
  [[nodiscard]] virtual std::int64_t layers() const = 0;
  virtual void layer(std::int64_t i, Activations& activations) const = 0;
  [[nodiscard]] virtual c10::IValue head(Activations& activations) const = 0;
  /// Where the output of each row is read, if the head reads one token a row at a place that follows from the inputs:
  /// the last that is not padding, say. int64 `[rows]` on the host, counted in the row with its padding. Unless it says
  /// otherwise: undefined, the head reads in another way.
  [[nodiscard]] virtual at::Tensor read_positions(const Inputs& inputs) const;
  [[nodiscard]] virtual at::Device device() const = 0;
  [[nodiscard]] virtual at::ScalarType dtype() const = 0;
  /// The type whose rounding the results carry, by which runs of unlike shapes are compared. Unless it says otherwise:
  /// dtype(). Packed weights may round what they multiply to fewer bits.
  [[nodiscard]] virtual at::ScalarType rounding() const { return dtype(); }
  [[nodiscard]] virtual std::string digest() const = 0;
  /// The same for what leaves the process: a cryptographic hash of structure, weights and other attributes, the same in
  /// every process. Slow: it reads all weights, once. Unless it says otherwise: of digest(). Throws
  /// Error(kModelChanged).
  [[nodiscard]] virtual std::string identity() const;

  /// Inputs as declared by the model. Unless it says otherwise: input_ids, and attention_mask, which
  /// may be left out.
  [[nodiscard]] virtual InputSpec input_spec() const;
  /// The model as its users call it, for checking. Unless it says otherwise: embed, layers, head in turn.
  [[nodiscard]] virtual c10::IValue plain(const Inputs& inputs) const;
  /// Throws Error(kModelChanged) if weights, dtype, device or mode are not those it was wrapped
  /// with. Called once a request: cheap.
  virtual void check_unchanged() const {}
  /// The same for every byte of the weights: slow, called once in Options::weight_check_requests.
  virtual void check_every_weight() const {}
  /// Takes the weights as they are now: digest() and the checks go by them. Calls may be running. Throws Error as
  /// LayerCacheBase::weights_changed().
  virtual void weights_changed() {}
  /// Token-level operation, or null where the model only runs whole layers.
  [[nodiscard]] virtual const TokenLevelModel* token_level() const { return nullptr; }
  /// The part that follows from the source alone; null: there is none, or it cannot be run by itself.
  [[nodiscard]] virtual const SourceModel* source() const { return nullptr; }
  /// What the adapter found by running the model while it was wrapped, for Options::profile_path. Null: nothing.
  [[nodiscard]] virtual const GraphFindings* findings() const { return nullptr; }
  /// Fills what the adapter knows: layers_path, layers, hidden_argument, attention, inputs, notes,
  /// dtype, device, weight_bytes, digest.
  virtual void describe(ModelProfile& profile) const;
};

/// Makes any LayeredModel a Model. Holds the model by value.
template <LayeredModel M>
class LayeredModelAdapter final : public Model {
 public:
  explicit LayeredModelAdapter(M model) : model_(std::move(model)) {}

  Activations embed(const Inputs& inputs) const override { return model_.embed(inputs); }
  std::int64_t layers() const override { return model_.layers(); }
  void layer(std::int64_t i, Activations& activations) const override { model_.layer(i, activations); }
  c10::IValue head(Activations& activations) const override { return model_.head(activations); }
  at::Device device() const override { return model_.device(); }
  at::ScalarType dtype() const override { return model_.dtype(); }
  std::string digest() const override { return model_.digest(); }
  InputSpec input_spec() const override {
    if constexpr (requires(const M& model) {
                    { model.input_spec() } -> std::convertible_to<InputSpec>;
                  }) {
      return model_.input_spec();
    } else {
      return Model::input_spec();
    }
  }

 private:
  M model_;
};

}  // namespace llmcache
