// Layers that repeat the one before are not run to be labelled: their labels are those that a run would give.
#include "model/probe.h"
#include "model/torchscript_repeated_layers.h"
#include "support.h"

namespace llmcache::test {
namespace {

struct Flat {
  explicit Flat(const std::string& name)
      : module(load_model(name)), graph(ts::flatten(module, ts::find_chains(module, "").front())) {
    InputSpec spec;
    spec.vocabulary = ts::input_vocabulary(graph, module);
    for (const auto& [rows, tokens] : ts::kLabelShapes) inputs.push_back(probe_inputs(spec, at::kCPU, rows, tokens));
  }
  [[nodiscard]] ts::ValueInfos of_all_layers() const {
    std::vector<ts::Values> runs;
    for (const Inputs& given : inputs) runs.push_back(ts::run_all(graph, module, given));
    return ts::label_values(runs, false);
  }
  Module module;
  ts::FlatGraph graph;
  std::vector<Inputs> inputs;
};

class RepeatedLayers : public ::testing::TestWithParam<const char*> {};

TEST_P(RepeatedLayers, HaveTheLabelsOfARunOfAll) {
  const Flat flat(GetParam());
  std::vector<ts::Values> runs;
  const auto infos = ts::label_repeated(flat.graph, flat.module, flat.inputs, false, runs);
  ASSERT_TRUE(infos) << "its layers are alike";
  const auto want = flat.of_all_layers();
  std::size_t not_run = 0;
  for (const ts::Value* value : ts::labelled_values(flat.graph)) {
    ASSERT_EQ(infos->count(value), 1U) << value->debugName();
    EXPECT_TRUE(infos->at(value) == want.at(value)) << value->debugName();
    not_run += runs.front().count(value) == 0 ? 1 : 0;
  }
  EXPECT_GT(not_run, 0U);
}

INSTANTIATE_TEST_SUITE_P(Models, RepeatedLayers,
                         ::testing::Values("tiny-bert-sdpa", "tiny-bert-eager", "tiny-gpt2-sdpa", "tiny-gpt2-eager",
                                           "tiny-llama-sdpa", "tiny-distilbert-sdpa"));

TEST(RepeatedLayersFinder, LayersOfTwoKindsDoNotRepeat) {
  const Flat flat("zoo-t5-encoder");  // the first makes a bias that the others take
  EXPECT_FALSE(ts::find_repetition(flat.graph, flat.module));
}

}  // namespace
}  // namespace llmcache::test
