#include "support.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "device/load_on.h"
#include "device/protected_device.h"
#include "run_tests.h"

namespace llmcache::test {
namespace {

at::Device chosen_device = at::kCPU;

std::filesystem::path models_dir() {
  const char* folder = std::getenv("LLMCACHE_MODELS_DIR");
  return folder == nullptr ? std::filesystem::path() : std::filesystem::path(folder);
}

at::Tensor random_ids(std::int64_t low, std::int64_t high, at::IntArrayRef shape, std::uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randint(low, high, shape, generator, at::TensorOptions().dtype(at::kLong));
}

/// The real entries of row `row` in a result tensor: tokens are dimension 1 of three.
at::Tensor real_part(const at::Tensor& leaf, const Request& request, std::size_t row) {
  const auto own = leaf.select(0, static_cast<std::int64_t>(row));
  const Span& span = request.spans[row];
  return leaf.dim() == 3 && leaf.size(1) == request.padded_length ? own.narrow(0, span.first, span.tokens) : own;
}

double largest(const at::Tensor& tensor) { return tensor.numel() == 0 ? 0 : tensor.abs().max().item<double>(); }

}  // namespace

namespace {

constexpr std::string_view kProgram = ".pt2";

std::string without_format(const std::string& name) {
  return name.ends_with(kProgram) ? name.substr(0, name.size() - kProgram.size()) : name;
}

/// Those of which there are a file with this ending, and what describes it.
std::vector<std::string> names_of(const std::vector<std::string>& prefixes, const std::string& ending) {
  std::vector<std::string> names;
  std::error_code none;
  for (const auto& file : std::filesystem::directory_iterator(models_dir(), none)) {
    if (file.path().extension() != ".json") continue;
    const std::string name = file.path().stem();
    if (name.ends_with(kProgram) != ending.empty()) continue;
    const bool wanted = std::any_of(prefixes.begin(), prefixes.end(),
                                    [&](const std::string& prefix) { return name.starts_with(prefix); });
    if (wanted && std::filesystem::exists(models_dir() / (name + ending))) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

at::Device test_device() { return chosen_device; }

std::vector<std::string> model_names(const std::vector<std::string>& prefixes) { return names_of(prefixes, ".pt"); }

std::vector<std::string> program_names(const std::vector<std::string>& prefixes) { return names_of(prefixes, ""); }

ModelInfo model_info(const std::string& name) {
  const auto path = models_dir() / (name + ".json");
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + " is missing: run the tests with tools/run.sh test");
  const auto json = nlohmann::json::parse(file);
  return {name,
          json.at("family"),
          json.at("attention"),
          json.at("dtype"),
          json.at("vocab"),
          json.at("hidden"),
          json.at("layers"),
          json.at("inputs").size()};
}

Module load_model(const std::string& name) {
  if (name.ends_with(kProgram)) return load_exported(models_dir() / name, test_device()).module();
  return load_on(models_dir() / (name + ".pt"), test_device());
}

Module load_plain(const std::string& name) { return load_model(without_format(name)); }

Subject& subject(const std::string& name) {
  static std::map<std::string, std::unique_ptr<Subject>> subjects;
  auto& found = subjects[name];
  if (!found) found = std::make_unique<Subject>(name);
  return *found;
}

LayerCache<Module> cache_of(const std::string& name, const Options& options) {
  static std::map<std::pair<std::string, Weights>, LayerCache<Module>> wrapped;
  const std::pair key(name, options.weights);
  auto found = wrapped.find(key);
  if (found == wrapped.end()) {
    LayerCache<Module> cache(load_model(name), Options{.capacity_bytes = 0, .weights = options.weights});
    found = wrapped.emplace(key, std::move(cache)).first;
  }
  return found->second.with_options(options);
}

std::vector<std::string> wrappable_names(const std::vector<std::string>& prefixes) {
  auto names = model_names(prefixes);
  std::erase_if(names, [](const std::string& name) {
    return name == "tiny-bert-frozen" || name == "tiny-bert-training" || name == "tiny-mlp" ||
           name.starts_with("unusual-nested");
  });
  return names;
}

std::vector<std::string> token_level_decoders() {
  auto names = wrappable_names({"tiny-", "zoo-"});
  std::erase_if(names,
                [](const std::string& name) { return model_info(name).family != "decoder" || name == "zoo-qwen3moe"; });
  return names;
}

std::string test_name(const ::testing::TestParamInfo<std::string>& param) {
  std::string name = param.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c == '-' || c == '.'; }, '_');
  return name;
}

void ModelTest::SetUp() {
  try {
    subject_ = &subject(GetParam());
  } catch (const Error& error) {
    // XLNet works on [tokens, batch, hidden]. All others must be wrapped.
    ASSERT_EQ(GetParam(), "zoo-xlnet") << error.what();
    ASSERT_EQ(error.code(), ErrorCode::kUnsupportedModel);
    ASSERT_GT(std::string(error.what()).size(), 40U) << "a reason is expected";
  }
}

c10::IValue ModelTest::plain(const Inputs& inputs) const { return run_plain(subject_->plain, inputs); }

Request Request::alone(std::size_t row) const {
  Request request;
  const Span& span = spans.at(row);
  for (const c10::IValue& input : inputs) {
    const auto own = input.toTensor().narrow(0, static_cast<std::int64_t>(row), 1);
    request.inputs.emplace_back(own.narrow(1, span.first, span.tokens).clone());
  }
  request.spans = {{0, span.tokens}};
  request.padded_length = span.tokens;
  return request;
}

Request make_request(const ModelInfo& info, const std::vector<Span>& spans, std::int64_t padded_length,
                     std::uint64_t seed) {
  Request request;
  request.spans = spans;
  request.padded_length = padded_length;
  const auto rows = request.rows();
  auto mask = at::zeros({rows, padded_length}, at::kLong);
  for (std::int64_t row = 0; row < rows; ++row) {
    const Span& span = spans[static_cast<std::size_t>(row)];
    mask[row].narrow(0, span.first, span.tokens).fill_(1);
  }
  // The first ids are special: padding, and the one that makes tiny-throws throw.
  request.inputs.emplace_back(random_ids(10, info.vocab, {rows, padded_length}, seed).mul(mask));
  request.inputs.emplace_back(mask);
  while (request.inputs.size() < info.inputs) {
    request.inputs.emplace_back(random_ids(0, 2, {rows, padded_length}, seed + 1000 + request.inputs.size()).mul(mask));
  }
  for (c10::IValue& input : request.inputs) input = input.toTensor().to(test_device());
  return request;
}

Request right_padded(const ModelInfo& info, const std::vector<std::int64_t>& lengths, std::uint64_t seed,
                     std::int64_t padded_length) {
  std::vector<Span> spans;
  for (const std::int64_t length : lengths) spans.push_back({0, length});
  return make_request(info, spans,
                      padded_length > 0 ? padded_length : *std::max_element(lengths.begin(), lengths.end()), seed);
}

Request left_padded(const ModelInfo& info, const std::vector<std::int64_t>& lengths, std::uint64_t seed) {
  const auto padded_length = *std::max_element(lengths.begin(), lengths.end());
  std::vector<Span> spans;
  for (const std::int64_t length : lengths) spans.push_back({length == 0 ? 0 : padded_length - length, length});
  return make_request(info, spans, padded_length, seed);
}

bool runs_plainly(const Request& request, const c10::IValue& result) {
  const auto tensors = leaves(result);
  return std::any_of(request.spans.begin(), request.spans.end(), [](const Span& span) { return span.tokens == 0; }) &&
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& leaf) { return leaf.dim() != 3; });
}

