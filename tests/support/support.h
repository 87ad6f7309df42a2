// What the tests share: exported models beside a plain copy, requests, comparisons.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/llmcache.h>
#include <torch/script.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace llmcache::test {

using torch::jit::Module;
using Donors = std::vector<std::shared_ptr<const SequenceState>>;

/// Where models and requests are put: the CPU, or what `--device=` says on the command line: 0 or 1, of the protected
/// device (tests/device), or a device of LibTorch's, such as cuda.
[[nodiscard]] at::Device test_device();

// --- models -----------------------------------------------------------------------------------------

/// What the exporter wrote beside a model.
struct ModelInfo {
  std::string name;
  std::string family;     ///< "encoder" (bidirectional) or "decoder" (causal)
  std::string attention;  ///< "sdpa", "eager" or "none"
  std::string dtype;
  std::int64_t vocab = 0;
  std::int64_t hidden = 0;
  std::int64_t layers = 0;
  std::size_t inputs = 0;
};

/// Names of the exported models that begin with one of `prefixes`, sorted.
std::vector<std::string> model_names(const std::vector<std::string>& prefixes);
/// The same of those that are there as programs of torch.export too. Their names end in .pt2, and are good wherever
/// those of models are.
std::vector<std::string> program_names(const std::vector<std::string>& prefixes);
ModelInfo model_info(const std::string& name);
/// A fresh copy, read from the file onto test_device().
Module load_model(const std::string& name);
/// What a cache around load_model() is compared with: a copy of it; of a program of torch.export the same model's
/// TorchScript module, whose weights are equal.
Module load_plain(const std::string& name);

/// A model twice: as it is, and wrapped. The wrapped one keeps nothing, so that every call computes.
struct Subject {
  explicit Subject(const std::string& name)
      : info(model_info(name)), plain(load_plain(name)), cache(load_model(name), Options{.capacity_bytes = 0}) {}

  ModelInfo info;
  Module plain;
  LayerCache<Module> cache;
};

/// Made at the first call and kept for the rest of the process: wrapping takes longer than most tests.
Subject& subject(const std::string& name);

/// A cache with nothing in its memory around load_model(name), wrapped once in a process for each format of weights
/// (LayerCache::with_options()). What tests wrapping, or changes the module, makes a LayerCache of its own.
LayerCache<Module> cache_of(const std::string& name, const Options& options = {});

/// Those of model_names() that must not be refused for what they are; wrapping_test.cpp has the others.
std::vector<std::string> wrappable_names(const std::vector<std::string>& prefixes);
/// The decoders among them, but for zoo-qwen3moe, which runs whole layers only: tests say so by that name.
std::vector<std::string> token_level_decoders();
/// For INSTANTIATE_TEST_SUITE_P.
std::string test_name(const ::testing::TestParamInfo<std::string>& param);

/// A test of one exported model, by name.
class ModelTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override;

  /// Nothing to compare: the model was refused, with a reason, and is one that may be (checked in SetUp).
  [[nodiscard]] bool refused() const { return subject_ == nullptr; }
  [[nodiscard]] const ModelInfo& info() const { return subject_->info; }
  [[nodiscard]] LayerCache<Module>& cache() const { return subject_->cache; }
  [[nodiscard]] const ModelProfile& profile() const { return subject_->cache.profile(); }
  [[nodiscard]] ForwardReport report() const { return subject_->cache.last_report(); }
  [[nodiscard]] c10::IValue plain(const Inputs& inputs) const;

 private:
  Subject* subject_ = nullptr;
};

// --- requests ---------------------------------------------------------------------------------------

/// Real tokens of one row.
struct Span {
  std::int64_t first = 0;
  std::int64_t tokens = 0;
};

/// One batch of inputs, and where its real tokens are.
struct Request {
  Inputs inputs;
  std::vector<Span> spans;
  std::int64_t padded_length = 0;

  [[nodiscard]] std::int64_t rows() const { return static_cast<std::int64_t>(spans.size()); }
  [[nodiscard]] at::Tensor ids() const { return inputs.at(0).toTensor(); }
  [[nodiscard]] at::Tensor mask() const { return inputs.at(1).toTensor(); }
  /// Row `row` alone and without padding.
  [[nodiscard]] Request alone(std::size_t row) const;
};

