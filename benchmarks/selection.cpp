#include "selection.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>
#include <system_error>

#include "failure.h"
#include "first_run.h"
#include "probe.h"
#include "table.h"

namespace llmcache::bench {
namespace {

namespace fs = std::filesystem;
constexpr const char* kTinyTokenizer = "tiny";  // of models that tests use; no text is made for it
constexpr const char* kSample = "sample";
/// Made for sentence embeddings: other models run them only if asked to, so that their time goes to what tells more.
const std::set<std::string> kForEmbeddings = {"clinc150", "qqp", "stsb"};
/// Made for reuse within an error budget: they run only if asked for.
const std::vector<std::string> kForBudgets = {"agnews",   "chat-edit", "clinc150-in-scope", "edits",
                                              "instruct", "passages",  "small-edits",       "sst2"};
/// Long, and no more telling with random weights than generate-128: such models run them only if asked to.
const std::set<std::string> kForRealWeights = {"chat", "generate-512"};
constexpr const char* kSuffix = ".safetensors";
constexpr const char* kProbeSuffix = ".probe.safetensors";  // no token files, see probe.h

std::string joined(const std::set<std::string>& names) {
  return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
}

bool is_path(const std::string& model) { return model.find('/') != std::string::npos || model.ends_with(".pt"); }

/// True if `workload` is the one called `name`, or is it with a number behind it: "generate" means "generate-128" too.
bool is_named(const std::string& workload, const std::string& name) {
  if (!workload.starts_with(name)) return false;
  const std::string rest = workload.substr(name.size());
  return rest.empty() ||
         (rest.size() > 1 && rest[0] == '-' && rest.find_first_not_of("0123456789", 1) == std::string::npos);
}

/// "-5shot" of "openbookqa-5shot" and the like, which run only if they are named or --shots asks; else nothing.
std::string shots_of(const std::string& workload) {
  const auto dash = workload.rfind('-');
  if (dash == std::string::npos || !workload.ends_with("shot")) return {};
  const std::string number = workload.substr(dash + 1, workload.size() - 4 - dash - 1);
  return number.find_first_not_of("0123456789") == std::string::npos ? workload.substr(dash) : std::string();
}

/// What runs if no workload is named, of the files for the model's tokenizer.
void keep_defaults(const Arguments& arguments, const ModelFile& model, std::vector<WorkloadFile>& files) {
  const std::string shots = arguments.shots > 0 ? fmt::format("-{}shot", arguments.shots) : "";
  std::set<std::string> names;
  for (const WorkloadFile& file : files) names.insert(file.workload);
  std::erase_if(files, [&](const WorkloadFile& file) {
    if (model.output != "sentence_embedding" && kForEmbeddings.contains(file.workload)) return true;
    const auto named = [&](const std::string& name) { return is_named(file.workload, name); };
    if (std::any_of(kForBudgets.begin(), kForBudgets.end(), named)) return true;
    if (model.random_weights() && kForRealWeights.contains(file.workload)) return true;
    if (!shots.empty() && names.contains(file.workload + shots)) return true;
    return !shots_of(file.workload).empty() && shots_of(file.workload) != shots;
  });
  if (files.size() > 1) std::erase_if(files, [](const WorkloadFile& file) { return file.workload == kSample; });
}

/// What a run without options measures: real data where both they and a sample of their kind are there.
void keep_first_run(const Arguments& arguments, const ModelFile& model, std::vector<WorkloadFile>& files) {
  std::set<std::string> names;
  for (const WorkloadFile& file : files) names.insert(file.workload);
  std::erase_if(files, [&](const WorkloadFile& file) {
    const std::string kind = kind_of(file.workload);
    if (kind != file.workload && names.contains(kind)) return true;
    std::error_code error;
    const bool probe = fs::exists(probe_path(arguments.data_folder, file.workload, model.name), error);
    return first_run(arguments, model, file.workload, probe).empty();
  });
}

std::vector<ModelFile> chosen_models(const Arguments& arguments) {
  std::vector<ModelFile> models;
  const auto add = [&](const fs::path& path) {
    ModelFile model = read_model_file(path);
    if (model.tokenizer.empty()) model.tokenizer = arguments.tokenizer;
    models.push_back(std::move(model));
  };
  const auto in_folder = [&](const std::string& name) { return arguments.models_folder / (name + ".pt"); };
  if (arguments.models.empty()) {
    for (const std::string& name : model_names(arguments.models_folder)) {
      add(in_folder(name));
      if (models.back().tokenizer.empty() || models.back().tokenizer == kTinyTokenizer) models.pop_back();
    }
    if (models.empty()) {
      throw Failure(
          fmt::format("no full-size model in {}; export one (tools/export_models.py), or name one with "
                      "--model",
                      arguments.models_folder.string()));
    }
    return models;
  }
  for (const std::string& name : arguments.models) {
    if (is_path(name)) {
      add(name);
    } else {
      const auto names = model_names(arguments.models_folder);
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        throw Failure(fmt::format("no model '{}' in {}; found: {}", name, arguments.models_folder.string(),
                                  joined({names.begin(), names.end()})));
      }
      add(in_folder(name));
    }
    if (models.back().tokenizer.empty()) {
      throw Failure(fmt::format("model {} has no sidecar {}.json that names its tokenizer; give --tokenizer NAME", name,
                                fs::path(models.back().path).replace_extension().string()));
    }
  }
  return models;
}

/// Workloads for one tokenizer, in the order asked for.
std::vector<WorkloadFile> matching(const Arguments& arguments, const std::vector<WorkloadFile>& all,
                                   const ModelFile& model) {
  std::vector<WorkloadFile> fitting;
  std::copy_if(all.begin(), all.end(), std::back_inserter(fitting),
               [&](const WorkloadFile& file) { return file.tokenizer == model.tokenizer; });
  if (arguments.first_run) {
    keep_first_run(arguments, model, fitting);
    return fitting;
  }
  if (arguments.workloads.empty()) {
    keep_defaults(arguments, model, fitting);
    if (fitting.empty() && !arguments.models.empty()) {
      throw Failure(fmt::format("model {} needs token files *.{}{}, and {} has none; prepare the data", model.name,
                                model.tokenizer, kSuffix, arguments.data_folder.string()));
    }
    return fitting;
  }
  std::vector<WorkloadFile> wanted;
  for (const std::string& name : arguments.workloads) {
    const auto before = wanted.size();
    std::copy_if(fitting.begin(), fitting.end(), std::back_inserter(wanted),
                 [&](const WorkloadFile& file) { return is_named(file.workload, name); });
    if (wanted.size() > before) continue;
    if (!arguments.models.empty()) {
      std::set<std::string> names;
      for (const WorkloadFile& file : fitting) names.insert(file.workload);
      throw Failure(fmt::format("no workload '{}' for model {}: expected {}/{}.{}{}; found for that tokenizer: {}",
                                name, model.name, arguments.data_folder.string(), name, model.tokenizer, kSuffix,
                                joined(names)));
    }
  }
  return wanted;
}

}  // namespace

