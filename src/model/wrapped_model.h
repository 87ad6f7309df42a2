// A model with all that wrapping found out about it.
#pragma once

#include <ATen/core/ivalue.h>

#include <memory>

#include "llmcache/model/layered_model.h"
#include "llmcache/model/profile.h"
#include "model/numeric_state.h"
#include "model/probe.h"
#include "model/stream_fence.h"
#include "store/model_identity.h"

namespace llmcache {

/// Made by wrap() (execute/wrap.h). Several caches may be around one model.
struct WrappedModel {
  std::shared_ptr<Model> model;
  InputSpec inputs;
  OutputSpec output;
  ModelProfile profile;
  NumericState wrapped_under;                                              ///< what kept results hold under
  std::shared_ptr<StreamFence> streams = std::make_shared<StreamFence>();  ///< of all calls of all its caches
  /// The structure of a result of one row, its tensors without data; None where rows are not kept.
  c10::IValue result_form;

  /// What kept states belong to outside of the process. Slow at its first call: it reads all weights. Throws
  /// Error(kModelChanged).
  [[nodiscard]] ModelIdentity identity() const;

  [[nodiscard]] std::int32_t layers() const { return static_cast<std::int32_t>(model->layers()); }
  [[nodiscard]] const TokenLevelModel& token_level() const { return *model->token_level(); }
  /// True if a row's output is its own business, so that it can be kept.
  [[nodiscard]] bool keeps_rows() const noexcept { return profile.rows_independent && profile.per_row_output; }
  /// True if all of a row's output belongs to single tokens.
  [[nodiscard]] bool all_per_token() const noexcept;
  /// Packing answers each row for itself, whatever the padding around it. Otherwise the padding decides too.
  [[nodiscard]] bool ignores_padding() const noexcept {
    return profile.granularity != Granularity::kWholeLayers && profile.row_obstacle.empty();
  }
};

}  // namespace llmcache
