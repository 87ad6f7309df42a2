// From a TorchScript module to a Model: probed, or as a saved profile tells; with weights as the options say.
#include <ATen/ATen.h>
#include <fmt/core.h>

#include "caller_failed.h"
#include "llmcache/error.h"
#include "llmcache/model/torchscript.h"
#include "model/saved_profile.h"
#include "model/torchscript_model.h"
#include "model/torchscript_packed_weights.h"
#include "model/torchscript_weights.h"

namespace llmcache {
namespace {

std::unique_ptr<Model> wrap_as(const torch::jit::Module& module, const Options& options, ts::Analysis analysis,
                               const RankedFormat& format, const ts::Int8Recipes& found) {
  const bool known = analysis.findings->known;
  if (format.weights != Weights::kAsLoaded) tell(options.progress, "packing weights");
  const auto& recipes = format.weights == Weights::kPackedInt8 ? found : ts::Int8Recipes{};
  auto model = ts::make_model(std::move(analysis), format.weights, format.reason, recipes);
  if (format.weights != Weights::kAsLoaded && !known) {
    ts::check_packed(*model, module, format.weights, !recipes.recipes.empty());
  }
  return model;
}

ts::Int8Recipes recipes_for(const ts::Analysis& analysis, const Options& options, bool int8) {
  if (!int8 || options.weights_sample.empty()) return {};
  return ts::find_int8_recipes(analysis, options.weights_sample);
}

/// The fastest format that this model bears.
std::unique_ptr<Model> wrap_fastest(const torch::jit::Module& module, const Options& options, ts::Analysis analysis) {
  tell(options.progress, "timing formats of weights");
  RankedFormat chosen;
  const auto recipes = recipes_for(analysis, options, options.fastest_may_be_int8);
  for (const RankedFormat& format : rank_formats(ts::layer_shapes(analysis, recipes), options.fastest_may_be_int8)) {
    chosen = format;
    if (format.weights == Weights::kAsLoaded) break;
    try {
      return wrap_as(module, options, std::move(analysis), format, recipes);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotAvailable) throw;
      analysis = ts::analyse(module, options, std::make_shared<GraphFindings>());  // packing had changed it
    }
  }
  return wrap_as(module, options, std::move(analysis), chosen, recipes);
}

ts::Analysis analysed(const torch::jit::Module& module, const Options& options,
                      std::shared_ptr<GraphFindings> findings) {
  tell(options.progress, "reading the model's graph");
  auto analysis = ts::analyse(module, options, std::move(findings));
  const auto dtype = analysis.infos.at(analysis.hidden[0]).dtype;
  if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16 && dtype != at::kHalf) {
    throw Error(ErrorCode::kUnsupportedModel,
                fmt::format("hidden states of type {} are not supported", c10::toString(dtype)));
  }
  return analysis;
}

/// As it was found when the same module was wrapped before; null if it was not, or what is saved does not fit. Nothing
/// is refused here: what cannot be wrapped says why when it is probed.
std::unique_ptr<Model> model_as_saved(const torch::jit::Module& module, const Options& options) {
  if (options.profile_path.empty()) return nullptr;
  try {
    SavedProfile saved = read_saved_profile(options.profile_path);
    saved.check_conditions(options, ts::device_of(module));
    ts::Structure structure = ts::structure_of(module);
    if (!saved.graph || saved.graph->structure != structure.digest) return nullptr;
    saved.graph->structure_identity = std::move(structure.identity);
    const RankedFormat format{saved.weights, saved.profile.weights_reason};
    auto findings = std::make_shared<GraphFindings>(*std::move(saved.graph));
    auto analysis = analysed(module, options, std::move(findings));
    const auto recipes = recipes_for(analysis, options, saved.weights == Weights::kPackedInt8);
    auto model = wrap_as(module, options, std::move(analysis), format, recipes);
    const GraphFindings& used = *model->findings();
    return model->digest() == saved.digest && used.asked == used.answers.size() ? std::move(model) : nullptr;
  } catch (const CallerFailed&) {
    throw;
  } catch (const std::exception&) {
    return nullptr;
  }
}

}  // namespace

std::unique_ptr<Model> wrap_torchscript(const torch::jit::Module& module, const Options& options) {
  const at::NoGradGuard no_grad;
  if (auto model = model_as_saved(module, options)) return model;
  auto analysis = analysed(module, options, std::make_shared<GraphFindings>());
  if (options.weights == Weights::kFastest) return wrap_fastest(module, options, std::move(analysis));
  const auto recipes = recipes_for(analysis, options, options.weights == Weights::kPackedInt8);
  return wrap_as(module, options, std::move(analysis), {options.weights, {}}, recipes);
}

}  // namespace llmcache
