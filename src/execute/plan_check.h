// Refusing what the packed engine cannot run, before anything is run.
#pragma once

#include "execute/batch.h"
#include "execute/engine.h"
#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"

namespace llmcache {

/// Throws Error(kNotAvailable) if the model runs whole layers only, does not pack this padding or reads its output
/// there, Error(kInvalidInput) if the mask has holes.
void check_packable(const Batch& batch, const Model& model, const ModelProfile& profile);

/// Throws as check_packable, and Error(kInvalidOptions) that names what is wrong if the plan, the batch and the donors
/// do not fit together, Error(kNotAvailable) if the model cannot run parts of a sequence as the plan wants.
void check_plan(const Plan& plan, const Batch& batch, const Model& model, const ModelProfile& profile,
                const Donors& donors);

}  // namespace llmcache
