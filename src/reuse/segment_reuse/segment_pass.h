// One pass of a model in which some tokens' states come from segments of other sequences.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bank/segment_bank.h"
#include "execute/batch.h"
#include "execute/engine_hook.h"
#include "execute/key_positions.h"
#include "llmcache/model/token_level.h"

namespace llmcache {

/// Settings of one pass with reused segments.
struct SegmentSettings {
  /// Part of the reused tokens that are computed all the same, 0 to 1: those whose keys and values at
  /// `choosing_layer` are farthest from the cached ones (CacheBlend, arXiv 2405.16444). 0: none, and the tokens that
  /// are reused run through no layer. 1: all tokens are computed, and the result is lossless.
  double recompute_share = 0.1;

  /// With a share between 0 and 1: every token runs through the layers below this one, which must be above 0 and one of
  /// the model's.
  std::int32_t choosing_layer = 1;

  /// The first tokens of each reused segment that are computed: in the donor they attended to what stood right before.
  /// 0 or more.
  std::int64_t head_tokens = 4;

  /// Shortest segment that is reused, tokens, 1 or more. Shorter ones than SegmentOptions::block_tokens are not found.
  std::int64_t least_segment = 32;

  /// Keep the states of sequences that are computed in full, or behind an exact prefix.
  bool keep = true;

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
  /// True if tokens are chosen.
  [[nodiscard]] bool chooses() const noexcept { return recompute_share > 0 && recompute_share < 1; }
};

/// Where a model's states are among the tensors of an entry, and how its keys turn.
struct SegmentLayout {
  std::int32_t layers = 0;
  std::vector<std::vector<std::size_t>> key_specs;  ///< by layer and attention operator: the first spec of its keys
  std::size_t final_spec = 0;                       ///< of the final states
  KeyPositions positions;
};

/// A sequence of the batch that runs.
struct SegmentRow : RowKey {
  std::vector<SegmentHit> segments;
  std::int64_t beginning = 0;        ///< tokens of the known prefix, which runs through no layer
  bool rounded = false;              ///< the bank has rounded that prefix's states: it is not exact
  std::vector<std::int32_t> last;    ///< by token: one past the last layer that computes it
  std::vector<std::int64_t> reused;  ///< tokens that need not be computed, the known prefix left out
  SegmentBank::Room room;            ///< where what is to be kept goes

  /// Tokens of which nothing was lost.
  [[nodiscard]] std::int64_t exact() const noexcept { return rounded ? 0 : beginning; }
  /// True if nothing is approximate: all is computed, or behind an exact prefix.
  [[nodiscard]] bool is_exact() const noexcept { return reused.empty() && beginning == exact(); }
  [[nodiscard]] bool active(std::int64_t token, std::int32_t layer) const {
    return layer < last[static_cast<std::size_t>(token)];
  }
};

/// Tokens that go through the same layers, as ranges of a plan.
std::vector<TokenRange> ranges_of(const SegmentRow& row);

/// States of one pass: from donors where they are not computed. Fills the rows' entries, and drops those whose final
/// states are not finite.
class SegmentPass final : public EngineHook {
 public:
  SegmentPass(const TokenLevelModel& model, const SegmentLayout& layout, std::vector<SegmentRow>& rows,
              const SegmentSettings& settings);

  [[nodiscard]] std::int32_t choosing_layer() const override { return choosing_; }
  std::vector<TokenRange> choose(std::size_t sequence, const std::vector<at::Tensor>& fresh) override;
  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override;
  at::Tensor entering(std::size_t, std::int32_t, std::int64_t, std::int64_t) override { return {}; }
  void finished(std::size_t sequence, const at::Tensor& fresh) override;
  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override;

 private:
  struct Merge {
    std::vector<std::int64_t> moves;                    ///< by token; empty: nothing has moved
    std::vector<std::optional<RotationAngles>> angles;  ///< by rotation
    std::int32_t layer = -1;                            ///< since which `active` is so
    at::Tensor active;
  };

  [[nodiscard]] std::size_t spec_of(std::int32_t layer, std::int64_t attention_op) const;
  const at::Tensor& active(std::size_t sequence, std::int32_t layer, at::Device device);
  [[nodiscard]] static at::Tensor gather(const SegmentRow& row, std::size_t spec, const at::Tensor& like,
                                         std::int64_t dim);
  at::Tensor known(std::size_t sequence, std::int32_t layer, std::int64_t attention_op, std::size_t i,
                   const at::Tensor& like, std::int64_t dim);
  at::Tensor all_final(std::size_t sequence);

  const TokenLevelModel& level_;
  const SegmentLayout& layout_;
  std::vector<SegmentRow>& rows_;
  const SegmentSettings& settings_;
  std::int32_t choosing_ = -1;
  std::vector<Merge> merges_;
  std::vector<at::Tensor> final_;  ///< of the tokens that ran through the last layer
};

}  // namespace llmcache
