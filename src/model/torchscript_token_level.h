// Token-level operation of a TorchScript module: its layers, cut at the attention sites. Internal to
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
#include "model/torchscript_narrow_embed.h"
#include "model/torchscript_sites.h"

namespace llmcache::ts {

/// The size that a label stands for.
std::int64_t length_of(const Label& label, std::int64_t batch, std::int64_t tokens);

/// An integer as the graph has it: a number or a 0-dimensional tensor like `sample`.
c10::IValue integer_like(const c10::IValue& sample, std::int64_t value);

TokenDims token_dims(const ValueInfo& info);

/// A value from before the layers as the packed segments need it.
struct PackRule {
  enum class Kind { kAsIs, kRows, kLength };
  int slot = -1;
  Kind kind = Kind::kAsIs;
  TokenDims dims;
  Label length;
};

/// An attention site that is the operator itself, perhaps behind a repetition of its key heads.
struct SdpaSite {
  AttentionSettings settings;
  std::size_t query = 0, key = 0, value = 0;  ///< which input of the region each is
  int mask = -1;                              ///< likewise; -1: none
};

struct Site {
  Region region;
  Segment segment;
  std::vector<int> slots;  ///< of region.inputs
  int output_slot = -1;
  std::optional<SdpaSite> sdpa;  ///< call the operator, not the segment
  std::vector<std::int64_t> query_dims, key_dims;
};

struct PackedLayer {
  std::vector<Segment> pieces;
  std::vector<Site> sites;
  std::vector<int> dead;  ///< slots of values that no later layer and no head reads
};

class TokenLevel final : public TokenLevelModel {
 public:
  TokenLevel(std::shared_ptr<const Analysis> analysis, Program& program)
      : analysis_(std::move(analysis)), program_(program), self_(analysis_->module._ivalue()) {}

  /// False with a reason if some layer cannot be split.
  bool build(std::vector<AttentionSite>& sites, std::vector<std::string>& notes);

  std::int64_t sites(std::int64_t layer) const override { return static_cast<std::int64_t>(at(layer).sites.size()); }
  const std::vector<std::int64_t>& query_dims(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].query_dims;
  }
  const std::vector<std::int64_t>& key_dims(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].key_dims;
  }
  std::int64_t output_dim(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].region.output_dim;
  }
  bool partial() const override { return partial_; }
  bool head_tokenwise() const override { return head_tokenwise_; }
  bool self_contained() const override { return self_contained_; }

  std::unique_ptr<TokenRun> start(const Activations& embedded, const PackedLayout& layout) const override;
  std::unique_ptr<TokenRun> start_at(const std::vector<c10::IValue>& inputs, const at::Tensor& positions,
                                     const PackedLayout& layout) const override;

 private:
  friend class Run;
  const PackedLayer& at(std::int64_t layer) const { return layers_.at(static_cast<std::size_t>(layer)); }
  bool add_rules(const std::vector<int>& slots, std::string& reason);
  bool find_roles(Site& site, const Values& values, std::string& reason);
  std::optional<SdpaSite> find_sdpa(const Site& site, const Values& values) const;
  bool sdpa_agrees(const Site& site, const SdpaSite& found, const Values& values) const;
  bool try_roles(const Site& site, const Values& values, bool partial) const;
  void build_head(std::vector<std::string>& notes);
  void check_side_outputs(std::vector<std::string>& notes);
  void build_narrow_embed();

  std::shared_ptr<const Analysis> analysis_;
  Program& program_;
  c10::IValue self_;
  std::vector<PackedLayer> layers_;
  std::vector<PackRule> rules_;
  std::unordered_set<int> ruled_;
  Segment packed_head_;
  std::optional<NarrowEmbed> narrow_embed_;
  std::vector<int> head_rows_;          ///< slots of per-token values that the dense head needs
  std::vector<TokenDims> result_dims_;  ///< of the tensors in the result
  bool partial_ = true;
  bool head_tokenwise_ = false;
  bool self_contained_ = true;
};

}  // namespace llmcache::ts
