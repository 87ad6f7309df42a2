// Calibration profiles on disk: PATH holds JSON, PATH.safetensors the tensors that it names.
#include "refresh/profile_file.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "llmcache/error.h"
#include "llmcache/refresh/calibration.h"
#include "refresh/exit_model.h"
#include "refresh/profile_check.h"
#include "refresh/profile_text.h"
#include "refusal.h"
#include "store/bounded_file.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

using OrderedJson = nlohmann::ordered_json;
namespace fs = std::filesystem;

fs::path tensors_path(const fs::path& path) { return path.string() + ".safetensors"; }

/// The tensors of a model under their names, in one fixed order.
template <class Model, class Visit>
void for_each_exit_tensor(Model& model, const Visit& visit) {
  visit("outputs", model.outputs);
  visit("decisions", model.decisions);
  visit("mean_output", model.mean_output);
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    auto& layer = model.layers[l];
    const auto name = [&](const char* what) { return exit_tensor_name(l, what); };
    visit(name("centre"), layer.centre);
    visit(name("states"), layer.states);
    visit(name("lengths"), layer.lengths);
    visit(name("projection"), layer.projection);
    visit(name("projected"), layer.projected);
    visit(name("translator"), layer.translator);
  }
}

/// The safetensors format: length of the header, header, values in the header's order.
std::string packed(const ExitModel& model) {
  OrderedJson header;
  std::string values;
  for_each_exit_tensor(model, [&](const std::string& name, const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const auto own = tensor.to(at::kCPU).contiguous();
    const std::size_t begin = values.size();
    if (own.nbytes() > 0) values.append(static_cast<const char*>(own.const_data_ptr()), own.nbytes());
    header[name] = {{"dtype", own.scalar_type() == at::kLong ? "I64" : "F32"},
                    {"shape", own.sizes().vec()},
                    {"data_offsets", {begin, values.size()}}};
  });
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t length = text.size();
  std::string all(sizeof(length), '\0');
  std::memcpy(all.data(), &length, sizeof(length));
  return all + text + values;
}

void unpack(const Safetensors& file, ExitModel& model) {
  for_each_exit_tensor(model, [&](const std::string& name, at::Tensor& tensor) {
    if (!file.has(name)) return;
    const Safetensors::Tensor& stored = file.tensors().at(name);
    tensor = at::empty(stored.shape, stored.dtype == "I64" ? at::kLong : at::kFloat);
    if (!stored.bytes.empty()) std::memcpy(tensor.data_ptr(), stored.bytes.data(), stored.bytes.size());
  });
}

/// Runs a reader; what it finds wrong is told of `path`.
template <class Read>
auto reading(const fs::path& path, const Read& read) {
  try {
    return read();
  } catch (const UnreadableFile& error) {
    refuse_file(fmt::format("calibration profile '{}' cannot be read ({}); calibrate, and save it there", path.string(),
                            error.what()));
  } catch (const DamagedData& error) {
    refuse_file(fmt::format("calibration profile '{}' is damaged: {}; calibrate again", path.string(), error.what()));
  } catch (const ForeignProfile& error) {
    refuse_file(fmt::format("'{}' {}", path.string(), error.what()));
  }
}

