// Token-level operation of a TorchScript module: its layers, cut at the attention operators. Internal to
// model/torchscript*.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "model/attention.h"
#include "model/packing.h"
#include "model/torchscript_attention_ops.h"
#include "model/torchscript_model.h"
#include "model/torchscript_partial_embed.h"

namespace llmcache::ts {

/// The size that a label stands for.
std::int64_t length_of(const Label& label, std::int64_t batch, std::int64_t tokens);

/// An integer as the graph has it: a number or a 0-dimensional tensor like `sample`.
c10::IValue integer_like(const c10::IValue& sample, std::int64_t value);

TokenDims token_dims(const ValueInfo& info);

/// A value from before the layers as the packed subgraphs need it.
struct PackRule {
  enum class Kind { kAsIs, kRows, kFirstRow, kLength };
  int slot = -1;
  Kind kind = Kind::kAsIs;
  TokenDims dims;
  Label length;
  std::int64_t entries = 1;  ///< kFirstRow: of a row
};

/// An attention operator that is the operator itself, perhaps behind a repetition of its key heads.
struct SdpaOp {
  AttentionSettings settings;
  std::size_t query = 0, key = 0, value = 0;  ///< which input of the region each is
  int mask = -1;                              ///< likewise; -1: none
};

struct PackedAttention {
  Region region;
  Subgraph subgraph;
  std::vector<int> slots;  ///< of region.inputs
  int output_slot = -1;
  std::optional<SdpaOp> sdpa;  ///< call the operator, not the subgraph
  std::vector<std::int64_t> query_dims, key_dims;
};

struct PackedLayer {
  std::vector<Subgraph> pieces;
  std::vector<PackedAttention> attention_ops;
  std::vector<int> dead;  ///< slots of values that no later layer and no head reads
};

class TokenLevel final : public TokenLevelModel {
 public:
  TokenLevel(std::shared_ptr<const Analysis> analysis, Program& program)
      : analysis_(std::move(analysis)), program_(program), self_(analysis_->module._ivalue()) {}

  /// False with a reason if some layer cannot be split.
  bool build(std::vector<AttentionOp>& attention_ops, std::vector<std::string>& notes);

  std::int64_t attention_ops(std::int64_t layer) const override {
    return static_cast<std::int64_t>(at(layer).attention_ops.size());
  }
  const std::vector<std::int64_t>& query_dims(std::int64_t layer, std::int64_t attention_op) const override {
    return at(layer).attention_ops[static_cast<std::size_t>(attention_op)].query_dims;
  }
  const std::vector<std::int64_t>& key_dims(std::int64_t layer, std::int64_t attention_op) const override {
    return at(layer).attention_ops[static_cast<std::size_t>(attention_op)].key_dims;
  }
  std::int64_t output_dim(std::int64_t layer, std::int64_t attention_op) const override {
    return at(layer).attention_ops[static_cast<std::size_t>(attention_op)].region.output_dim;
  }
  bool partial() const override { return partial_; }
  bool head_tokenwise() const override { return head_tokenwise_; }
  bool head_chooses() const override { return head_chooses_; }
  bool self_contained() const override { return self_contained_; }

  std::unique_ptr<TokenRun> start(const Activations& embedded, const PackedLayout& layout) const override;
  std::unique_ptr<TokenRun> start_at(const std::vector<c10::IValue>& inputs, const at::Tensor& positions,
                                     const PackedLayout& layout) const override;

 private:
  friend class Run;
  const PackedLayer& at(std::int64_t layer) const { return layers_.at(static_cast<std::size_t>(layer)); }
  using ValueSet = std::unordered_set<const Value*>;

  /// Empty, or why the layer cannot be split. `earlier`: values of layers before that depend on hidden states.
  std::string build_layer(std::int64_t l, const ValueSet& earlier, PackedLayer& layer,
                          std::vector<AttentionOp>& attention_ops);
  void add_dead_slots(std::int64_t l, ValueSet& earlier, PackedLayer& layer) const;
  bool add_rules(const std::vector<int>& slots, std::string& reason);
  /// What an earlier layer's attention told, if this one is the same code on inputs of the same kind.
  bool take_roles(PackedAttention& attention_op);
  [[nodiscard]] bool alike(const PackedAttention& a, const PackedAttention& b) const;
  bool find_roles(std::int64_t l, PackedAttention& attention_op, std::string& reason);
  /// Of a run of the model up to layer l at least; nothing where the answers are known.
  const Values& values_of_layer(std::int64_t l);
  std::optional<SdpaOp> find_sdpa(const PackedAttention& attention_op, const Values& values) const;
  bool sdpa_agrees(const PackedAttention& attention_op, const SdpaOp& found, const Values& values) const;
  bool try_roles(const PackedAttention& attention_op, const Values& values, bool partial) const;
  void build_head(std::vector<std::string>& notes);
  [[nodiscard]] bool build_tokenwise_head();
  [[nodiscard]] bool build_choosing_head();
  void check_side_outputs(std::vector<std::string>& notes);
  void build_partial_embed();

  std::shared_ptr<const Analysis> analysis_;
  Program& program_;
  c10::IValue self_;
  std::vector<PackedLayer> layers_;
  Values values_;                      ///< that questions are answered with, while it is built
  std::int64_t layers_of_values_ = 0;  ///< how many layers that run went through
  std::vector<PackRule> rules_;
  std::unordered_set<int> ruled_;
  Subgraph packed_head_;   ///< as far as the head is token-wise
  Subgraph head_of_rows_;  ///< of a head that chooses: the rest, on what was chosen
  std::optional<PartialEmbed> partial_embed_;
  std::vector<int> head_rows_;          ///< slots of per-token values that the dense head needs
  std::vector<TokenDims> result_dims_;  ///< of the tensors in the result
  bool partial_ = true;
  bool head_tokenwise_ = false;
  bool head_chooses_ = false;
  bool self_contained_ = true;
};

}  // namespace llmcache::ts
