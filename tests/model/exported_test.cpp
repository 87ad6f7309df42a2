// Programs of torch.export as files: one that every later version must open, and what is refused of others.
#include <c10/util/Logging.h>
#include <caffe2/serialize/in_memory_adapter.h>
#include <caffe2/serialize/inline_container.h>
#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>

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
using Json = nlohmann::json;

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

/// The small archive with its program changed.
template <class Change>
std::string archive_changed(const Change& change) {
  Records records = records_of(small_bytes());
  Json program = Json::parse(records.at(kProgram));
  change(program);
  records.at(kProgram) = program.dump();
  return archive_of(records);
}

Json as_tensor(const std::string& name) {
  return Json::parse(fmt::format(R"({{"as_tensor": {{"name": "{}"}}}})", name));
}

/// JSON in which $x stands for the tensor called x.
Json parsed(const std::string& text) {
  return Json::parse(std::regex_replace(text, std::regex(R"(\$(\w+))"), R"({"as_tensor": {"name": "$1"}})"));
}

/// A node as torch.export writes it down.
Json node_of(const std::string& name, const std::string& target, const std::string& arguments,
             const std::string& outputs = "[]") {
  Json node = parsed(R"({"inputs": [], "metadata": {"nn_module_stack": "L__self__,,__main__.Decoder"}})");
  node["name"] = name;
  node["target"] = target;
  node["outputs"] = parsed(outputs);
  const Json given = parsed(arguments);
  for (const auto& [parameter, argument] : given.items()) {
    Json input = parsed(R"({"kind": 1})");
    input["name"] = parameter;
    input["arg"] = argument;
    node["inputs"].push_back(input);
  }
  return node;
}

/// The small archive with nodes in front of the one called `before`. Where `instead` is given, those behind them use
/// `made` in its place.
std::string archive_with_nodes(const std::vector<Json>& nodes, const std::string& before = "linear",
                               const std::string& instead = "", const std::string& made = "") {
  return archive_changed([&](Json& program) {
    auto& all = program.at("graph_module").at("graph").at("nodes").get_ref<Json::array_t&>();
    auto place = std::find_if(all.begin(), all.end(), [&](const Json& node) { return node.at("name") == before; });
    if (place == all.end()) FAIL() << "the program has no node " << before;
    if (!instead.empty()) {
      for (auto later = place; later != all.end(); ++later) {
        for (Json& input : later->at("inputs")) {
          if (input.at("arg") == as_tensor(instead)) input["arg"] = as_tensor(made);
        }
      }
    }
    all.insert(place, nodes.begin(), nodes.end());
  });
}

/// What one of the recorded answers was given for.
struct Recorded {
  Inputs inputs;
  at::Tensor output;
};

at::Tensor tensor_of(const Json& rows, at::ScalarType type) {
  std::vector<at::Tensor> tensors;
  if (!rows[0].is_array()) return at::tensor(rows.get<std::vector<double>>(), at::kDouble).to(type);
  for (const auto& row : rows) tensors.push_back(tensor_of(row, type));
  return at::stack(tensors);
}

std::vector<Recorded> recorded() {
  std::vector<Recorded> all;
  for (const auto& answer : Json::parse(bytes_of(earlier("exported.json")))) {
    all.push_back({{tensor_of(answer.at("ids"), at::kLong), tensor_of(answer.at("mask"), at::kLong)},
                   tensor_of(answer.at("output"), at::kFloat)});
  }
  return all;
}