Inputs copy_of(const Inputs& inputs) {
  Inputs copies;
  for (const c10::IValue& input : inputs) {
    copies.push_back(input.isTensor() ? c10::IValue(input.toTensor().clone()) : input);
  }
  return copies;
}

c10::IValue run_plain(Module& module, const Inputs& inputs) {
  const c10::NoGradGuard no_grad;
  return module.forward(inputs);
}

std::vector<at::Tensor> leaves(const c10::IValue& result) {
  if (result.isTensor()) return {result.toTensor()};
  if (result.isTensorList()) return result.toTensorVector();
  std::vector<at::Tensor> found;
  if (result.isTuple()) {
    for (const c10::IValue& element : result.toTupleRef().elements()) {
      for (auto& leaf : leaves(element)) found.push_back(std::move(leaf));
    }
  } else if (result.isList()) {
    for (const c10::IValue& element : result.toListRef()) {
      for (auto& leaf : leaves(element)) found.push_back(std::move(leaf));
    }
  } else if (result.isGenericDict()) {
    for (const auto& entry : result.toGenericDict()) {
      for (auto& leaf : leaves(entry.value())) found.push_back(std::move(leaf));
    }
  }
  return found;
}

::testing::AssertionResult same_bits(const c10::IValue& got, const c10::IValue& want) {
  const auto a = leaves(got);
  const auto b = leaves(want);
  if (got.tagKind() != want.tagKind() || a.size() != b.size()) {
    return ::testing::AssertionFailure() << "a " << got.tagKind() << " of " << a.size() << " tensors, expected a "
                                         << want.tagKind() << " of " << b.size();
  }
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].sizes() != b[i].sizes() || a[i].scalar_type() != b[i].scalar_type()) {
      return ::testing::AssertionFailure() << "tensor " << i << " is " << a[i].toString() << " " << a[i].sizes()
                                           << ", expected " << b[i].toString() << " " << b[i].sizes();
    }
    if (at::equal(a[i], b[i])) continue;
    const auto nan = b[i].isnan();
    if (at::equal(a[i].isnan(), nan) && at::equal(a[i].masked_fill(nan, 0), b[i].masked_fill(nan, 0))) continue;
    return ::testing::AssertionFailure() << "tensor " << i << " differs by "
                                         << largest((a[i].to(at::kDouble) - b[i].to(at::kDouble)).nan_to_num(1e30));
  }
  return ::testing::AssertionSuccess();
}

