#include "llmcache/model/layered_model.h"

#include "llmcache/options.h"
#include "model/probe.h"
#include "store/digest.h"

namespace llmcache {

c10::IValue Model::plain(const Inputs& inputs) const { return run_dense(*this, inputs); }

at::Tensor Model::read_positions(const Inputs& /*inputs*/) const { return {}; }

std::string Model::identity() const {
  Digest hash;
  hash.add(digest());
  return hash.hex();
}

InputSpec Model::input_spec() const {
  InputSpec spec;
  spec.names.resize(2);
  spec.names[0] = "input_ids";
  spec.names[1] = "attention_mask";
  spec.optional = {false, true};
  spec.vocabulary = {2, 0};
  spec.vocabulary_known = false;
  return spec;
}

void Model::describe(ModelProfile& profile) const {
  profile.layers = layers();
  profile.inputs = input_spec().names;
  profile.dtype = dtype();
  profile.device = device().str();
  profile.weights = to_string(Weights::kAsLoaded);
  profile.digest = digest();
  profile.rows_independent = true;
  profile.notes.emplace_back("token-level reuse is not available: the model offers whole layers only");
}

}  // namespace llmcache
