#include "linear_probe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <numeric>

#include "failure.h"
#include "store/damaged_data.h"
#include "store/safetensors.h"

namespace llmcache::bench {
namespace {

constexpr const char* kKind = "probe file";

LinearProbe parse(const Safetensors& in) {
  if (in.text("version") != "2") {
    in.damaged(fmt::format("it has version '{}', expected '2'; fit the probe again", in.text("version")));
  }
  LinearProbe probe;
  probe.workload = in.text("workload");
  probe.model = in.text("model");
  probe.model_sha256 = in.text("model_sha256");
  probe.classes = in.text_list("classes");
  const std::string accuracy = in.text("train_accuracy");
  char* end = nullptr;
  probe.train_accuracy = std::strtod(accuracy.c_str(), &end);
  if (accuracy.empty() || *end != '\0' || !(probe.train_accuracy >= 0 && probe.train_accuracy <= 1)) {
    in.damaged(fmt::format("its train_accuracy is '{}', expected a number from 0 to 1", accuracy));
  }
  if (in.optional_text("fit_sequences")) probe.fit_sequences = in.whole_number("fit_sequences");
  std::vector<std::int64_t> shape;
  probe.weight = in.values<float>("weight", 2, &shape);
  probe.bias = in.values<float>("bias");
  probe.dims = shape[1];
  const std::int64_t classes = std::ssize(probe.classes);
  if (shape[0] != classes || std::ssize(probe.bias) != classes || classes == 0 || probe.dims == 0) {
    in.damaged(
        fmt::format("weight is [{}, {}], bias [{}], for {} classes", shape[0], shape[1], probe.bias.size(), classes));
  }
  if (!all_finite(in.tensors().at("weight")) || !all_finite(in.tensors().at("bias"))) {
    in.damaged("weight or bias has a value that is not finite");
  }
  return probe;
}

}  // namespace

std::int64_t LinearProbe::classify(std::span<const float> row) const {
  std::vector<double> scores;
  for (std::size_t c = 0; c < bias.size(); ++c) {
    const float* own = weight.data() + c * row.size();
    scores.push_back(std::inner_product(row.begin(), row.end(), own, static_cast<double>(bias[c]), std::plus<>(),
                                        std::multiplies<double>()));
    if (std::isnan(scores.back())) return -1;
  }
  return std::ranges::max_element(scores) - scores.begin();
}

LinearProbe parse_linear_probe(std::string_view bytes, const std::string& name) {
  try {
    return parse(Safetensors(bytes));
  } catch (const DamagedData& error) {
    refuse_data(name, kKind, error.what());
  }
}

std::filesystem::path linear_probe_path(const std::filesystem::path& folder, const std::string& workload,
                                        const std::string& model) {
  return folder / fmt::format("{}.{}.probe.safetensors", workload, model);
}

std::int64_t first_unfitted(const LinearProbe& probe, const TokenFile& file) {
  const std::int64_t first = probe.fit_sequences > 0 ? file.first_request_from(probe.fit_sequences) : 0;
  return first < file.fill_requests ? first : 0;
}

std::optional<LinearProbe> find_linear_probe(const std::filesystem::path& folder, const TokenFile& file,
                                             const ModelFile& model) {
  const auto path = linear_probe_path(folder, file.workload, model.name);
  if (!std::filesystem::exists(path)) return std::nullopt;
  LinearProbe probe = parse_linear_probe(read_file(path, kKind), path.string());
  const auto refuse = [&](const std::string& what) {
    throw Failure(fmt::format("{}: {}; fit the probe again", path.string(), what));
  };
  if (probe.workload != file.workload || probe.model != model.name) {
    refuse(fmt::format("it is for model '{}' on '{}', unlike its name", probe.model, probe.workload));
  }
  if (!model.sha256.empty() && probe.model_sha256 != model.sha256) {
    refuse(fmt::format("it was fitted on a model with SHA-256 {}, this one has {}", probe.model_sha256, model.sha256));
  }
  if (probe.classes != file.label_names) refuse("its classes are not the label_names of the token file");
  return probe;
}

}  // namespace llmcache::bench
