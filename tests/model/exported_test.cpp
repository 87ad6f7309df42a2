// Programs of torch.export as files: one that every later version must open, and what is refused of others.
#include <c10/util/Logging.h>
#include <caffe2/serialize/in_memory_adapter.h>
#include <caffe2/serialize/inline_container.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "model/exported_archive.h"
#include "model/exported_program.h"
#include "reader_support.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
namespace fs = std::filesystem;

fs::path earlier(const std::string& name) { return fs::path(LLMCACHE_FUZZ_SEEDS) / "earlier" / name; }

const std::string& small_bytes() {
  static const std::string bytes = bytes_of(earlier("exported.pt2"));
  return bytes;
}

/// The files in an archive, but for those that its writer makes by itself.
using Records = std::map<std::string, std::string>;

Records records_of(const std::string& bytes) {
  caffe2::serialize::PyTorchStreamReader reader(
      std::make_shared<caffe2::serialize::MemoryReadAdapter>(bytes.data(), static_cast<off_t>(bytes.size())));
  Records records;
  for (const std::string& name : reader.getAllRecords()) {
    if (name.starts_with(".data/")) continue;
    const auto [data, size] = reader.getRecord(name);
    records[name] = std::string(static_cast<const char*>(data.get()), size);
  }
  return records;
}

std::string archive_of(const Records& records) {
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, std::size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  for (const auto& [name, content] : records) writer.writeRecord(name, content.data(), content.size());
  writer.writeEndOfFile();
  return bytes;
}

constexpr const char* kProgram = "models/model.json";
constexpr const char* kWeights = "data/weights/model_weights_config.json";

/// The small archive with `from` replaced in one of its files, everywhere.
std::string archive_with(const std::string& from, const std::string& to, const std::string& record = kProgram) {
  Records records = records_of(small_bytes());
  std::string& text = records.at(record);
  std::size_t count = 0;
  for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
    ++count;
  }
  EXPECT_GT(count, 0U) << record << " has no " << from;
  return archive_of(records);
}

/// What one of the recorded answers was given for.
struct Recorded {
  Inputs inputs;
  at::Tensor output;
};

at::Tensor tensor_of(const nlohmann::json& rows, at::ScalarType type) {
  std::vector<at::Tensor> tensors;
  if (!rows[0].is_array()) return at::tensor(rows.get<std::vector<double>>(), at::kDouble).to(type);
  for (const auto& row : rows) tensors.push_back(tensor_of(row, type));
  return at::stack(tensors);
}

std::vector<Recorded> recorded() {
  std::vector<Recorded> all;
  for (const auto& answer : nlohmann::json::parse(bytes_of(earlier("exported.json")))) {
    all.push_back({{tensor_of(answer.at("ids"), at::kLong), tensor_of(answer.at("mask"), at::kLong)},
                   tensor_of(answer.at("output"), at::kFloat)});
  }
  return all;
}

::testing::AssertionResult answers_as_recorded(const c10::IValue& got, const Recorded& answer) {
  const auto real = answer.inputs[1].toTensor().unsqueeze(-1);
  const double off = (got.toTensor() - answer.output).mul(real).abs().max().item<double>();
  if (off <= 1e-5) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "it is off by " << off;
}

TEST(EarlierExport, IsReadAndAnswersAsItDid) {
  const ExportedProgram program = load_exported(earlier("exported.pt2"));
  EXPECT_EQ(program.most_tokens(), 23);
  EXPECT_THAT(program.torch_version(), StartsWith("2.13"));
  LayerCache cache(program);
  EXPECT_EQ(cache.profile().layers, 2);
  EXPECT_EQ(cache.profile().layers_path, "layers");
  EXPECT_TRUE(cache.profile().causal && cache.profile().prefix_reuse) << cache.profile().to_string();
  EXPECT_EQ(cache.profile().granularity, Granularity::kTokens) << cache.profile().to_string();
  for (const Recorded& answer : recorded()) {
    EXPECT_TRUE(answers_as_recorded(program.forward(answer.inputs), answer));
    EXPECT_TRUE(answers_as_recorded(cache.forward(answer.inputs), answer));
    EXPECT_TRUE(answers_as_recorded(cache.forward(answer.inputs), answer)) << "again, from the cache";
  }
}

