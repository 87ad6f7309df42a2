#include "selection.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <system_error>

#include "failure.h"
#include "linear_probe.h"
#include "table.h"

namespace llmcache::bench {
namespace {

namespace fs = std::filesystem;
using Names = std::set<std::string>;

constexpr const char* kTinyTokenizer = "tiny";  // of models that tests use; no text is made for it
constexpr const char* kSample = "sample";
/// Made for sentence embeddings: other models run them only if asked to, so that their time goes to what tells more.
const Names kForEmbeddings = {"clinc150", "qqp", "stsb"};
/// Made for reuse within an error budget: they run only if asked for.
const Names kForBudgets = {"agnews",   "chat-edit", "clinc150-in-scope", "edits",
                           "instruct", "passages",  "small-edits",       "sst2"};
/// Long, and no more telling with random weights than generate-128: such models run them only if asked to.
const Names kForRealWeights = {"chat", "generate-512"};
constexpr std::string_view kSuffix = ".safetensors";
constexpr std::string_view kProbeSuffix = ".probe.safetensors";  // no token files, see linear_probe.h

std::string joined(const Names& names) { return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", ")); }

Names names_of(const std::vector<WorkloadFile>& files) {
  Names names;
  for (const WorkloadFile& file : files) names.insert(file.workload);
  return names;
}

/// True if `workload` is the one called `name`, or is it with a number behind it: "generate" means "generate-128" too.
bool is_named(const std::string& workload, const std::string& name) {
  if (!workload.starts_with(name)) return false;
  const std::string rest = workload.substr(name.size());
  return rest.empty() ||
         (rest.size() > 1 && rest[0] == '-' && rest.find_first_not_of("0123456789", 1) == std::string::npos);
}

bool has_linear_probe(const Settings& settings, const std::string& workload, const ModelFile& model) {
  std::error_code error;
  return fs::exists(linear_probe_path(settings.data_folder, workload, model.name), error);
}

/// What runs if no workload is named, of the files for the model's tokenizer.
void keep_defaults(const ModelFile& model, std::vector<WorkloadFile>& files) {
  std::erase_if(files, [&](const WorkloadFile& file) {
    if (model.output != "sentence_embedding" && kForEmbeddings.contains(file.workload)) return true;
    if (std::ranges::any_of(kForBudgets, [&](const auto& name) { return is_named(file.workload, name); })) return true;
    if (model.random_weights() && kForRealWeights.contains(file.workload)) return true;
    return file.workload.ends_with("shot");  // with solved examples in front
  });
  if (files.size() > 1) std::erase_if(files, [](const WorkloadFile& file) { return file.workload == kSample; });
}

/// Real data where both they and a sample of their kind are there, and an experiment is for them.
void keep_experiments(const Configuration& configuration, const ModelFile& model, std::vector<WorkloadFile>& files) {
  const Names names = names_of(files);
  std::erase_if(files, [&](const WorkloadFile& file) {
    const std::string kind = configuration.kind_of(file.workload);
    if (kind != file.workload && names.contains(kind)) return true;
    const bool probe = has_linear_probe(configuration.settings, file.workload, model);
    return configuration.experiments_for(model, file.workload, probe).empty();
  });
}

std::vector<ModelFile> all_models(const fs::path& folder) {
  std::vector<ModelFile> models;
  for (const std::string& name : model_names(folder)) models.push_back(read_model_file(folder / (name + ".pt")));
  std::erase_if(models, [](const ModelFile& m) { return m.tokenizer.empty() || m.tokenizer == kTinyTokenizer; });
  if (!models.empty()) return models;
  throw Failure(
      fmt::format("no full-size model in {}; export one (tools/models/export_models.py), or name one with --model",
                  folder.string()));
}

/// The model of that name, or the one at that path.
ModelFile chosen_model(const std::string& name, const Settings& settings) {
  const bool is_path = name.find('/') != std::string::npos || name.ends_with(".pt");
  const auto names = is_path ? std::vector<std::string>() : model_names(settings.models_folder);
  if (!is_path && std::ranges::find(names, name) == names.end()) {
    throw Failure(fmt::format("no model '{}' in {}; found: {}", name, settings.models_folder.string(),
                              joined({names.begin(), names.end()})));
  }
  fs::path path = is_path ? fs::path(name) : settings.models_folder / (name + ".pt");
  ModelFile model = read_model_file(path);
  if (model.tokenizer.empty()) model.tokenizer = settings.tokenizer;
  if (!model.tokenizer.empty()) return model;
  throw Failure(fmt::format("model {} has no sidecar {} that names its tokenizer; give --tokenizer NAME", name,
                            path.replace_extension(".json").string()));
}