/// Written beside it first, so that nobody ever sees half a file.
void write(const fs::path& path, const std::string& bytes) {
  const fs::path beside = path.string() + ".part";
  std::ofstream file(beside, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  std::error_code error;
  if (file) fs::rename(beside, path, error);
  if (!file || error) {
    std::error_code ignored;
    fs::remove(beside, ignored);
    refuse_file(fmt::format("calibration profile '{}' cannot be written", path.string()));
  }
}

OrderedJson gate_json(const LogisticModel& gate) {
  return {{"means", gate.means}, {"scales", gate.scales}, {"weights", gate.weights}, {"intercept", gate.intercept}};
}

OrderedJson choice_json(const ReuseChoice& choice) {
  OrderedJson json = {{"format", to_string(choice.format)},
                      {"mechanism", choice.mechanism},
                      {"setting", choice.setting},
                      {"limit", choice.match_threshold},
                      {"fitted", choice.fitted},
                      {"certified", choice.certified},
                      {"error", choice.error},
                      {"bound", choice.bound},
                      {"computed", choice.computed},
                      {"typical_distance", choice.typical_distance}};
  if (choice.epsilon > 0) json["epsilon"] = choice.epsilon;
  if (choice.least_tokens > 0) json["least_tokens"] = choice.least_tokens;
  return json;
}

OrderedJson verified_json(const VerifiedEnvelope& verified) {
  return {
      {"tokens", verified.tokens}, {"rows", verified.rows}, {"padding", verified.padding}, {"codes", verified.codes}};
}

/// Both have been checked.
std::shared_ptr<const ExitModel> exit_model(const Safetensors& tensors, const ProfileText& text) {
  auto model = std::make_shared<ExitModel>();
  model->metric = text.profile.budget.metric;
  model->cache_free = text.cache_free();
  model->typical_distance = text.profile.typical_distance;
  model->thresholds = text.exit->thresholds;
  for (const LogisticModel& gate : text.exit->gates) model->layers.emplace_back().gate = gate;
  unpack(tensors, *model);
  return model;
}

/// Of a profile whose text has been read.
void take_exit_tensors(ProfileText& text, std::string_view content) {
  if (text.exit->tensors_xxh3 != content_hash(content)) throw DamagedData("its content was changed or cut off");
  const Safetensors tensors(content);
  check_exit_tensors(tensors, text);
  text.profile.exit = exit_model(tensors, text);
}

}  // namespace

ProfileBytes profile_bytes(const CalibrationProfile& profile) {
  const Budget& budget = profile.budget;
  ProfileBytes files;
  OrderedJson json = {
      {"format", kProfileFormat},
      {"version", kProfileVersion},
      {"budget", {{"metric", to_string(budget.metric)}, {"epsilon", budget.epsilon}, {"delta", budget.delta}}},
      {"early_exit", to_string(profile.early_exit)},
      {"model", profile.model_digest},
      {"fitted", profile.fitted},
      {"certified", profile.certified},
      {"certified_error", profile.certified_error},
      {"reason", profile.reason},
      {"error_bound", profile.error_bound},
      {"expected_share", profile.expected_share},
      {"expected_exits", profile.expected_exits},
      {"typical_distance", profile.typical_distance},
      {"bytes", profile.bytes}};
  if (profile.exit) {
    files.tensors = packed(*profile.exit);
    OrderedJson gates = OrderedJson::array();
    for (const ExitLayer& layer : profile.exit->layers) gates.push_back(gate_json(layer.gate));
    json["exit"] = {{"tensors_xxh3", content_hash(files.tensors)},
                    {"thresholds", profile.exit->thresholds},
                    {"gates", std::move(gates)}};
  }
  if (profile.exit_below > 0) json["exit_below"] = profile.exit_below;
  if (profile.reuse) json["reuse"] = choice_json(*profile.reuse);
  if (!profile.verified.codes.empty()) json["verified"] = verified_json(profile.verified);
  json["content_xxh3"] = content_hash(json.dump());  // the last member: what is in front of it is what was hashed
  files.json = json.dump(2) + "\n";
  return files;
}

CalibrationProfile profile_of(std::string_view json, std::string_view tensors) {
  ProfileText text = parse_profile(json);
  if (text.exit) take_exit_tensors(text, tensors);
  check_numbers(text.profile);
  return std::move(text.profile);
}

void CalibrationProfile::save(const fs::path& path) const {
  const ProfileBytes files = profile_bytes(*this);
  if (exit) write(tensors_path(path), files.tensors);
  write(path, files.json);
}

CalibrationProfile CalibrationProfile::load(const fs::path& path) {
  ProfileText text = reading(path, [&] { return parse_profile(read_bounded_file(path, kMostProfileBytes)); });
  if (text.exit) {
    const fs::path beside = tensors_path(path);
    reading(beside, [&] { take_exit_tensors(text, read_bounded_file(beside, text.most_tensor_bytes())); });
  }
  check_numbers(text.profile);
  return std::move(text.profile);
}

}  // namespace llmcache