TEST(EarlierExport, IsRecognisedWhateverItIsCalled) {
  const fs::path renamed = fs::temp_directory_path() / "llmcache_exported_test.bin";
  fs::copy_file(earlier("exported.pt2"), renamed, fs::copy_options::overwrite_existing);
  TorchScriptCache cache = load(renamed);
  const auto answer = recorded().front();
  EXPECT_TRUE(answers_as_recorded(cache.forward(answer.inputs), answer));
  write(renamed, small_bytes().substr(0, 20'000));
  EXPECT_THAT([&] { (void)load(renamed); }, ThrowsError(ErrorCode::kInvalidFile, "nor as an exported program"));
  EXPECT_THAT([&] { (void)load_exported(renamed); }, ThrowsError(ErrorCode::kInvalidFile, renamed.string()));
  fs::remove(renamed);
  EXPECT_THAT([&] { (void)load_exported(renamed); }, ThrowsError(ErrorCode::kInvalidFile, "there is no such file"));
  EXPECT_THAT([] { (void)load_exported(fs::temp_directory_path()); }, ThrowsError(ErrorCode::kInvalidFile, "a folder"));
}

TEST(EarlierExport, TiedWeightsShareMemory) {
  const auto module = load_exported(earlier("exported.pt2")).module();
  const auto weight = [&](const char* name) { return module.attr(name).toModule().attr("weight").toTensor(); };
  EXPECT_EQ(weight("tokens").const_data_ptr(), weight("head").const_data_ptr());
  EXPECT_NE(weight("tokens").const_data_ptr(), weight("places").const_data_ptr());
}

TEST(EarlierExport, LongerTextsThanItWasExportedForAreRefused) {
  LayerCache cache(load_exported(earlier("exported.pt2")));
  EXPECT_EQ(cache.profile().max_tokens, 23);
  const auto ids = at::ones({2, 24}, at::kLong);
  auto mask = at::ones_like(ids);
  EXPECT_THAT([&] { cache.forward({ids, mask}); }, ThrowsError(ErrorCode::kInvalidInput, "at most 23"));
  mask.narrow(1, 20, 4).fill_(0);  // few real tokens, but the graph would run on 24
  EXPECT_THAT([&] { cache.forward({ids, mask}); }, ThrowsError(ErrorCode::kInvalidInput, "at most 23"));
  EXPECT_NO_THROW(cache.forward({ids.narrow(1, 0, 23), mask.narrow(1, 0, 23)}));
}

TEST(ExportedResult, HasTheStructureThatItHadInPython) {
  const std::string leaf = R"({\"type\": null, \"context\": null, \"children_spec\": []})";
  const auto with = [&](const std::string& spec) {
    return load_exported_bytes(archive_with(R"("out_spec": "[1, )" + leaf, R"("out_spec": "[1, )" + spec));
  };
  const auto inputs = recorded().front().inputs;
  EXPECT_TRUE(with(leaf).forward(inputs).isTensor());
  const auto tuple = [](const std::string& child, const std::string& type) {
    return R"({\"type\": \")" + type + R"(\", \"context\": \"null\", \"children_spec\": [)" + child + "]}";
  };
  const auto nested = with(tuple(tuple(leaf, "builtins.list"), "builtins.tuple")).forward(inputs);
  ASSERT_TRUE(nested.isTuple() && nested.toTupleRef().elements()[0].isTuple());
  const auto flat = with(tuple(leaf, "transformers.modeling_outputs.BaseModelOutput")).forward(inputs);
  EXPECT_TRUE(flat.isTuple() && flat.toTupleRef().elements()[0].isTensor()) << "an object of Python";
}

// --- what is refused -----------------------------------------------------------------------------------

struct Refusal {
  const char* name;
  const char* from;
  const char* to;
  const char* why;
  const char* record = kProgram;
  ErrorCode code = ErrorCode::kUnsupportedModel;
};
void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class ExportedRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(ExportedRefusal, SaysWhatAndWhere) {
  const Refusal& refusal = GetParam();
  const auto bytes = archive_with(refusal.from, refusal.to, refusal.record);
  EXPECT_THAT([&] { (void)load_exported_bytes(bytes); }, ThrowsError(refusal.code, refusal.why));
}

const Refusal kRefusals[] = {
    {"Schema", R"("major": 8)", R"("major": 9)", "save the program again"},
    {"HigherOrder", "torch.ops.aten.slice.Tensor", "torch.ops.higher_order.cond",
     "node 'slice_1' (torch.ops.higher_order.cond) in the outermost module is a higher-order operator"},
    {"Decomposed", "torch.ops.aten.scaled_dot_product_attention.default",
     "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default", "in module 'layers.0' is what run_decom"},
    {"UnknownOperator", "torch.ops.aten.linear.default", "torch.ops.mine.linear.default",
     "node 'linear' (torch.ops.mine.linear.default) in module 'layers.0.qkv' is no operator that this process has"},
    {"UnknownOverload", "torch.ops.aten.linear.default", "torch.ops.aten.linear.other", "is no operator"},
    {"UnknownFunction", "torch.ops.aten.linear.default", "_operator.matmul", "rewrite that part of forward()"},
    {"UnknownParameter", R"("name": "chunks")", R"("name": "pieces")", "has no parameter 'pieces'"},
    {"ArgumentOfAnotherType", R"({"name": "chunks", "arg": {"as_int": 3})",
     R"({"name": "chunks", "arg": {"as_string": "3"})", "in module 'layers.0' is called with arguments that"},
    {"FixedTokens",
     R"x({"as_expr": {"expr_str": "Symbol('s53', positive=True, integer=True)", "hint": {"as_int": 7}}})x",
     R"({"as_int": 7})", "its input 'input_ids' has the fixed size 7 in dimension 1 (tokens): export with dynamic"},
    {"Guard", "L['input_ids'].size()[0] == L['attention_mask'].size()[0]", "L['input_ids'].stride()[0] == 1",
     "a guard that the library does not understand"},
    {"MutatedBuffer", R"({"user_output": {)", R"({"buffer_mutation": {"buffer_name": "earlier", )",
     "forward() changes 'earlier'"},
    {"MutatedInput", R"("target": "torch.ops.aten.unsqueeze.default")",
     R"("target": "torch.ops.aten.unsqueeze_.default")",
     "(torch.ops.aten.unsqueeze_.default) in the outermost module writes to the input 'attention_mask'"},
    {"MutatedWeight",
     R"("torch.ops.aten.add.Tensor", "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "embedding"}})",
     R"("torch.ops.aten.add_.Tensor", "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "slice_1"}})",
     "writes to the weight or buffer 'places.weight'"},
    {"PickledWeight", R"("use_pickle": false)", R"("use_pickle": true)", "is pickled", kWeights},
    {"SparseWeight", R"("layout": 7)", R"("layout": 1)", "is not strided", kWeights},
    {"ComplexWeight", R"("dtype": 7)", R"("dtype": 10)", "numbers of the type 10", kWeights},
    {"MissingWeight", R"("places.weight")", R"("other.weight")", "no tensor for the weight 'places.weight'", kWeights,
     ErrorCode::kInvalidFile},
    {"MissingFile", "weight_1", "weight_99", "has no 'data/weights/weight_99'", kWeights, ErrorCode::kInvalidFile},
    {"LargeWeight", R"("sizes": [{"as_int": 24})", R"("sizes": [{"as_int": 25})", "is larger than its file", kWeights,
     ErrorCode::kInvalidFile},
    {"NoProgram", "graph_module", "graph_modula", "has no 'graph_module'", kProgram, ErrorCode::kInvalidFile},
    {"OtherBytes", "little", "big", "big endian", "byteorder"},
    {"OtherArchive", "pt2", "pt3", "was not written by torch.export.save()", "archive_format",
     ErrorCode::kInvalidFile}};