double real_difference(const c10::IValue& got, const c10::IValue& want, const Request& request) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  const auto a = leaves(got);
  const auto b = leaves(want);
  if (a.size() != b.size()) return kInfinite;
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].sizes() != b[i].sizes() || a[i].scalar_type() != b[i].scalar_type()) return kInfinite;
    double difference = 0;
    double scale = 1e-6;
    for (std::size_t row = 0; row < request.spans.size(); ++row) {
      if (request.spans[row].tokens == 0) continue;
      const auto x = real_part(a[i], request, row).to(at::kDouble);
      const auto y = real_part(b[i], request, row).to(at::kDouble);
      if (!at::equal(x.isfinite(), y.isfinite())) return kInfinite;
      difference = std::max(difference, largest((x - y).nan_to_num(0.0)));
      scale = std::max(scale, largest(y.nan_to_num(0.0)));
    }
    worst = std::max(worst, difference / scale);
  }
  return worst;
}

double tolerance_of(const ModelInfo& info) { return info.dtype == "float32" ? 1e-4 : 6e-2; }

::testing::AssertionResult close_on_real(const c10::IValue& got, const c10::IValue& want, const Request& request,
                                         double tolerance) {
  const double difference = real_difference(got, want, request);
  if (difference <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "real positions differ by " << difference << " of the largest magnitude, "
                                       << tolerance << " allowed";
}

::testing::AssertionResult padding_is_zero(const c10::IValue& got, const Request& request) {
  for (const at::Tensor& leaf : leaves(got)) {
    if (leaf.dim() != 3) continue;
    auto rest = leaf.clone();
    for (std::size_t row = 0; row < request.spans.size(); ++row) real_part(rest, request, row).zero_();
    if (rest.ne(0).any().item<bool>()) {
      return ::testing::AssertionFailure() << "a padding position holds up to " << largest(rest.to(at::kDouble));
    }
  }
  return ::testing::AssertionSuccess();
}

std::string counters_of(const LayerCacheBase& cache) { return cache.stats().to_string(); }

const char* const Script::kLayer = R"(
def forward(self, x: Tensor, bias: Tensor) -> Tensor:
    q = torch.matmul(x, self.wq)
    k = torch.matmul(x, self.wk)
    v = torch.matmul(x, self.wv)
    mixed = torch.scaled_dot_product_attention(q, k, v, bias)
    x = x + torch.matmul(mixed, self.wo)
    return x + torch.matmul(torch.tanh(torch.matmul(x, self.up)), self.down)
)";

