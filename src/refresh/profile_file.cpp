// Calibration profiles on disk: PATH holds JSON, PATH.safetensors the tensors that it names.
#include <ATen/ATen.h>
#include <fmt/core.h>
#include <xxhash.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "llmcache/error.h"
#include "llmcache/refresh/calibration.h"
#include "refresh/exit_model.h"
#include "refresh/profile_check.h"

namespace llmcache {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;
constexpr int kVersion = 2;
constexpr const char* kFormat = "llmcache calibration";
constexpr std::uint64_t kLargestHeader = 100 << 20;
constexpr std::size_t kMostCodes = 4096;  // of VerifiedEnvelope

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidOptions, message); }

[[noreturn]] void damaged(const fs::path& path, const std::string& what) {
  refuse(fmt::format("calibration profile '{}' is damaged: {}; calibrate again", path.string(), what));
}

fs::path tensors_of(const fs::path& path) { return path.string() + ".safetensors"; }

/// The tensors of a model under their names, in one fixed order.
template <class Model, class Visit>
void for_each_tensor(Model& model, const Visit& visit) {
  visit("outputs", model.outputs);
  visit("decisions", model.decisions);
  visit("mean_output", model.mean_output);
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    auto& layer = model.layers[l];
    const auto name = [&](const char* what) { return fmt::format("layers.{}.{}", l, what); };
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
  Json header;
  std::string values;
  for_each_tensor(model, [&](const std::string& name, const at::Tensor& tensor) {
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

void unpack(const fs::path& path, const std::string& bytes, ExitModel& model) {
  std::uint64_t length = 0;
  if (bytes.size() < sizeof(length)) damaged(path, "it is cut off");
  std::memcpy(&length, bytes.data(), sizeof(length));
  if (length > kLargestHeader || length > bytes.size() - sizeof(length)) damaged(path, "its header is cut off");
  const auto header = Json::parse(bytes.substr(sizeof(length), length));
  const char* values = bytes.data() + sizeof(length) + length;
  const std::size_t size = bytes.size() - sizeof(length) - length;
  for_each_tensor(model, [&](const std::string& name, at::Tensor& tensor) {
    if (!header.contains(name)) return;
    const Json& entry = header.at(name);
    const auto type = entry.at("dtype") == "I64" ? at::kLong : at::kFloat;
    const auto shape = entry.at("shape").get<std::vector<std::int64_t>>();
    const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
    const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
    std::size_t expected = type == at::kLong ? 8 : 4;
    for (const std::int64_t n : shape) {
      if (n < 0 || (n > 0 && expected > size / static_cast<std::size_t>(n)))
        damaged(path, "'" + name + "' has no shape");
      expected *= static_cast<std::size_t>(n);
    }
    if (begin > end || end > size || end - begin != expected) damaged(path, "'" + name + "' is cut off");
    tensor = at::empty(shape, at::TensorOptions().dtype(type));
    if (expected > 0) std::memcpy(tensor.data_ptr(), values + begin, expected);
  });
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    refuse(fmt::format("calibration profile '{}' cannot be read; calibrate, and save it there", path.string()));
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return std::move(bytes).str();
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
    refuse(fmt::format("calibration profile '{}' cannot be written", path.string()));
  }
}

std::string hash_of(const std::string& bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

Json gate_json(const LogisticModel& gate) {
  return {{"means", gate.means}, {"scales", gate.scales}, {"weights", gate.weights}, {"intercept", gate.intercept}};
}

LogisticModel gate_of(const Json& json) {
  LogisticModel gate;
  json.at("means").get_to(gate.means);
  json.at("scales").get_to(gate.scales);
  json.at("weights").get_to(gate.weights);
  json.at("intercept").get_to(gate.intercept);
  return gate;
}

/// Throws if tensors do not fit each other.
void check(const fs::path& path, const ExitModel& model) {
  const auto is = [](const at::Tensor& tensor, std::initializer_list<std::int64_t> shape) {
    return tensor.defined() && tensor.sizes() == at::IntArrayRef(shape);
  };
  const auto fail = [&] { damaged(path, "its tensors do not fit each other"); };
  if (!model.outputs.defined() || model.outputs.dim() != 2 || model.layers.empty()) fail();
  const auto entries = model.outputs.size(0);
  const auto values = model.outputs.size(1);
  if (!is(model.decisions, {entries}) || !is(model.mean_output, {values})) fail();
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const ExitLayer& layer = model.layers[l];
    if (!layer.used()) {
      for (const auto& thresholds : model.thresholds) {
        if (thresholds.size() != model.layers.size() || thresholds[l] >= 0) fail();
      }
      continue;
    }
    if (layer.centre.dim() != 1) fail();
    const auto hidden = layer.centre.size(0);
    if (!is(layer.translator, {hidden, values})) fail();
    if (!model.cache_free &&
        (!is(layer.states, {entries, hidden}) || !is(layer.lengths, {entries}) || entries < ExitModel::kLeastEntries)) {
      fail();
    }
    if (layer.projected.defined() && (!layer.projection.defined() || layer.projection.dim() != 2 ||
                                      !is(layer.projection, {hidden, layer.projection.size(1)}) ||
                                      !is(layer.projected, {entries, layer.projection.size(1)}))) {
      fail();
    }
    const auto width = layer.gate.weights.size();
    if (width != model.features() || layer.gate.means.size() != width || layer.gate.scales.size() != width) fail();
  }
  for (const auto& thresholds : model.thresholds) {
    if (thresholds.size() != model.layers.size()) fail();
  }
  if (model.thresholds.empty()) fail();
}

/// What a profile has as plain numbers and texts, by its name in the file.
template <class Profile, class Visit>
void for_each_field(Profile& profile, const Visit& visit) {
  visit("model", profile.model_digest);
  visit("fitted", profile.fitted);
  visit("certified", profile.certified);
  visit("certified_error", profile.certified_error);
  visit("error_bound", profile.error_bound);
  visit("expected_share", profile.expected_share);
  visit("expected_exits", profile.expected_exits);
  visit("typical_distance", profile.typical_distance);
  visit("bytes", profile.bytes);
}

/// The same of a ReuseChoice.
template <class Choice, class Visit>
void for_each_field_of_choice(Choice& choice, const Visit& visit) {
  visit("mechanism", choice.mechanism);
  visit("setting", choice.setting);
  visit("limit", choice.limit);
  visit("fitted", choice.fitted);
  visit("certified", choice.certified);
  visit("error", choice.error);
  visit("bound", choice.bound);
  visit("computed", choice.computed);
  visit("typical_distance", choice.typical_distance);
}

auto into(Json& json) {
  return [&json](const char* name, const auto& value) { json[name] = value; };
}

auto from(const Json& json) {
  return [&json](const char* name, auto& value) { json.at(name).get_to(value); };
}

}  // namespace

void CalibrationProfile::save(const fs::path& path) const {
  Json json = {{"format", kFormat},
               {"version", kVersion},
               {"budget",
                {{"metric", llmcache::to_string(budget.metric)}, {"epsilon", budget.epsilon}, {"delta", budget.delta}}},
               {"early_exit", llmcache::to_string(early_exit)}};
  for_each_field(*this, into(json));
  if (exit) {
    const std::string tensors = packed(*exit);
    Json gates = Json::array();
    for (const ExitLayer& layer : exit->layers) gates.push_back(gate_json(layer.gate));
    json["exit"] = {{"tensors_xxh3", hash_of(tensors)}, {"thresholds", exit->thresholds}, {"gates", std::move(gates)}};
    write(tensors_of(path), tensors);
  }
  if (reuse) {
    Json& part = json["reuse"];
    part["format"] = llmcache::to_string(reuse->format);
    for_each_field_of_choice(*reuse, into(part));
  }
  if (!verified.codes.empty()) {
    json["verified"] = {
        {"tokens", verified.tokens}, {"rows", verified.rows}, {"padding", verified.padding}, {"codes", verified.codes}};
  }
  json["content_xxh3"] = hash_of(json.dump());
  write(path, json.dump(2) + "\n");
}

CalibrationProfile CalibrationProfile::load(const fs::path& path) {
  const std::string text = read(path);
  CalibrationProfile profile;
  try {
    Json json = Json::parse(text);
    if (json.value("format", "") != kFormat) {
      refuse(fmt::format("'{}' is no calibration profile", path.string()));
    }
    if (json.value("version", 0) != kVersion) {
      refuse(fmt::format("calibration profile '{}' has version {}; this library reads version {}: calibrate again",
                         path.string(), json.value("version", 0), kVersion));
    }
    const std::string claimed = json.value("content_xxh3", "");
    json.erase("content_xxh3");
    if (claimed != hash_of(json.dump())) damaged(path, "its content was changed");
    const Json& promise = json.at("budget");
    profile.budget = {budget_metric_from_string(promise.at("metric")), promise.at("epsilon"), promise.at("delta")};
    profile.budget.validate();
    profile.early_exit = early_exit_from_string(json.at("early_exit"));
    for_each_field(profile, from(json));
    if (json.contains("reuse")) {
      const Json& part = json.at("reuse");
      ReuseChoice& choice = profile.reuse.emplace();
      choice.format = bank_format_from_string(part.at("format"));
      for_each_field_of_choice(choice, from(part));
    }
    if (json.contains("verified")) {
      const Json& part = json.at("verified");
      if (part.at("codes").size() > kMostCodes) damaged(path, "it has too many codes of what was verified");
      profile.verified = {part.at("tokens"), part.at("rows"), part.at("padding"), part.at("codes")};
    }
    if (json.contains("exit")) {
      const Json& part = json.at("exit");
      auto model = std::make_shared<ExitModel>();
      model->metric = profile.budget.metric;
      model->cache_free = profile.early_exit == EarlyExit::kCacheFree;
      model->typical_distance = profile.typical_distance;
      part.at("thresholds").get_to(model->thresholds);
      for (const Json& gate : part.at("gates")) model->layers.emplace_back().gate = gate_of(gate);
      const std::string tensors = read(tensors_of(path));
      if (part.at("tensors_xxh3") != hash_of(tensors)) damaged(tensors_of(path), "its content was changed or cut off");
      unpack(tensors_of(path), tensors, *model);
      check(tensors_of(path), *model);
      profile.exit = std::move(model);
    }
  } catch (const nlohmann::json::exception& error) {
    damaged(path, error.what());
  }
  check_numbers(profile);
  return profile;
}

}  // namespace llmcache