std::vector<WorkloadFile> workload_files(const fs::path& folder) {
  std::error_code error;
  std::vector<WorkloadFile> files;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const auto dot = name.find('.');
    const std::string rest = dot == std::string::npos ? "" : name.substr(dot + 1);
    if (!rest.ends_with(kSuffix) || rest.ends_with(kProbeSuffix)) continue;
    files.push_back({name.substr(0, dot), rest.substr(0, rest.size() - std::string(kSuffix).size()), entry->path()});
  }
  if (error) {
    throw Failure(fmt::format("data folder {}: {}; prepare the data there, or name another with --data",
                              folder.string(), error.message()));
  }
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.path < b.path; });
  return files;
}

std::vector<Selected> select(const Arguments& arguments) {
  const std::vector<WorkloadFile> all = workload_files(arguments.data_folder);
  for (const std::string& name : arguments.workloads) {
    std::set<std::string> names;
    for (const WorkloadFile& file : all) names.insert(file.workload);
    if (std::none_of(names.begin(), names.end(), [&](const auto& known) { return is_named(known, name); })) {
      throw Failure(
          fmt::format("no workload '{}' in {}; found: {}", name, arguments.data_folder.string(), joined(names)));
    }
  }
  std::map<fs::path, std::shared_ptr<const TokenFile>> read;
  std::vector<Selected> selected;
  for (ModelFile& model : chosen_models(arguments)) {
    Selected one{.model = std::move(model), .workloads = {}};
    for (const WorkloadFile& file : matching(arguments, all, one.model)) {
      auto& tokens = read[file.path];
      if (!tokens) {
        TokenFile own = read_token_file(file.path);
        tokens = std::make_shared<const TokenFile>(arguments.batch ? in_batches_of(std::move(own), *arguments.batch)
                                                                   : std::move(own));
      }
      if (tokens->tokenizer != one.model.tokenizer || tokens->workload != file.workload) {
        throw Failure(
            fmt::format("{}: its metadata says workload '{}' and tokenizer '{}', unlike its name; prepare "
                        "the data again",
                        file.path.string(), tokens->workload, tokens->tokenizer));
      }
      if (one.model.vocabulary > 0) check_vocabulary(*tokens, one.model.vocabulary, file.path.string());
      one.workloads.push_back(tokens);
    }
    if (!one.workloads.empty()) selected.push_back(std::move(one));
  }
  if (selected.empty()) {
    std::set<std::string> names;
    for (const WorkloadFile& file : all) names.insert(file.path.filename().string());
    throw Failure(fmt::format("no token file in {} fits a model in {}; found: {}; prepare the data",
                              arguments.data_folder.string(), arguments.models_folder.string(), joined(names)));
  }
  return selected;
}

std::string list_files(const Arguments& arguments) {
  Table models({"model", "weights", "tokenizer", "dtype", "max tokens"}, 4);
  for (const std::string& name : model_names(arguments.models_folder)) {
    try {
      const ModelFile model = read_model_file(arguments.models_folder / (name + ".pt"));
      models.add({name, model.weights, model.tokenizer.empty() ? "unknown" : model.tokenizer, model.dtype,
                  fmt::format("{}", model.max_tokens)});
    } catch (const Failure& failure) {
      models.add({name, failure.what(), "", "", ""});
    }
  }
  Table workloads({"workload", "tokenizer", "source", "order", "task", "fill", "requests", "sequences", "tokens"}, 5);
  for (const WorkloadFile& file : workload_files(arguments.data_folder)) {
    try {
      const TokenFile tokens = read_token_file(file.path);
      workloads.add({file.workload, file.tokenizer, tokens.source, tokens.order, to_string(tokens.task),
                     fmt::format("{}", tokens.fill_requests), fmt::format("{}", tokens.requests()),
                     fmt::format("{}", tokens.sequences()), fmt::format("{}", tokens.tokens.size())});
    } catch (const Failure& failure) {
      workloads.add({file.workload, file.tokenizer, failure.what(), "", "", "", "", "", ""});
    }
  }
  return fmt::format("{}\n{}", models.text(), workloads.text());
}

}  // namespace llmcache::bench