INSTANTIATE_TEST_SUITE_P(All, ExportedRefusal, ::testing::ValuesIn(kRefusals),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(ExportedArchive, MustHoldOneProgram) {
  Records records = records_of(small_bytes());
  const std::string program = records.at(kProgram);
  records["models/other.json"] = program;
  EXPECT_THAT([&] { (void)load_exported_bytes(archive_of(records)); },
              ThrowsError(ErrorCode::kUnsupportedModel, "the archive has 2 programs"));
  records.erase("models/other.json");
  records.erase(kProgram);
  EXPECT_THAT([&] { (void)load_exported_bytes(archive_of(records)); },
              ThrowsError(ErrorCode::kInvalidFile, "no program"));
  records["data/aotinductor/model/model.so"] = "code";
  EXPECT_THAT([&] { (void)load_exported_bytes(archive_of(records)); },
              ThrowsError(ErrorCode::kUnsupportedModel, "torch.export.save() instead of"));
}

// --- damage ---------------------------------------------------------------------------------------------

/// Empty if the archive is read, or refused as it should be.
std::string wrong_answer(const std::string& bytes) {
  try {
    (void)load_exported_bytes(bytes);
    return "";
  } catch (const Error& error) {
    const bool expected = error.code() == ErrorCode::kInvalidFile || error.code() == ErrorCode::kUnsupportedModel;
    return expected ? "" : error.what();
  } catch (const std::exception& error) {
    return error.what();
  }
}

/// The program in an archive, and its weights' names and sizes; none where it cannot be read.
struct Content {
  exported::Program program;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> weights;
  bool operator==(const Content&) const = default;
};
std::optional<Content> content_of(const std::string& bytes) {
  try {
    const auto archive = exported::read_archive(
        std::make_shared<caffe2::serialize::MemoryReadAdapter>(bytes.data(), static_cast<off_t>(bytes.size())),
        at::kCPU);
    Content content{exported::parse_program(archive.program), {}};
    for (const auto& [name, tensor] : archive.tensors) content.weights.emplace_back(name, tensor.sizes().vec());
    return content;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

TEST(DamagedExport, CutAnywhereIsRefused) {
  ASSERT_THAT(wrong_answer(small_bytes()), IsEmpty());
  for (std::size_t size = 0; size < small_bytes().size(); ++size) {
    ASSERT_THAT([&] { (void)load_exported_bytes(std::string_view(small_bytes()).substr(0, size)); },
                ThrowsError(ErrorCode::kInvalidFile))
        << size;
  }
}

TEST(DamagedExport, FlippedAnywhereIsReadOrRefused) {
#ifdef LLMCACHE_TESTS_SANITIZED
  constexpr std::size_t kStep = 61;
#else
  constexpr std::size_t kStep = 1;
#endif
  c10::SetStackTraceFetcher([] { return std::string(); });  // each error of LibTorch's takes ten milliseconds with it
  const auto sound = content_of(small_bytes());
  ASSERT_TRUE(sound);
  for (std::size_t at = 0; at < small_bytes().size(); at += kStep) {
    const std::string bytes = flipped(small_bytes(), at, at);
    const auto content = content_of(bytes);
    // What is made of an equal program, and of equal weights but for their numbers, is known.
    if (content && *content != *sound) {
      ASSERT_THAT(wrong_answer(bytes), IsEmpty()) << at;
    }
  }
  for (std::size_t at = 0; at < small_bytes().size(); at += 97 * kStep) {  // how those are refused that are no program
    ASSERT_THAT(wrong_answer(flipped(small_bytes(), at, at)), IsEmpty()) << at;
  }
}

}  // namespace
}  // namespace llmcache::test