/// Random ids at `spans`, 0 elsewhere. `seed` decides the ids; further inputs get random zeros and ones.
Request make_request(const ModelInfo& info, const std::vector<Span>& spans, std::int64_t padded_length,
                     std::uint64_t seed);
/// Rows of these lengths, padded on the right to the longest or to `padded_length`.
Request right_padded(const ModelInfo& info, const std::vector<std::int64_t>& lengths, std::uint64_t seed,
                     std::int64_t padded_length = 0);
Request left_padded(const ModelInfo& info, const std::vector<std::int64_t>& lengths, std::uint64_t seed);

/// True if a row has no real token and the result has more than one entry a token: such requests run plainly.
bool runs_plainly(const Request& request, const c10::IValue& result);

/// The same inputs with other memory behind them.
Inputs copy_of(const Inputs& inputs);

/// What the plain module returns, without gradients.
c10::IValue run_plain(Module& module, const Inputs& inputs);

// --- comparisons ------------------------------------------------------------------------------------

/// The tensors of a result (one, a tuple or a list of them), in order.
std::vector<at::Tensor> leaves(const c10::IValue& result);

/// Bit for bit; NaN equals NaN.
::testing::AssertionResult same_bits(const c10::IValue& got, const c10::IValue& want);

/// Largest difference at real positions, relative to the largest real magnitude of its tensor; infinite
/// if shapes, types or NaNs differ. Rows without real tokens are left out.
double real_difference(const c10::IValue& got, const c10::IValue& want, const Request& request);

/// How far packing may be off: the rounding of the type.
double tolerance_of(const ModelInfo& info);

::testing::AssertionResult close_on_real(const c10::IValue& got, const c10::IValue& want, const Request& request,
                                         double tolerance);
::testing::AssertionResult padding_is_zero(const c10::IValue& got, const Request& request);

/// Matches a callable that throws Error with this code and this text.
inline auto ThrowsError(ErrorCode code, const std::string& part = "") {
  return ::testing::Throws<Error>(
      ::testing::AllOf(::testing::Property("code", &Error::code, code),
                       ::testing::Property("what", &Error::what, ::testing::HasSubstr(part))));
}

/// The counters of `stats` that say whether a call left the cache as it was.
std::string counters_of(const LayerCacheBase& cache);

/// How often `run` calls an operator on this thread, such as "aten::embedding".
int calls_of(const std::string& name, const std::function<void()>& run);

// --- memory ----------------------------------------------------------------------------------------

/// Bytes of tensors that this thread allocated and has not freed, from LibTorch's own count.
class TensorBytes final : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*ptr*/, std::int64_t alloc_size, std::size_t /*total_allocated*/,
                         std::size_t /*total_reserved*/, c10::Device /*device*/) override {
    live_ += alloc_size;
    peak_ = std::max(peak_, live_);
  }
  [[nodiscard]] bool memoryProfilingEnabled() const override { return true; }
  [[nodiscard]] std::int64_t live() const { return live_; }
  [[nodiscard]] std::int64_t peak() const { return peak_; }

 private:
  std::int64_t live_ = 0;
  std::int64_t peak_ = 0;
};

// --- TorchScript modules made in a test ---------------------------------------------------------------

/// Source of a small transformer, changed in places by the test that needs it. Its ids are below 300.
struct Script {
  std::string layer = kLayer;      ///< of each layer, whose parameters are wq, wk, wv, wo, up, down
  std::string forward = kForward;  ///< of the model, whose parameters are table, places, and layers l0, l1, l2
  int layers = 3;
  std::int64_t hidden = 32;
  std::function<void(Module&)> attributes;  ///< adds further ones to the model, before forward is compiled

  static const char* const kLayer;
  static const char* const kForward;
  /// Returns `text` with the first `from` replaced; fails the test if there is none.
  static std::string with(std::string text, const std::string& from, const std::string& to);
};

/// Equal weights and structure at every call with the same argument.
Module make_module(const Script& script);
/// What make_request needs to know of such a module.
ModelInfo script_info(const Script& script);

}  // namespace llmcache::test
