// One packed pass over the layers of a TorchScript module. Internal to model/torchscript*.
#pragma once

#include <memory>
#include <unordered_map>

#include "model/torchscript_token_level.h"

namespace llmcache::ts {

class Run final : public TokenRun {
 public:
  Run(const TokenLevel& model, std::shared_ptr<Env> full, const at::Tensor& hidden, const PackedLayout& layout);
  /// From values of which some are there at `positions` only: these are in `cut`.
  Run(const TokenLevel& model, std::shared_ptr<Env> full, Env cut, const at::Tensor& positions,
      const PackedLayout& layout);

  void set_rows(const PackedLayout& layout, at::Tensor hidden) override;
  const at::Tensor& hidden() const override { return hidden_; }
  AttentionTensors before(std::int64_t l, std::int64_t s) override;
  at::Tensor attend(std::int64_t l, std::int64_t s, std::size_t q, const std::vector<at::Tensor>& queries,
                    const std::vector<KeySegment>& keys) override;
  void after(std::int64_t l, std::int64_t s, at::Tensor attended) override;
  void finish(std::int64_t l) override;
  c10::IValue head(const PackedLayout& placed) override;

 private:
  void pack_sides();
  [[nodiscard]] c10::IValue head_of_chosen(const PackedLayout& placed);
  [[nodiscard]] PackedLayout narrowed(const PackedLayout& layout) const;
  const c10::IValue& side_of(const AttentionInput& input, int slot, std::size_t q);
  const c10::IValue& value_of(const AttentionInput& input, int slot) const;

  const TokenLevel& model_;
  std::shared_ptr<Env> full_;  ///< values from before the layers, batch by tokens
  Env cut_;                    ///< those of them that are there at positions_ only
  at::Tensor positions_;       ///< undefined: nothing is cut
  Env env_;                    ///< values of the packed subgraphs
  PackedLayout layout_;
  at::Tensor hidden_;
  std::unordered_map<std::uint64_t, c10::IValue> sides_;  ///< by slot and sequence, reused by all layers
};

}  // namespace llmcache::ts
