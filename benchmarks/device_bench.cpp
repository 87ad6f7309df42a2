// llmcache-device-bench: what single calls cost on a device, CUDA say, against the plain module in the same loop. One
// JSON object goes to standard output; a measure that fails is {"error": TEXT}, and the others go on.
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device/load_on.h"
#include "failure.h"
#include "llmcache/llmcache.h"
#include "loaded_model.h"
#include "machine.h"
#include "statistics.h"

namespace llmcache::bench {
namespace {

using Json = nlohmann::ordered_json;
using Module = torch::jit::Module;
using Call = std::function<at::Tensor()>;

constexpr std::int64_t kFirstId = 10;  // leaves special tokens out
constexpr int kWarmUp = 3;

struct Settings {
  std::string device = "cuda";
  std::string model;
  int rounds = 15;
  std::int64_t tokens = 128;  ///< of a miss
  std::vector<std::int64_t> lasts = {128, 512};
  std::vector<std::int64_t> contexts = {128, 512, 1000};
  std::vector<std::int64_t> prefixes = {2048, 8192};
};

/// What the allocator of a device says; on a CPU what the system does.
struct Memory {
  std::int64_t taken = 0;     ///< by tensors, as the allocator rounds them
  std::int64_t reserved = 0;  ///< from the device, blocks that are free included
  std::int64_t peak = 0;      ///< the most that was taken
};

Memory memory_of(at::Device device) {
  if (device.is_cpu()) return {.taken = resident_bytes(), .reserved = 0, .peak = 0};
  const auto stats = at::accelerator::getDeviceStats(device.index());
  return {.taken = stats.allocated_bytes[0].current,  // all sizes together
          .reserved = stats.reserved_bytes[0].current,
          .peak = stats.allocated_bytes[0].peak};
}

/// Runs nothing before all that was asked of the device is done.
void wait_for(at::Device device) {
  if (!device.is_cpu()) c10::impl::getDeviceGuardImpl(device.type())->synchronizeDevice(device.index());
}

at::Tensor first_of(const c10::IValue& result) {
  return result.isTensor() ? result.toTensor() : result.toTupleRef().elements()[0].toTensor();
}

/// The logits or states of the last token, [1, values].
at::Tensor last_token(const at::Tensor& all) { return all.dim() == 3 ? all.select(1, all.size(1) - 1) : all; }

class Bench {
 public:
  Bench(const ModelFile& file, at::Device device, int rounds)
      : device_(device),
        rounds_(rounds),
        vocabulary_(file.vocabulary),
        before_(memory_of(device)),
        plain_(test::load_on(file.path, device)),
        loaded_(memory_of(device)),
        cache_(plain_, {.capacity_bytes = std::size_t{4} << 30, .verify_rate = 0}) {}

  [[nodiscard]] Json profile() const {
    const ModelProfile& own = cache_.profile();
    return {{"granularity", to_string(own.granularity)}, {"prefix_reuse", own.prefix_reuse}, {"notes", own.notes}};
  }

  /// What looking up and keeping cost where nothing is known.
  Json miss(std::int64_t tokens) {
    cache_.clear();
    Inputs inputs;
    return pairs([&] { inputs = fresh({tokens}); }, [&] { return plain(inputs); }, [&] { return cached(inputs); });
  }

  Json packed() {
    cache_.clear();
    Inputs inputs;
    const std::vector<std::int64_t> lengths = {64, 17, 5, 33};
    Json done = pairs([&] { inputs = fresh(lengths); }, [&] { return on_real(plain(inputs), lengths); },
                      [&] { return on_real(cached(inputs), lengths); });
    done["execution"] = cache_.last_report().execution == Execution::kPacked ? "packed" : "not packed";
    return done;
  }

  /// The last 16 tokens of a sequence, the states of the others known.
  Json last(std::int64_t tokens) {
    const Inputs inputs = fresh({tokens});
    std::vector<std::shared_ptr<const SequenceState>> donors;
    Plan plan = cache_.full_plan(inputs);
    (void)cache_.forward_plan(inputs, plan, {}, &donors);
    std::vector<std::int64_t> active;
    for (std::int64_t token = std::max<std::int64_t>(0, tokens - 16); token < tokens; ++token) active.push_back(token);
    plan.sequences = {compute_some(0, 0, tokens, plan.layers, active, 0)};
    return pairs([] {}, [&] { return last_token(plain(inputs)); },
                 [&] { return last_token(first_of(cache_.forward_plan(inputs, plan, donors))); });
  }