/// Those of the names asked for, in their order.
std::vector<WorkloadFile> named(const Settings& settings, const std::vector<WorkloadFile>& files,
                                const ModelFile& model) {
  std::vector<WorkloadFile> wanted;
  for (const std::string& name : settings.workloads) {
    const auto before = wanted.size();
    std::ranges::copy_if(files, std::back_inserter(wanted), [&](const auto& f) { return is_named(f.workload, name); });
    if (wanted.size() > before || settings.models.empty()) continue;
    throw Failure(fmt::format("no workload '{}' for model {}: expected {}/{}.{}{}; found for that tokenizer: {}", name,
                              model.name, settings.data_folder.string(), name, model.tokenizer, kSuffix,
                              joined(names_of(files))));
  }
  return wanted;
}

/// Workloads for one tokenizer, in the order asked for.
std::vector<WorkloadFile> matching(const Configuration& configuration, const std::vector<WorkloadFile>& all,
                                   const ModelFile& model) {
  const Settings& settings = configuration.settings;
  std::vector<WorkloadFile> files;
  std::ranges::copy_if(all, std::back_inserter(files),
                       [&](const WorkloadFile& file) { return file.tokenizer == model.tokenizer; });
  if (!settings.workloads.empty()) files = named(settings, files, model);
  if (!configuration.experiments.empty()) {
    keep_experiments(configuration, model, files);
  } else if (settings.workloads.empty()) {
    keep_defaults(model, files);
    if (files.empty() && !settings.models.empty()) {
      throw Failure(fmt::format("model {} needs token files *.{}{}, and {} has none; prepare the data", model.name,
                                model.tokenizer, kSuffix, settings.data_folder.string()));
    }
  }
  return files;
}

std::shared_ptr<const TokenFile> read_tokens(const WorkloadFile& file, const Settings& settings) {
  TokenFile tokens = read_token_file(file.path);
  if (tokens.tokenizer != file.tokenizer || tokens.workload != file.workload) {
    throw Failure(
        fmt::format("{}: its metadata says workload '{}' and tokenizer '{}', unlike its name; prepare the data again",
                    file.path.string(), tokens.workload, tokens.tokenizer));
  }
  if (settings.batch) tokens = in_batches_of(std::move(tokens), *settings.batch);
  return std::make_shared<const TokenFile>(std::move(tokens));
}

}  // namespace

std::vector<WorkloadFile> workload_files(const fs::path& folder) {
  std::vector<WorkloadFile> files;
  for (const fs::path& path : files_in(folder, "data")) {
    const std::string name = path.filename().string();
    const auto dot = name.find('.');
    const std::string rest = dot == std::string::npos ? "" : name.substr(dot + 1);
    if (!rest.ends_with(kSuffix) || rest.ends_with(kProbeSuffix)) continue;
    files.push_back({name.substr(0, dot), rest.substr(0, rest.size() - kSuffix.size()), path});
  }
  return files;
}

std::vector<Selected> select(const Configuration& configuration) {
  const Settings& settings = configuration.settings;
  const std::vector<WorkloadFile> all = workload_files(settings.data_folder);
  for (const std::string& name : settings.workloads) {
    if (std::ranges::any_of(all, [&](const WorkloadFile& file) { return is_named(file.workload, name); })) continue;
    throw Failure(
        fmt::format("no workload '{}' in {}; found: {}", name, settings.data_folder.string(), joined(names_of(all))));
  }
  std::map<fs::path, std::shared_ptr<const TokenFile>> read;
  std::vector<Selected> selected;
  std::vector<ModelFile> models;
  for (const std::string& name : settings.models) models.push_back(chosen_model(name, settings));
  for (ModelFile& model : settings.models.empty() ? all_models(settings.models_folder) : std::move(models)) {
    Selected one{.model = std::move(model)};
    for (const WorkloadFile& file : matching(configuration, all, one.model)) {
      auto& tokens = read[file.path];
      if (!tokens) tokens = read_tokens(file, settings);
      if (one.model.vocabulary > 0) check_vocabulary(*tokens, one.model.vocabulary, file.path.string());
      const bool probe = has_linear_probe(settings, file.workload, one.model);
      auto experiments = configuration.experiments_for(one.model, file.workload, probe);
      if (configuration.experiments.empty()) experiments = {{settings, default_share(one.model, *tokens, probe)}};
      for (Experiment& experiment : experiments) one.experiments.push_back({std::move(experiment), tokens});
    }
    if (!one.experiments.empty()) selected.push_back(std::move(one));
  }
  if (!selected.empty()) return selected;
  throw Failure(fmt::format("no token file in {} fits a model in {}; found: {}; prepare the data",
                            settings.data_folder.string(), settings.models_folder.string(), joined(names_of(all))));
}