/// Up to what processors differ by, as a share of the largest number: sums of float32 in another order.
::testing::AssertionResult answers_as_recorded(const c10::IValue& got, const Recorded& answer) {
  const auto real = answer.inputs[1].toTensor().unsqueeze(-1);
  const double largest = answer.output.mul(real).abs().max().item<double>();
  const double off = (got.toTensor() - answer.output).mul(real).abs().max().item<double>() / largest;
  if (off <= 1e-5) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "it is off by " << off << " of the largest, " << largest;
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

TEST(EarlierExport, TakesNumbersOfInt64Only) {
  LayerCache cache(load_exported(earlier("exported.pt2")));
  const auto ids = at::ones({2, 5}, at::kLong);
  for (const auto type : {at::kBool, at::kInt}) {
    EXPECT_THAT(
        [&] {
          cache.forward({ids, at::ones_like(ids).to(type)});
        },
        ThrowsError(ErrorCode::kInvalidInput, "the program was exported for int64"));
  }
  EXPECT_NO_THROW(cache.forward({ids, at::ones_like(ids)}));
}

TEST(ExportedResult, KeepsWhatIsNoneInItsPlace) {
  const auto bytes = archive_changed([](Json& program) {
    Json& module = program.at("graph_module");
    Json& outputs = module.at("signature").at("output_specs");
    outputs.push_back(parsed(R"({"user_output": {"arg": {"as_none": true}}})"));
    outputs.push_back(parsed(R"({"user_output": {"arg": $add__1}})"));
    const std::string leaf = R"({"type": null, "context": null, "children_spec": []})";
    module.at("module_call_graph").at(0).at("signature").at("out_spec") =
        R"([1, {"type": "builtins.tuple", "context": "null", "children_spec": [)" + leaf + ", " + leaf + ", " + leaf +
        "]}]";
  });
  const auto program = load_exported_bytes(bytes);
  LayerCache cache(program);
  EXPECT_EQ(cache.profile().granularity, Granularity::kTokens) << cache.profile().to_string();
  for (const Recorded& answer : recorded()) {
    const auto plain = program.forward(answer.inputs);
    ASSERT_TRUE(plain.isTuple() && plain.toTupleRef().elements().size() == 3);
    EXPECT_TRUE(answers_as_recorded(plain.toTupleRef().elements()[0], answer));
    EXPECT_TRUE(plain.toTupleRef().elements()[1].isNone());
    for (int turn = 0; turn < 2; ++turn) {
      const auto got = cache.forward(answer.inputs);
      ASSERT_TRUE(got.isTuple() && got.toTupleRef().elements().size() == 3);
      EXPECT_TRUE(answers_as_recorded(got.toTupleRef().elements()[0], answer));
      EXPECT_TRUE(got.toTupleRef().elements()[1].isNone());
      EXPECT_TRUE(got.toTupleRef().elements()[2].isTensor());
    }
  }
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

TEST(ExportedArchive, MayCallItsProgramByAnyName) {
  Records records;
  for (auto& [name, content] : records_of(small_bytes())) {
    std::string renamed = name;  // as package_pt2(file, exported_programs={"bert": program}) calls them
    for (const std::string folder : {"models/", "data/weights/", "data/constants/"}) {
      if (name.starts_with(folder + "model")) renamed = folder + "bert" + name.substr(folder.size() + 5);
    }
    records[renamed] = content;
  }
  ASSERT_TRUE(records.contains("data/weights/bert_weights_config.json"));
  const auto program = load_exported_bytes(archive_of(records));
  for (const Recorded& answer : recorded()) EXPECT_TRUE(answers_as_recorded(program.forward(answer.inputs), answer));
  records["models/bert.txt"] = records.at("models/bert.json");
  records.erase("models/bert.json");
  EXPECT_THAT([&] { (void)load_exported_bytes(archive_of(records)); },
              ThrowsError(ErrorCode::kInvalidFile, "is no JSON file"));
}

TEST(ExportedArchive, FewNumbersDoNotStandForMoreThanCanBeLookedAt) {
  const auto with = [](const std::string& sizes, const std::string& strides) {
    Records records = records_of(small_bytes());
    Json list = Json::parse(records.at(kWeights));
    Json& meta = list.at("config").at("places.weight").at("tensor_meta");
    meta.at("sizes") = Json::parse(sizes);
    meta.at("strides") = Json::parse(strides);
    records.at(kWeights) = list.dump();
    return archive_of(records);
  };
  const std::string expanded = R"([{"as_int": 0}, {"as_int": 1}])";
  const std::string all_one = R"([{"as_int": 0}, {"as_int": 0}])";
  EXPECT_NO_THROW((void)load_exported_bytes(with(R"([{"as_int": 24}, {"as_int": 8}])", expanded)));
  EXPECT_THAT([&] { (void)load_exported_bytes(with(R"([{"as_int": 1099511627776}, {"as_int": 8}])", expanded)); },
              ThrowsError(ErrorCode::kInvalidFile, "numbers, in an archive of"));
  EXPECT_THAT([&] { (void)load_exported_bytes(with(R"([{"as_int": 5000}, {"as_int": 5000}])", all_one)); },
              ThrowsError(ErrorCode::kInvalidFile, "its weights up to 'places.weight' have"));
}

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

// --- checks, writes, and numbers that are True or False -------------------------------------------------

TEST(ExportedChecks, OfWhatTheModelIsGivenAreRefused) {
  const auto refused = [](const std::vector<Json>& nodes, const std::string& why) {
    EXPECT_THAT([&] { (void)load_exported_bytes(archive_with_nodes(nodes)); },
                ThrowsError(ErrorCode::kUnsupportedModel, why));
  };
  const std::string size = R"({"as_sym_int": {"as_name": "sym_size_int_5"}})";
  const std::vector<Json> of_size{
      node_of("mod", "_operator.mod", R"({"a": )" + size + R"(, "b": {"as_int": 2}})",
              R"([{"as_sym_int": {"as_name": "mod"}}])"),
      node_of("eq", "_operator.eq", R"({"a": {"as_sym_int": {"as_name": "mod"}}, "b": {"as_int": 0}})",
              R"([{"as_sym_bool": {"as_name": "eq"}}])"),
      node_of(
          "check", "torch.ops.aten._assert_scalar.default",
          R"({"self": {"as_sym_bool": {"as_name": "eq"}}, "assert_msg": {"as_string": "Eq(Mod(s53, 2), 0) fails"}})")};
  refused(of_size, "prefer_deferred_runtime_asserts_over_guards");
  refused(of_size, "(\"Eq(Mod(s53, 2), 0) fails\")");
  refused({node_of("lt", "torch.ops.aten.lt.Scalar", R"({"self": $input_ids, "other": {"as_int": 9}})", "[$lt]"),
           node_of("all", "torch.ops.aten.all.default", R"({"self": $lt})", "[$all]"),
           node_of("check", "torch.ops.aten._assert_async.default", R"({"self": $all})")},
          "node 'check' (torch.ops.aten._assert_async.default) in the outermost module checks what the model is given");
  refused({node_of("check", "torch.ops.aten.sym_constrain_range_for_size.default",
                   R"({"max": {"as_int": 9}, "size": )" + size + "}")},
          "checks what the model is given");
  refused({node_of("check", "torch.ops.aten._assert_tensor_metadata.default",
                   R"({"a": $add, "size": {"as_ints": [3, 7, 8]}})")},
          "checks the size of a tensor");
}

TEST(ExportedChecks, OfConstantsAreLeftOut) {
  const auto program = load_exported_bytes(
      archive_with_nodes({node_of("check", "torch.ops.aten._assert_scalar.default",
                                  R"({"self": {"as_bool": true}, "assert_msg": {"as_string": "no"}})")}));
  for (const Recorded& answer : recorded()) EXPECT_TRUE(answers_as_recorded(program.forward(answer.inputs), answer));
}

/// Writes to what an operator of a weight returns.
std::string archive_that_writes(const std::string& target, const std::string& arguments,
                                const std::string& outputs = "[$made]") {
  return archive_with_nodes(
      {node_of("way", "torch.ops.aten." + target, arguments, outputs),
       node_of("write", "torch.ops.aten.add_.Tensor", R"({"self": $made, "other": {"as_int": 1}})", "[$written]")});
}

TEST(ExportedWrites, ByWhatSharesMemoryThoughItsSchemaDoesNotSaySoAreRefused) {
  const std::string list = R"([{"as_tensors": [{"name": "made"}, {"name": "other"}]}])";
  const std::string both = R"("tensors": {"as_tensors": [{"name": "p_places_weight"}, {"name": "add"}]})";
  const std::string dropped = R"({"input": $p_places_weight, "p": {"as_float": 0.5}, "train": {"as_bool": false}})";
  const auto refused = [](const std::string& target, const std::string& arguments,
                          const std::string& outputs = "[$made]") {
    EXPECT_THAT([&] { (void)load_exported_bytes(archive_that_writes(target, arguments, outputs)); },
                ThrowsError(ErrorCode::kUnsupportedModel, "writes to the weight or buffer 'places.weight'"))
        << target;
  };
  refused("type_as.default", R"({"self": $p_places_weight, "other": $add})");
  refused("dropout.default", dropped);
  refused("alpha_dropout.default", dropped);
  refused("feature_dropout.default", dropped);
  refused("sum_to_size.default", R"({"self": $p_places_weight, "size": {"as_ints": [24, 8]}})");
  refused("atleast_2d.default", R"({"self": $p_places_weight})");
  refused("atleast_2d.Sequence", "{" + both + "}", list);
  refused("broadcast_tensors.default", "{" + both + "}", list);
  refused("meshgrid.indexing", "{" + both + R"(, "indexing": {"as_string": "ij"}})", list);
  refused("einsum.default",
          R"({"equation": {"as_string": "ij->ji"}, "tensors": {"as_tensors": [{"name": "p_places_weight"}]}})");
  refused("unsafe_chunk.default", R"({"self": $p_places_weight, "chunks": {"as_int": 2}})", list);
}

TEST(ExportedWrites, ToProductsAreTaken) {
  const auto bytes = archive_that_writes("einsum.default", R"({"equation": {"as_string": "ij,kj->ik"},
                            "tensors": {"as_tensors": [{"name": "p_places_weight"}, {"name": "p_head_weight"}]}})");
  EXPECT_NO_THROW((void)load_exported_bytes(bytes));
}

TEST(ExportedWrites, OfRunningStatisticsAreRefused) {
  const auto with = [](const std::string& training) {
    return archive_with_nodes({node_of(
        "norm", "torch.ops.aten.batch_norm.default",
        R"({"input": $p_places_weight, "weight": {"as_none": true}, "bias": {"as_none": true},
            "running_mean": $p_layers_0_out_bias, "running_var": {"as_none": true}, "training": {"as_bool": )" +
            training +
            R"(}, "momentum": {"as_float": 0.1}, "eps": {"as_float": 1e-5}, "cudnn_enabled": {"as_bool": false}})",
        "[$norm]")});
  };
  EXPECT_THAT([&] { (void)load_exported_bytes(with("true")); },
              ThrowsError(ErrorCode::kUnsupportedModel, "writes to the weight or buffer 'layers.0.out.bias'"));
  EXPECT_NO_THROW((void)load_exported_bytes(with("false")));
}

/// What the last of some nodes makes of the ids 1 2 / 3 4.
at::Tensor made_by(const std::vector<Json>& nodes) {
  const auto bytes = archive_changed([&](Json& program) {
    Json& module = program.at("graph_module");
    auto& all = module.at("graph").at("nodes").get_ref<Json::array_t&>();
    all.insert(all.end(), nodes.begin(), nodes.end());
    module.at("signature").at("output_specs").at(0).at("user_output").at("arg") = nodes.back().at("outputs").at(0);
  });
  const auto ids = at::arange(1, 5, at::kLong).view({2, 2});
  return load_exported_bytes(bytes).forward({ids, at::ones_like(ids)}).toTensor();
}

at::Tensor made_by(const std::string& target, const std::string& arguments) {
  return made_by({node_of("made", "torch.ops.aten." + target, arguments, "[$made]")});
}

TEST(ExportedFlags, StandForNumbersWhereTheTypeFollowsFromSomethingElse) {
  const auto is = [](const at::Tensor& got, const at::Tensor& want) {
    return got.scalar_type() == want.scalar_type() && at::equal(got, want);
  };
  const auto all = at::ones({2, 2}, at::kLong);
  const std::string full = R"("size": {"as_ints": [2, 2]}, "fill_value": {"as_bool": true})";
  EXPECT_TRUE(is(made_by("full.default", "{" + full + "}"), all.to(at::kBool)));
  EXPECT_TRUE(is(made_by("full.default", "{" + full + R"(, "dtype": {"as_scalar_type": 7}})"), all.to(at::kFloat)));
  EXPECT_TRUE(is(made_by("full_like.default", R"({"self": $input_ids, "fill_value": {"as_bool": true}})"), all));
  EXPECT_TRUE(is(made_by("scalar_tensor.default", R"({"s": {"as_bool": true}})"), at::ones({})));
  const std::string flags = R"("self": $input_ids, "other": {"as_bool": true})";
  const auto first = at::zeros({2, 2}, at::kBool).index_fill_(1, at::zeros({1}, at::kLong), true);
  EXPECT_TRUE(is(made_by("eq.Scalar", "{" + flags + "}"), first.logical_and(at::arange(2).eq(0).view({2, 1}))));
  EXPECT_TRUE(is(made_by({node_of("eq", "torch.ops.aten.eq.Scalar", "{" + flags + "}", "[$eq]"),
                          node_of("made", "torch.ops.aten.masked_fill.Scalar",
                                  R"({"self": $eq, "mask": $eq, "value": {"as_bool": false}})", "[$made]")}),
                 at::zeros({2, 2}, at::kBool)));
}

TEST(ExportedFlags, AreRefusedByNameWhereTheyDecideTheType) {
  EXPECT_THAT(
      [] { made_by("where.Scalar", R"({"condition": $and_1, "self": {"as_bool": true}, "other": {"as_int": 2}})"); },
      ThrowsError(ErrorCode::kUnsupportedModel, "is given True as the number 'self'"));
  EXPECT_THAT([] { made_by("mul.Tensor", R"({"self": $input_ids, "other": {"as_bool": false}})"); },
              ThrowsError(ErrorCode::kUnsupportedModel, "give 0 in forward(), or torch.tensor(False)"));
}

// --- encoder-decoders -----------------------------------------------------------------------------------

/// The decoder, with the mean over sources of any length added in front of its layers; with `guard` beside those that
/// it has, and the sources' tokens called `symbol`.
std::string encoder_decoder(const std::string& guard, const std::string& symbol = "s99") {
  const std::string aten = "torch.ops.aten.";
  const std::vector<Json> nodes{
      node_of("source", aten + "embedding.default", R"({"weight": $p_tokens_weight, "indices": $source})", "[$states]"),
      node_of("mean", aten + "mean.dim", R"({"self": $states, "dim": {"as_ints": [1]}, "keepdim": {"as_bool": true}})",
              "[$mean]"),
      node_of("sum", aten + "add.Tensor", R"({"self": $add, "other": $mean})", "[$sum]")};
  Records records = records_of(archive_with_nodes(nodes, "linear", "add", "sum"));
  Json program = Json::parse(records.at(kProgram));
  Json& module = program.at("graph_module");
  module.at("signature").at("input_specs").push_back(parsed(R"({"user_input": {"arg": $source}})"));
  Json& sizes = module.at("graph").at("tensor_values");
  sizes["source"] = Json(sizes.at("input_ids"));
  sizes["source"]["sizes"][1]["as_expr"]["expr_str"] = "Symbol('" + symbol + "', positive=True, integer=True)";
  program.at("guards_code").push_back("L['input_ids'].size()[0] == L['source'].size()[0]");
  program.at("guards_code").push_back(guard);
  records.at(kProgram) = program.dump();
  return archive_of(records);
}

Inputs sources_and_targets(std::int64_t source, std::int64_t target) {
  at::manual_seed(static_cast<std::uint64_t>(source * 100 + target));
  const auto ids = at::randint(1, 16, {2, target}, at::kLong);
  return {ids, at::ones_like(ids), at::randint(1, 16, {2, source}, at::kLong)};
}

TEST(ExportedEncoderDecoder, EachSideHasItsOwnLimit) {
  const auto program = load_exported_bytes(encoder_decoder("L['source'].size()[1] <= 30"));
  EXPECT_EQ(program.most_tokens(), 23);
  LayerCache cache(program);
  ASSERT_THAT(cache.profile().source_arguments, ::testing::ElementsAre(2)) << cache.profile().to_string();
  EXPECT_EQ(cache.profile().max_tokens, 23);
  for (const auto& [source, target] : std::vector<std::pair<std::int64_t, std::int64_t>>{{30, 23}, {3, 9}, {9, 3}}) {
    const auto inputs = sources_and_targets(source, target);
    EXPECT_TRUE(at::allclose(cache.forward(inputs).toTensor(), program.forward(inputs).toTensor(), 1e-4, 1e-5));
  }
  EXPECT_THAT([&] { cache.forward(sources_and_targets(31, 9)); },
              ThrowsError(ErrorCode::kInvalidInput, "sources have 31 tokens with their padding"));
  EXPECT_THAT([&] { cache.forward(sources_and_targets(30, 24)); },
              ThrowsError(ErrorCode::kInvalidInput, "rows have 24 tokens with their padding"));
}

TEST(ExportedEncoderDecoder, SidesThatAreComparedAreRefused) {
  const std::string equal = "L['input_ids'].size()[1] == L['source'].size()[1]";
  const std::string shorter = "L['input_ids'].size()[1] <= L['source'].size()[1]";
  for (const auto& bytes : {encoder_decoder(equal), encoder_decoder(shorter), encoder_decoder("1 == 1", "s53")}) {
    const auto program = load_exported_bytes(bytes);
    EXPECT_THAT([&] { LayerCache cache(program); },
                ThrowsError(ErrorCode::kUnsupportedModel, "of the same number of tokens only"));
  }
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

/// Places in a text of `size` characters: all of a short one, and `count` of a long one.
std::vector<std::size_t> places(std::size_t size, std::size_t count) {
  std::vector<std::size_t> all;
  for (std::size_t i = 0; i < std::min(size, count); ++i) all.push_back(size <= count ? i : i * size / count);
  return all;
}

#ifdef LLMCACHE_TESTS_SANITIZED
constexpr std::size_t kPlaces = 3;  // a place takes some 60 ms
#else
constexpr std::size_t kPlaces = 24;
#endif

/// What is read of a file that was cut, by the kind of the file.
std::string expected_of_cut(const std::string& record) {
  if (record.ends_with(".json")) return "is not JSON";
  if (record.starts_with("data/weights/") || record.starts_with("data/constants/")) return "is larger than its file";
  return record == "archive_format" ? "was not written by torch.export.save()" : "";
}

class ShortErrors : public ::testing::Test {
 protected:
  // Each error of LibTorch's takes ten milliseconds with a stack trace.
  static void SetUpTestSuite() {
    c10::SetStackTraceFetcher([] { return std::string(); });
  }
};
using DamagedExport = ShortErrors;

TEST_F(DamagedExport, CutAnywhereIsRefused) {
  ASSERT_THAT(wrong_answer(small_bytes()), IsEmpty());
  const auto refused = [](std::size_t size) {
    EXPECT_THAT([&] { (void)load_exported_bytes(std::string_view(small_bytes()).substr(0, size)); },
                ThrowsError(ErrorCode::kInvalidFile, "its end is missing"))
        << size;
  };
  for (const std::size_t size : places(small_bytes().size(), 10 * kPlaces)) refused(size);
  for (std::size_t left_out = 1; left_out < 30; ++left_out) refused(small_bytes().size() - left_out);
}

TEST_F(DamagedExport, RecordsThatWereCutAreRefused) {
  const Records sound = records_of(small_bytes());
  for (const auto& [name, content] : sound) {
    const std::string why = expected_of_cut(name);
    if (why.empty()) continue;
    for (const std::size_t size : places(content.size(), kPlaces)) {
      Records records = sound;
      records.at(name).resize(size);
      EXPECT_THAT([&] { (void)load_exported_bytes(archive_of(records)); }, ThrowsError(ErrorCode::kInvalidFile, why))
          << name << " cut to " << size;
    }
  }
}

/// The bytes of an archive that are flipped: some of each file in it, and of what stands around them.
std::vector<std::size_t> flips(const std::string& bytes) {
  std::vector<std::size_t> all;
  for (const auto& [name, content] : records_of(bytes)) {
    const std::size_t begin = content.empty() ? std::string::npos : bytes.find(content);
    if (begin == std::string::npos) continue;
    const std::size_t count = name == kProgram ? 8 * kPlaces : kPlaces;
    for (const std::size_t at : places(content.size(), count)) all.push_back(begin + at);
  }
  const std::size_t index = bytes.find("PK\1\2");  // of what is in the archive, behind it
  for (const std::size_t at : places(bytes.size() - index, 4 * kPlaces)) all.push_back(index + at);
  for (const std::size_t at : places(index, 4 * kPlaces)) all.push_back(at);
  return all;
}

TEST_F(DamagedExport, FlippedAnywhereIsReadOrRefused) {
  const auto sound = content_of(small_bytes());
  ASSERT_TRUE(sound);
  std::size_t tried = 0;
  for (const std::size_t at : flips(small_bytes())) {
    const std::string bytes = flipped(small_bytes(), at, at);
    const auto content = content_of(bytes);
    // What is made of an equal program, and of equal weights but for their numbers, is known. Of those that are no
    // program some show how they are refused.
    if (content ? *content != *sound : ++tried % 50 == 0) {
      ASSERT_THAT(wrong_answer(bytes), IsEmpty()) << at;
    }
  }
  EXPECT_GT(tried, kPlaces);
}

}  // namespace
}  // namespace llmcache::test