  /// One more token behind a known context; the plain module computes all of them.
  Json decode(std::int64_t context) {
    cache_.clear();
    Inputs inputs = fresh({context});
    (void)cached(inputs, Output::kLastToken);
    Json done = pairs([&] { inputs = joined(inputs, fresh({1})); }, [&] { return last_token(plain(inputs)); },
                      [&] { return last_token(cached(inputs, Output::kLastToken)); });
    const ForwardReport report = cache_.last_report();
    if (report.sequences[0].reused_tokens + 1 != report.sequences[0].tokens) throw Failure("the context was not known");
    done["host_ms"] = {
        {"lookup", report.lookup_ms}, {"embed", report.embed_ms}, {"head", report.head_ms}, {"store", report.store_ms}};
    return done;
  }

  /// 32 new tokens behind a known prefix.
  Json prefill(std::int64_t tokens) {
    cache_.clear();
    const Inputs prefix = fresh({tokens});
    (void)cached(prefix, Output::kLastToken);
    Inputs inputs;
    Json done = pairs([&] { inputs = joined(prefix, fresh({32})); }, [&] { return last_token(plain(inputs)); },
                      [&] { return last_token(cached(inputs, Output::kLastToken)); });
    if (cache_.last_report().sequences[0].reused_tokens < tokens) throw Failure("the prefix was not known");
    return done;
  }

  /// What the cache says that it holds, and what the device's allocator has given for it.
  Json memory() {
    cache_.clear();
    wait_for(device_);
    const Memory empty = memory_of(device_);
    for (int i = 0; i < 32; ++i) (void)cached(fresh({64}));
    wait_for(device_);
    const Memory filled = memory_of(device_);
    const Stats stats = cache_.stats();
    return {{"weights_bytes", loaded_.taken - before_.taken},
            {"cache_bytes", stats.bytes},
            {"cache_entries", stats.entries},
            {"cache_taken_bytes", filled.taken - empty.taken},
            {"taken_bytes", filled.taken},
            {"reserved_bytes", filled.reserved},
            {"peak_bytes", filled.peak}};
  }

 private:
  Inputs fresh(const std::vector<std::int64_t>& lengths) {
    const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    const auto rows = static_cast<std::int64_t>(lengths.size());
    at::Tensor ids = at::zeros({rows, longest}, at::kLong);
    at::Tensor mask = at::zeros({rows, longest}, at::kLong);
    std::uniform_int_distribution<std::int64_t> id(kFirstId, vocabulary_ - 1);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t token = 0; token < lengths[static_cast<std::size_t>(row)]; ++token) {
        ids.mutable_data_ptr<std::int64_t>()[row * longest + token] = id(random_);
        mask.mutable_data_ptr<std::int64_t>()[row * longest + token] = 1;
      }
    }
    return {ids.to(device_), mask.to(device_)};
  }

  static Inputs joined(const Inputs& one, const Inputs& other) {
    Inputs both;
    for (std::size_t i = 0; i < one.size(); ++i)
      both.emplace_back(at::cat({one[i].toTensor(), other[i].toTensor()}, 1));
    return both;
  }

  /// Zero at padding, where a result has an entry for each token.
  static at::Tensor on_real(const at::Tensor& all, const std::vector<std::int64_t>& lengths) {
    if (all.dim() != 3) return all;
    at::Tensor real = all.clone();
    for (std::size_t row = 0; row < lengths.size(); ++row) {
      real[static_cast<std::int64_t>(row)].narrow(0, lengths[row], all.size(1) - lengths[row]).zero_();
    }
    return real;
  }

  at::Tensor plain(const Inputs& inputs) { return first_of(plain_.forward(inputs)); }
  at::Tensor cached(const Inputs& inputs, Output output = Output::kAll) {
    return first_of(cache_.forward(inputs, {.output = output}));
  }

  double timed(const Call& call, at::Tensor& result) const {
    wait_for(device_);
    const auto start = Clock::now();
    result = call();
    wait_for(device_);
    return ms_since(start);
  }

