#include "execute/wrap.h"

#include <ATen/ATen.h>

#include "caller_failed.h"
#include "execute/self_check.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

c10::IValue result_form_of(const WrappedModel& wrapped) {
  const auto given = probe_inputs(wrapped.inputs.vocabulary, wrapped.model->device(), 1, 5);
  auto result = wrapped.model->plain(given);
  if (result.isNone()) result = run_dense(*wrapped.model, given);
  return map_tensors(result, [](const at::Tensor& t) { return at::empty(t.sizes(), t.options().device(at::kMeta)); });
}

}  // namespace

WrappedModel wrap(std::shared_ptr<Model> model, const Options& options) {
  WrappedModel wrapped;
  wrapped.model = std::move(model);
  const Model& own = *wrapped.model;
  wrapped.inputs = own.input_spec();
  wrapped.wrapped_under = numeric_state(own.device());
  own.describe(wrapped.profile);
  tell(options.progress, "probing the model");
  wrapped.output = probe(own, wrapped.inputs, options.mask_argument, wrapped.profile);
  probe_max_tokens(own, wrapped.inputs, wrapped.profile);
  tell(options.progress, "comparing packed and partial passes with the plain model");
  self_check(own, wrapped.inputs, wrapped.output, wrapped.profile);
  if (wrapped.keeps_rows()) wrapped.result_form = result_form_of(wrapped);
  return wrapped;
}

}  // namespace llmcache
