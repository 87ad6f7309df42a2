// llmcache-peer: a backend of compare.py: the TorchScript module plain, frozen, or wrapped in a LayerCache. One JSON
// object a line in, one a line out; a request that fails is answered by {"error": TEXT}. The clock runs here, around
// the call of the module only.
//
//   first line out                                           {"ready": true, "versions": {...}}
//   {"op": "load", "backend": "plain" | "frozen" | "ours", "model": FILE, "threads": N, "weights": W, "capacity_mib":
//   N}
//                                                            {"load_ms": T, "note": TEXT}, or {"unavailable": TEXT}
//   {"op": "pass", "ids": [row, ...], "save": FILE}          {"ms": T}   whole output; shorter rows are padded
//   {"op": "start", "ids": [...], "run": BOOL, "save": FILE} {"ms": T}   a sequence: logits of its last token
//   {"op": "step", "id": N, "run": BOOL, "save": FILE}       {"ms": T}   the same with one more token
// "source": [...] of a start: the sequence is a target, computed from it by an encoder-decoder.
// "run": false only takes note of the tokens ({"ms": 0}). "save" (may be left out): the output goes there as float32,
// as the machine has it. The answers of the last three have "tokens" and "reused" too.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/version.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "llmcache/llmcache.h"
#include "llmcache/version.h"
#include "loaded_model.h"
#include "machine.h"
#include "outputs.h"

namespace {

using llmcache::bench::Cache;
using llmcache::bench::one_line;
using Json = nlohmann::json;
using llmcache::bench::Clock;
using llmcache::bench::ms_since;
using Ids = std::vector<std::int64_t>;

class Backend {
 public:
  Json answer(const Json& request) {
    const std::string operation = request.at("op");
    if (operation == "load") return load(request);
    if (!cache_ && !module_) throw std::runtime_error("nothing is loaded");
    if (operation == "pass") {
      std::vector<at::Tensor> rows, marks;
      for (const Ids& row : request.at("ids").get<std::vector<Ids>>()) {
        rows.push_back(at::tensor(row, at::kLong));
        marks.push_back(at::ones_like(rows.back()));
      }
      return run({at::pad_sequence(rows, /*batch_first=*/true), at::pad_sequence(marks, true)}, /*last=*/false,
                 request);
    }
    if (operation == "start") {
      sequence_ = request.at("ids").get<Ids>();
      source_ = request.value("source", Ids());
    } else if (operation == "step") {
      sequence_.push_back(request.at("id").get<std::int64_t>());
    } else {
      throw std::runtime_error("no operation is called " + operation);
    }
    if (!request.at("run").get<bool>()) return {{"ms", 0}};
    const at::Tensor ids = at::tensor(sequence_, at::kLong).unsqueeze(0);
    if (source_.empty()) return run({ids, at::ones_like(ids)}, /*last=*/true, request);
    const at::Tensor source = at::tensor(source_, at::kLong).unsqueeze(0);
    return run({source, at::ones_like(source), ids}, /*last=*/true, request);
  }

 private:
  Json load(const Json& request) {
    at::set_num_interop_threads(1);
    at::set_num_threads(request.at("threads").get<int>());
    const auto start = Clock::now();
    const std::string backend = request.at("backend");
    auto module = torch::jit::load(request.at("model").get<std::string>(), at::kCPU);
    std::string note;
    if (backend == "plain") {
      module_ = std::make_unique<torch::jit::Module>(module);
    } else if (backend == "frozen") {
      module.eval();
      auto frozen = torch::jit::freeze(module);
      module_ = std::make_unique<torch::jit::Module>(torch::jit::optimize_for_inference(frozen));
    } else if (backend == "ours") {
      llmcache::Options options;
      try {
        options.weights = llmcache::weights_from_string(request.at("weights"));
      } catch (const std::exception& error) {  // a build that does not know this way to hold weights
        return {{"unavailable", one_line(error)}};
      }
      options.capacity_bytes = request.at("capacity_mib").get<std::size_t>() << 20;
      cache_ = std::make_unique<Cache>(std::move(module), options);
      note = note_on(cache_->profile(), options);
    } else {
      throw std::runtime_error("no backend is called " + backend);
    }
    return {{"load_ms", ms_since(start)}, {"note", note}};
  }

  /// What a reader of the figures must know. Throws if the weights are not held as was asked for.
  static std::string note_on(const llmcache::ModelProfile& profile, const llmcache::Options& options) {
    const bool chosen = options.weights == llmcache::Weights::kFastest;
    if (options.weights != llmcache::Weights::kAsLoaded && !chosen && profile.packed_weights == 0) {
      throw std::runtime_error(fmt::format("asked for {} weights, none was packed", to_string(options.weights)));
    }
    const std::string note = chosen ? profile.weights + " weights" : "";
    if (!profile.causal || profile.prefix_reuse) return note;
    return note + (note.empty() ? "" : "; ") + "prefixes are not reused";
  }

  /// The ids, of which tokens are counted, are the first input, or the target's behind a source.
  Json run(const llmcache::Inputs& inputs, bool last, const Json& request) {
    const at::NoGradGuard no_grad;
    const at::Tensor ids = inputs.at(inputs.size() == 3 ? 2 : 0).toTensor();
    const llmcache::RequestOptions options{.output = last ? llmcache::Output::kLastToken : llmcache::Output::kAll};
    const auto start = Clock::now();
    const c10::IValue result = cache_ ? cache_->forward(inputs, options) : module_->forward(inputs);
    const double ms = ms_since(start);
    std::int64_t reused = 0;
    if (cache_) {
      for (const auto& sequence : cache_->last_report().sequences) reused += sequence.reused_tokens;
    }
    const at::Tensor output = llmcache::bench::tensors_of(result).at(0);
    if (request.contains("save")) save(last ? output.select(1, -1) : output, request.at("save").get<std::string>());
    return {{"ms", ms}, {"tokens", ids.numel()}, {"reused", reused}};
  }

  static void save(const at::Tensor& tensor, const std::filesystem::path& path) {
    const at::Tensor values = tensor.to(at::kFloat).contiguous();
    std::ofstream file(path, std::ios::binary);
    file.write(static_cast<const char*>(values.const_data_ptr()), static_cast<std::streamsize>(values.nbytes()));
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
  }

  std::unique_ptr<torch::jit::Module> module_;  // plain, frozen
  std::unique_ptr<Cache> cache_;                // ours
  Ids sequence_;
  Ids source_;  // of an encoder-decoder
};

void say(const Json& answer) { std::cout << answer.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl; }

}  // namespace

int main() {
  say({{"ready", true},
       {"versions",
        {{"LibTorch", TORCH_VERSION}, {"LLMCache", LLMCACHE_VERSION}, {"compiler", llmcache::bench::compiler()}}}});
  Backend backend;
  for (std::string line; std::getline(std::cin, line);) {
    try {
      say(backend.answer(Json::parse(line)));
    } catch (const std::exception& error) {
      say({{"error", one_line(error)}});
    }
  }
  return 0;
}
