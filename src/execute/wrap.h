// From a model to a wrapped one: described, probed, and compared with itself.
#pragma once

#include <memory>

#include "llmcache/options.h"
#include "model/saved_profile.h"
#include "model/wrapped_model.h"

namespace llmcache {

/// Runs the model on tiny inputs a few dozen times. Tells options.progress of its steps. Throws
/// Error(kUnsupportedModel) with the reason.
WrappedModel wrap(std::shared_ptr<Model> model, const Options& options);

/// The same from what was found before, with one small pass that is compared with the plain model. Throws DamagedData,
/// or what the model throws, if that does not fit the model.
WrappedModel wrap_as_saved(std::shared_ptr<Model> model, const SavedProfile& saved);

}  // namespace llmcache