double default_share(const ModelFile& model, const TokenFile& tokens, bool linear_probe) {
  constexpr double kSpeedOnly = 0.5;
  if (model.random_weights() || tokens.task == Task::kNone) return kSpeedOnly;
  if (tokens.task == Task::kClassification) return linear_probe ? 12 : kSpeedOnly;
  return tokens.task == Task::kDuplicates || !tokens.scored.empty() ? 2 : 1;
}

double seconds_per_share(const Configuration& configuration, double shares) {
  constexpr double kMostSeconds = 30;
  constexpr double kSecondsInAll = 360;  // loading and wrapping all models comes on top
  if (configuration.settings.limit) return std::numeric_limits<double>::infinity();
  if (configuration.seconds_in_all) return *configuration.seconds_in_all / shares;
  return std::min(kMostSeconds, kSecondsInAll / shares);
}

std::string list_files(const Settings& settings) {
  Table models({"model", "weights", "tokenizer", "dtype", "max tokens"}, 4);
  for (const std::string& name : model_names(settings.models_folder)) {
    try {
      const ModelFile model = read_model_file(settings.models_folder / (name + ".pt"));
      models.add({name, model.weights, model.tokenizer.empty() ? "unknown" : model.tokenizer, model.dtype,
                  fmt::format("{}", model.max_tokens)});
    } catch (const Failure& failure) {
      models.add({name, failure.what()});
    }
  }
  Table workloads({"workload", "tokenizer", "source", "order", "task", "fill", "requests", "sequences", "tokens"}, 5);
  for (const WorkloadFile& file : workload_files(settings.data_folder)) {
    try {
      const TokenFile tokens = read_token_file(file.path);
      workloads.add({file.workload, file.tokenizer, tokens.source, tokens.order, to_string(tokens.task),
                     fmt::format("{}", tokens.fill_requests), fmt::format("{}", tokens.requests()),
                     fmt::format("{}", tokens.sequences()), fmt::format("{}", tokens.tokens.size())});
    } catch (const Failure& failure) {
      workloads.add({file.workload, file.tokenizer, failure.what()});
    }
  }
  return fmt::format("{}\n{}", models.text(), workloads.text());
}

std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::mt19937_64 generator(seed);  // its sequence is fixed by the standard, unlike the distributions
  const auto below = [&](std::uint64_t bound) {
    const std::uint64_t limit = std::numeric_limits<std::uint64_t>::max() / bound * bound;
    std::uint64_t value = generator();
    while (value >= limit) value = generator();
    return value % bound;
  };
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[below(i)]);
  return order;
}

Stream make_stream(const TokenFile& file, const StreamOptions& options) {
  Stream stream{.requests = {}, .shuffle = options.shuffle};
  if (!stream.shuffle && file.grouped_by_label()) stream.shuffle = 0;

  std::int64_t asking = file.requests() - file.fill_requests;
  // The same requests in the order of the file and in another one, unless the file's order would choose among labels.
  if (options.limit && !file.grouped_by_label()) asking = std::min(asking, *options.limit);
  auto& order = stream.requests;
  order.resize(static_cast<std::size_t>(asking));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  if (stream.shuffle) order = shuffled(asking, *stream.shuffle);
  for (std::int64_t& request : order) request += file.fill_requests;
  if (options.limit && *options.limit < asking) order.resize(static_cast<std::size_t>(*options.limit));
  return stream;
}

}  // namespace llmcache::bench