const char* const Script::kForward = R"(
def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    places = torch.arange(input_ids.size(1))
    x = torch.embedding(self.table, input_ids) + torch.embedding(self.places, places)
    bias = (1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9
    x = self.l0.forward(x, bias)
    x = self.l1.forward(x, bias)
    x = self.l2.forward(x, bias)
    return torch.tanh(x)
)";

std::string Script::with(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  if (at == std::string::npos) {
    ADD_FAILURE() << "no '" << from << "' in:\n" << text;
    return text;
  }
  return text.replace(at, from.size(), to);
}

Module make_module(const Script& script) {
  const c10::NoGradGuard no_grad;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const auto weight = [&](std::int64_t rows, double scale) {
    return at::randn({rows, script.hidden}, generator, at::TensorOptions()).mul(scale);
  };
  const auto unit = std::make_shared<torch::jit::CompilationUnit>();
  Module model(c10::QualifiedName("__torch__.Model"), unit);
  model.register_parameter("table", weight(script_info(script).vocab, 1), false);
  auto far = at::make_generator<at::CPUGeneratorImpl>(2);  // positions beyond 256, which came later
  model.register_parameter(
      "places", at::cat({weight(256, 0.5), at::randn({256, script.hidden}, far, at::TensorOptions()).mul(0.5)}), false);
  for (int i = 0; i < script.layers; ++i) {
    Module layer(c10::QualifiedName("__torch__.Layer"), unit, /*shouldMangle=*/true);
    for (const char* name : {"wq", "wk", "wv", "wo", "up", "down"}) {
      layer.register_parameter(name, weight(script.hidden, 0.12), false);
    }
    layer.define(script.layer);
    model.register_module(std::string("l").append(std::to_string(i)), layer);
  }
  if (script.attributes) script.attributes(model);
  model.define(script.forward);
  move_to(model, test_device());
  return model;
}

ModelInfo script_info(const Script& script) {
  return {"script", "encoder", "sdpa", "float32", 300, script.hidden, script.layers, 2};
}

namespace {

/// "0", "1", "protected:0": of the protected device. "cuda", "cuda:1", "cpu": as LibTorch names devices.
at::Device device_of(std::string_view name) {
  constexpr std::string_view kProtected = "protected:";
  const auto number = name.starts_with(kProtected) ? name.substr(kProtected.size()) : name;
  if (number == "0" || number == "1") return protected_device(number == "1" ? 1 : 0);
  const at::Device device{std::string(name)};
  return device.is_cpu() || device.has_index() ? device : at::Device(device.type(), 0);
}

/// Takes `--device=` off the command line.
void choose_device(int& argc, char** argv) {
  constexpr std::string_view kDevice = "--device=";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (!argument.starts_with(kDevice)) {
      argv[kept++] = argv[i];
      continue;
    }
    chosen_device = device_of(argument.substr(kDevice.size()));
    if (chosen_device.is_privateuseone()) ::testing::UnitTest::GetInstance()->listeners().Append(new DeviceErrors());
  }
  argc = kept;
}

}  // namespace

int calls_of(const std::string& name, const std::function<void()>& run) {
  static thread_local std::string counted;
  static thread_local int calls;
  counted = name;
  calls = 0;
  const auto callback = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
        if (function.name() == counted) ++calls;
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  run();
  at::removeCallback(callback);
  return calls;
}

}  // namespace llmcache::test

int main(int argc, char** argv) {
  llmcache::test::choose_device(argc, argv);
  const auto folder = llmcache::test::models_dir();
  if (folder.empty() || !std::filesystem::is_directory(folder)) {
    std::cerr << "LLMCACHE_MODELS_DIR " << (folder.empty() ? "is not set" : "names no folder: " + folder.string())
              << ". The tests need exported models: run them with `tools/run.sh test`, or export the models with\n"
                 "tools/models/export_models.py --out DIR --only tiny zoo minilm and set LLMCACHE_MODELS_DIR=DIR.\n";
    return 1;
  }
  at::set_num_threads(1);
  // Set by tests/CMakeLists.txt, which says where and why.
  if (std::getenv("LLMCACHE_TESTS_WITHOUT_JIT_PASSES") != nullptr) torch::jit::setGraphExecutorOptimize(false);
  return llmcache::test::run_tests(argc, argv);
}
