#include "execute/wrap.h"

#include <ATen/ATen.h>

#include "caller_failed.h"
#include "execute/self_check.h"
#include "model/shallow_model.h"
#include "model/tensors_of.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// What the model says of itself, before anything is asked of it.
WrappedModel described(std::shared_ptr<Model> model) {
  WrappedModel wrapped;
  wrapped.model = std::move(model);
  wrapped.inputs = wrapped.model->input_spec();
  wrapped.wrapped_under = numeric_state(wrapped.model->device());
  wrapped.model->describe(wrapped.profile);
  return wrapped;
}

/// The form of one row of a result.
c10::IValue form_of_row(const c10::IValue& result, const OutputSpec& output) {
  std::size_t leaf = 0;
  return map_tensors(result, [&](const at::Tensor& t) {
    const auto row = t.narrow(output.leaves.at(leaf++).batch, 0, 1);
    return at::empty(row.sizes(), t.options().device(at::kMeta));
  });
}

/// Is what was saved possible for the model? Forged numbers must not lead where no check looks.
void check_possible(const WrappedModel& wrapped) {
  const ModelProfile& profile = wrapped.profile;
  const auto* token_level = wrapped.model->token_level();
  const bool tokens = profile.granularity == Granularity::kTokens;
  const auto inputs = static_cast<int>(wrapped.inputs.vocabulary.size());
  const int source_mask = profile.source_mask_argument;
  const bool possible = profile.mask_argument < inputs && source_mask < inputs &&
                        (source_mask < 0 || wrapped.inputs.is_source(static_cast<std::size_t>(source_mask))) &&
                        profile.mask_argument != profile.ids_argument &&
                        (profile.granularity == Granularity::kWholeLayers ||
                         (token_level != nullptr && profile.rows_independent && profile.per_row_output)) &&
                        (!tokens || token_level->partial()) &&
                        profile.head_tokenwise == (token_level != nullptr && token_level->head_tokenwise()) &&
                        (!profile.prefix_reuse || (tokens && profile.causal && wrapped.keeps_rows())) &&
                        (!profile.source_reuse || (wrapped.model->source() != nullptr && wrapped.keeps_rows())) &&
                        profile.per_row_output == wrapped.output.per_row;
  if (!possible) throw DamagedData("it says what cannot be of this model");
}

}  // namespace

WrappedModel wrap_as_saved(std::shared_ptr<Model> model, const SavedProfile& saved) {
  WrappedModel wrapped = described(std::move(model));
  const Model& own = *wrapped.model;
  if (wrapped.profile.digest != saved.digest) throw DamagedData("it is of another model, or of other weights");
  if (const auto* found = own.findings(); found != nullptr && !found->known) {
    throw DamagedData("the model's graph is another one than it says");
  }
  ModelProfile& profile = wrapped.profile;
  const bool rows_may_be_independent = profile.rows_independent;
  take_probed(profile, saved.profile);
  wrapped.output = saved.output;
  if (profile.rows_independent && !rows_may_be_independent) throw DamagedData("it says what cannot be of this model");
  check_possible(wrapped);
  const auto result = check_once(own, wrapped.inputs, wrapped.output, profile);
  if (wrapped.keeps_rows()) wrapped.result_form = form_of_row(result, wrapped.output);
  return wrapped;
}

WrappedModel wrap(std::shared_ptr<Model> model, const Options& options) {
  WrappedModel wrapped = described(std::move(model));
  const Model& own = *wrapped.model;
  tell(options.progress, "probing the model");
  const auto shallow = ShallowModel::of(wrapped.model);
  const auto probed = probe(own, shallow.get(), wrapped.inputs, options.mask_argument, wrapped.profile);
  wrapped.output = probed.output;
  probe_max_tokens(own, wrapped.inputs, wrapped.profile);
  tell(options.progress, "comparing packed and partial passes with the plain model");
  self_check(own, shallow.get(), wrapped.inputs, probed, wrapped.profile);
  if (wrapped.keeps_rows()) wrapped.result_form = form_of_row(probed.runs.front().result, wrapped.output);
  return wrapped;
}

}  // namespace llmcache