  /// Runs both in turns, each with the inputs that `prepare`, which is not timed, makes for the pair. The largest
  /// difference of their results is a part of the largest magnitude.
  Json pairs(const std::function<void()>& prepare, const Call& plain, const Call& cached) const {
    std::vector<double> plain_ms, cached_ms, ratios;
    double difference = 0;
    for (int round = -kWarmUp; round < rounds_; ++round) {
      prepare();
      const bool plain_first = round % 2 == 0;
      at::Tensor want, got;
      double p = plain_first ? timed(plain, want) : 0;
      const double c = timed(cached, got);
      if (!plain_first) p = timed(plain, want);
      const double scale = std::max(1e-6, want.abs().max().item<double>());
      difference = std::max(difference, (got.to(at::kFloat) - want.to(at::kFloat)).abs().max().item<double>() / scale);
      if (round < 0) continue;
      plain_ms.push_back(p);
      cached_ms.push_back(c);
      ratios.push_back(p / c);
    }
    return {{"plain_ms", median(plain_ms)},
            {"cache_ms", median(cached_ms)},
            {"plain_by_cache", median(ratios)},
            {"difference", difference},
            {"rounds", rounds_}};
  }

  at::Device device_;
  int rounds_;
  std::int64_t vocabulary_;
  Memory before_;
  Module plain_;
  Memory loaded_;
  LayerCache<Module> cache_;
  std::mt19937_64 random_{0};
};

Json guarded(const std::function<Json()>& measure) {
  try {
    return measure();
  } catch (const std::exception& error) {
    return Json::object({{"error", one_line(error)}});
  }
}

Json measure_all(const Settings& settings, const ModelFile& file) {
  at::Device device(settings.device);
  if (!device.is_cpu() && !device.has_index()) device = at::Device(device.type(), 0);
  const c10::DeviceGuard guard(device);
  Bench bench(file, device, settings.rounds);
  Json all = {{"model", file.name},        {"weights", file.weights}, {"dtype", file.dtype},
              {"device", settings.device}, {"torch", TORCH_VERSION},  {"compiler", compiler()},
              {"profile", bench.profile()}};
  Json measures;
  measures["miss"] = guarded([&] { return bench.miss(settings.tokens); });
  measures["packed_64_17_5_33"] = guarded([&] { return bench.packed(); });
  for (const std::int64_t tokens : settings.lasts) {
    measures[fmt::format("last_16_of_{}", tokens)] = guarded([&] { return bench.last(tokens); });
  }
  if (file.family == "decoder") {
    for (const std::int64_t context : settings.contexts) {
      measures[fmt::format("decode_at_{}", context)] = guarded([&] { return bench.decode(context); });
    }
    for (const std::int64_t prefix : settings.prefixes) {
      measures[fmt::format("prefill_32_behind_{}", prefix)] = guarded([&] { return bench.prefill(prefix); });
    }
  }
  all["measures"] = std::move(measures);
  all["memory"] = guarded([&] { return bench.memory(); });
  return all;
}

bool has_error(const Json& all) {
  const auto failed = [](const Json& one) { return one.contains("error"); };
  return failed(all["memory"]) || std::any_of(all["measures"].begin(), all["measures"].end(), failed);
}

int run(int argc, char** argv) {
  Settings settings;
  CLI::App app("llmcache-device-bench: what single calls cost on a device, against the plain module in the same loop");
  app.add_option("--device", settings.device, "of LibTorch: cuda, cuda:1, cpu [cuda]");
  app.add_option("--model", settings.model, "file of the model, .pt, with its sidecar beside it")->required();
  app.add_option("--rounds", settings.rounds, "pairs of calls of each measure [15]")->check(CLI::Range(1, 10000));
  app.add_option("--tokens", settings.tokens, "of a miss [128]")->check(CLI::PositiveNumber);
  app.add_option("--lasts", settings.lasts, "lengths of sequences whose last 16 tokens are computed [128 512]");
  app.add_option("--contexts", settings.contexts, "tokens in front of a decode step [128 512 1000]");
  app.add_option("--prefixes", settings.prefixes, "tokens of known prefixes [2048 8192]");
  CLI11_PARSE(app, argc, argv);
  at::set_num_interop_threads(1);
  at::set_num_threads(1);
  const at::NoGradGuard no_grad;
  const ModelFile file = read_model_file(settings.model);
  if (file.vocabulary <= kFirstId) throw Failure(fmt::format("model {}: its sidecar gives no vocabulary", file.name));
  const Json all = measure_all(settings, file);
  std::cout << all.dump(2) << '\n';
  return has_error(all) ? 1 : 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  try {
    return llmcache::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "llmcache-device-bench: " << llmcache::bench::one_line(error) << '\n';
    return 1;
  }
}
