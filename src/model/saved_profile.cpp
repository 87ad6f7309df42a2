#include "model/saved_profile.h"

#include <ATen/Version.h>
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <torch/version.h>
#include <unistd.h>
#include <xxhash.h>

#include <atomic>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "llmcache/version.h"
#include "model/numeric_state.h"
#include "refresh/verified_json.h"
#include "store/bounded_file.h"
#include "store/bounded_json.h"

namespace llmcache {
namespace {

using Json = nlohmann::json;  // its keys are in order, so that the same content is the same text
namespace fs = std::filesystem;

constexpr const char* kFormat = "llmcache model profile";
constexpr const char* kHash = "content_xxh3";
constexpr std::size_t kMostSavedBytes = std::size_t{16} << 20;
constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();

std::string text_of(const NumericState& state) {
  return fmt::format("autocast {}, default type {}, deterministic {}, precision {}, onednn {}",
                     state.autocast ? c10::toString(state.autocast_type) : "off", c10::toString(state.default_type),
                     state.deterministic, state.matmul_precision, state.onednn);
}

std::string text_of(const std::vector<std::vector<std::int64_t>>& sample) {
  if (sample.empty()) return "none";
  std::string ids;
  for (const auto& text : sample) ids += fmt::format("{};", fmt::join(text, ","));
  return fmt::format("{} texts, {:016x}", sample.size(), XXH3_64bits(ids.data(), ids.size()));
}

std::map<std::string, std::string> conditions_of(const Options& options, at::Device device) {
  return {{"library", LLMCACHE_VERSION},
          {"torch", TORCH_VERSION},
          {"cpu", at::get_cpu_capability()},
          {"device", device.str()},
          {"numbers", text_of(numeric_state(device))},
          {"weights", to_string(options.weights)},
          {"fastest_may_be_int8", options.fastest_may_be_int8 ? "yes" : "no"},
          {"weights_sample", text_of(options.weights_sample)},
          {"layers", options.layers},
          {"mask_argument", options.mask_argument ? std::to_string(*options.mask_argument) : "to be found"}};
}

/// Bytes that are no UTF-8, in a note or an option, are replaced.
std::string dumped(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string hash_of_json(const Json& json) {
  const std::string text = dumped(json);
  return fmt::format("{:016x}", XXH3_64bits(text.data(), text.size()));
}

Json json_of(const VerifiedEnvelope& verified) {
  return {
      {"tokens", verified.tokens}, {"rows", verified.rows}, {"padding", verified.padding}, {"codes", verified.codes}};
}

Json json_of(const ModelProfile& profile) {
  return {{"mask_argument", profile.mask_argument},
          {"source_mask_argument", profile.source_mask_argument},
          {"max_tokens", profile.max_tokens},
          {"max_source_tokens", profile.max_source_tokens},
          {"causal", profile.causal},
          {"head_tokenwise", profile.head_tokenwise},
          {"rows_independent", profile.rows_independent},
          {"per_row_output", profile.per_row_output},
          {"granularity", static_cast<int>(profile.granularity)},
          {"prefix_reuse", profile.prefix_reuse},
          {"source_reuse", profile.source_reuse},
          {"left_padding", profile.left_padding},
          {"prefix_obstacle", profile.prefix_obstacle},
          {"notes", profile.notes},
          {"verified", json_of(profile.verified)}};
}

Json json_of(const OutputSpec& output) {
  Json leaves = Json::array();
  for (const TokenDims& dims : output.leaves) leaves.push_back({dims.batch, dims.tokens, dims.merged});
  return {{"per_row", output.per_row}, {"leaves", std::move(leaves)}};
}

Json json_of(const GraphFindings& graph) {
  Json answers = Json::array();
  for (const bool answer : graph.answers) answers.push_back(answer ? 1 : 0);
  Json source = Json::array();
  for (const bool own : graph.source) source.push_back(own ? 1 : 0);
  Json json = {{"structure", graph.structure},
               {"chain", graph.chain},
               {"source", std::move(source)},
               {"max_tokens", graph.max_tokens},
               {"max_source_tokens", graph.max_source_tokens},
               {"values", graph.values},
               {"answers", std::move(answers)}};
  if (graph.result) json["result"] = *graph.result;
  return json;
}

ModelProfile probed_of(const JsonObject& json) {
  ModelProfile profile;
  profile.mask_argument = static_cast<int>(json.whole("mask_argument", -1, std::numeric_limits<int>::max()));
  profile.source_mask_argument =
      static_cast<int>(json.whole("source_mask_argument", -1, std::numeric_limits<int>::max()));
  profile.max_tokens = json.whole("max_tokens");
  profile.max_source_tokens = json.whole("max_source_tokens");
  profile.causal = json.flag("causal");
  profile.head_tokenwise = json.flag("head_tokenwise");
  profile.rows_independent = json.flag("rows_independent");
  profile.per_row_output = json.flag("per_row_output");
  profile.granularity =
      static_cast<Granularity>(json.whole("granularity", 0, static_cast<std::int64_t>(Granularity::kTokens)));
  profile.prefix_reuse = json.flag("prefix_reuse");
  profile.source_reuse = json.flag("source_reuse");
  profile.left_padding = json.flag("left_padding");
  profile.prefix_obstacle = json.text("prefix_obstacle");
  profile.notes = json.texts("notes");
  profile.verified = read_verified(json.object("verified"));
  return profile;
}

OutputSpec output_of(const JsonObject& json) {
  OutputSpec output;
  output.per_row = json.flag("per_row");
  constexpr std::int64_t kMostDims = 64;
  for (const auto& dims : json.whole_tables("leaves", -2, kMostDims)) {
    if (dims.size() != 3) throw DamagedData("it has a tensor of the result without its three dimensions");
    output.leaves.push_back({static_cast<int>(dims[0]), static_cast<int>(dims[1]), static_cast<int>(dims[2])});
  }
  return output;
}

Weights format_of(const std::string& name) {
  for (const Weights weights : {Weights::kAsLoaded, Weights::kPackedFp32, Weights::kPackedFp16,
                                Weights::kPackedBFloat16, Weights::kPackedInt8}) {
    if (name == to_string(weights)) return weights;
  }
  throw DamagedData("it has weights in a format that there is none of");
}

GraphFindings graph_of(const JsonObject& json) {
  GraphFindings graph;
  graph.known = true;
  graph.structure = json.text("structure");
  graph.chain = static_cast<std::size_t>(json.whole("chain"));
  for (const std::int64_t own : json.wholes("source", 0, 1)) graph.source.push_back(own == 1);
  graph.max_tokens = json.whole("max_tokens");
  graph.max_source_tokens = json.whole("max_source_tokens");
  graph.values = json.whole_tables("values", -kAny, kAny);
  for (const std::int64_t answer : json.wholes("answers", 0, 1)) graph.answers.push_back(answer == 1);
  if (json.has("result")) graph.result = json.whole_tables("result", -kAny, kAny);
  return graph;
}

/// Several processes, and threads of one, may write the same file.
fs::path part_beside(const fs::path& path) {
  static std::atomic<unsigned> number{0};
  return path.string() + fmt::format(".{}-{}.part", ::getpid(), number.fetch_add(1));
}

}  // namespace

void SavedProfile::check_conditions(const Options& options, at::Device device) const {
  for (const auto& [name, now] : conditions_of(options, device)) {
    const auto then = conditions.find(name);
    const std::string was = then == conditions.end() ? "not said" : "'" + shown(then->second) + "'";
    if (then != conditions.end() && then->second == now) continue;
    throw DamagedData(fmt::format("it was made with another {} ({}; it is '{}' now)", name, was, now));
  }
}

std::string SavedProfile::to_json() const {
  Json json = {{"format", kFormat}, {"version", kSavedProfileVersion}, {"conditions", conditions},
               {"model", digest},   {"output", json_of(output)},       {"profile", json_of(profile)}};
  json["weights"] = {{"format", to_string(weights)}, {"reason", profile.weights_reason}};
  if (graph) json["graph"] = json_of(*graph);
  json[kHash] = hash_of_json(json);
  return dumped(json) + "\n";
}

void take_probed(ModelProfile& profile, const ModelProfile& probed) {
  profile.mask_argument = probed.mask_argument;
  profile.source_mask_argument = probed.source_mask_argument;
  profile.max_tokens = probed.max_tokens;
  profile.max_source_tokens = probed.max_source_tokens;
  profile.causal = probed.causal;
  profile.head_tokenwise = probed.head_tokenwise;
  profile.rows_independent = probed.rows_independent;
  profile.per_row_output = probed.per_row_output;
  profile.granularity = probed.granularity;
  profile.prefix_reuse = probed.prefix_reuse;
  profile.source_reuse = probed.source_reuse;
  profile.left_padding = probed.left_padding;
  profile.prefix_obstacle = probed.prefix_obstacle;
  profile.notes = probed.notes;
  profile.verified = probed.verified;
}

SavedProfile saved_profile_of(const WrappedModel& wrapped, const Options& options) {
  SavedProfile saved;
  saved.conditions = conditions_of(options, wrapped.model->device());
  saved.digest = wrapped.profile.digest;
  if (!wrapped.profile.weights.empty()) saved.weights = weights_from_string(wrapped.profile.weights);
  if (const GraphFindings* found = wrapped.model->findings()) saved.graph = *found;
  saved.output = wrapped.output;
  saved.profile = wrapped.profile;
  return saved;
}

SavedProfile parse_saved_profile(std::string_view text) {
  Json json = parse_bounded_json(text, {.bytes = kMostSavedBytes});
  const JsonObject all(json);
  if (!all.has("format") || all.text("format") != kFormat) throw DamagedData("it is no model profile");
  if (const auto version = all.whole("version"); version != kSavedProfileVersion) {
    throw DamagedData(fmt::format("it has version {}; this library writes version {}", version, kSavedProfileVersion));
  }
  const std::string hash = all.text(kHash);
  json.erase(kHash);
  if (hash != hash_of_json(json)) throw DamagedData("its content was changed");
  SavedProfile saved;
  const JsonObject conditions = all.object("conditions");
  for (const auto& item : json.at("conditions").items()) {
    saved.conditions[item.key()] = conditions.text(item.key().c_str());
  }
  saved.digest = all.text("model");
  if (all.has("graph")) saved.graph = graph_of(all.object("graph"));
  saved.output = output_of(all.object("output"));
  saved.profile = probed_of(all.object("profile"));
  const JsonObject weights = all.object("weights");
  saved.weights = format_of(weights.text("format"));
  saved.profile.weights_reason = weights.text("reason");
  return saved;
}

SavedProfile read_saved_profile(const fs::path& path) {
  return parse_saved_profile(read_bounded_file(path, kMostSavedBytes));
}

std::string write_saved_profile(const fs::path& path, const SavedProfile& saved) {
  const std::string json = saved.to_json();
  const fs::path part = part_beside(path);
  std::ofstream file(part, std::ios::binary | std::ios::trunc);
  file.write(json.data(), static_cast<std::streamsize>(json.size()));
  file.close();
  std::error_code error;
  if (file) fs::rename(part, path, error);
  if (file && !error) return {};
  std::error_code ignored;
  fs::remove(part, ignored);
  return error ? error.message() : "its folder does not exist or cannot be written to";
}

}  // namespace llmcache
