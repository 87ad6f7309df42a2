// Models that write to what they hold while they run: safe writes are taken out, others are refused by name.
#include "support.h"

namespace llmcache::test {
namespace {

struct State {
  std::string name;
  std::string lines;           ///< in front of the layers; x
  std::string writes_to = "";  ///< refused, naming this; empty: allowed
  std::string after = "";      ///< lines behind the layers
};

std::ostream& operator<<(std::ostream& out, const State& state) { return out << state.name; }

const std::vector<State> kStates{
    {"counter_nobody_reads", "    self.calls.add_(1)"},
    {"two_writes_nobody_reads", "    self.calls.add_(1)\n    self.calls.mul_(2)"},
    {"log_nobody_reads", "    self.kept.append(x * 2.0)"},
    {"table_overwritten_first", "    self.table2.copy_(torch.full([32], 0.5))\n    x = x * self.table2"},
    {"table_overwritten_first_with_a_branch",
     "    self.table2.copy_(torch.full([32], 0.5))\n    if input_ids.size(1) > 5:\n        x = x * self.factor\n"
     "    x = x * self.table2"},
    {"copy_of_a_buffer", "    own = self.table2.clone()\n    own.add_(1.0)\n    x = x * own"},
    {"source_that_changes_behind_the_copy",
     "    new = torch.full([32], 0.5)\n    self.table2.copy_(new)\n    new.mul_(3.0)\n    x = x * self.table2"},
    {"copy_of_a_list_of_numbers",
     "    sizes = list(self.sizes)\n    sizes.append(1)\n    x = x * float(len(sizes)) + float(len(self.sizes + [1]))"},
    {"list_that_holds_a_buffer", "    parts = [self.table2]\n    parts.append(self.factor)\n    x = x * parts[0]"},
    {"element_of_a_tuple", "    self.duo[0].add_(1.0)\n    x = x * self.duo[0]", "duo"},
    {"unpacked_tuple", "    a, b = self.duo\n    a.add_(1.0)\n    x = x * b * self.duo[0]", "duo"},
    {"values_of_a_dictionary",
     "    for held in self.named.values():\n        held.add_(1.0)\n    x = x * self.named['a']", "named"},
    {"put_into_a_list_first",
     "    parts = [x[0, 0]]\n    parts.append(self.table2)\n    parts[1].add_(1.0)\n    x = x * self.table2", "table2"},
    {"carried_around_a_loop",
     "    at = x[0, 0].clone()\n    for i in range(3):\n        at.add_(1.0)\n        at = self.table2\n    x = x * "
     "self.table2",
     "table2"},
    {"counter_that_is_read", "    self.calls.add_(1)\n    x = x * self.calls", "calls"},
    {"written_after_it_is_read", "    x = x * self.table2\n    self.table2.copy_(torch.full([32], 0.5))", "table2"},
    {"mean_that_is_carried_on", "    self.table2.mul_(0.9).add_(x.mean([0, 1]), alpha=0.1)\n    x = x - self.table2",
     "table2"},
    {"written_in_part", "    self.table2[0:3].fill_(2.0)\n    x = x * self.table2", "table2"},
    {"written_in_a_branch",
     "    if input_ids.size(1) > 3:\n        self.table2.copy_(torch.full([32], 0.5))\n    x = x * self.table2",
     "table2"},
    {"list_that_grows", "    self.kept.append(x * 2.0)\n    x = x + float(len(self.kept))", "kept"},
    {"element_of_a_list", "    self.pair[0].add_(1.0)\n    x = x * self.pair[0]", "pair"},
    {"element_of_a_dictionary", "    self.named['a'].add_(1.0)\n    x = x * self.named['a']", "named"},
    {"dictionary_that_is_set", "    self.named['a'] = x.mean([0, 1])\n    x = x * self.named['a']", "named"},
    {"attribute_that_is_set", "    self.number = self.number + 1\n    x = x * float(self.number)", "number"},
    {"view_of_a_weight", "    self.alias.add_(1.0)", "alias"},
    {"given_as_out", "    torch.mul(self.table2, self.table2, out=self.table2)\n    x = x * self.table2", "table2"},
    {"what_type_as_returns_of_its_type", "    at = self.table2.type_as(x)\n    at.add_(1.0)\n    x = x * at", "table2"},
    {"what_dropout_returns_in_eval_mode",
     "    at = torch.dropout(self.table2, 0.5, False)\n    at.add_(1.0)\n    x = x * at", "table2"},
    {"what_feature_dropout_returns_in_eval_mode",
     "    at = torch.feature_dropout(self.table2, 0.5, False)\n    at.add_(1.0)\n    x = x * at", "table2"},
    {"what_broadcasting_returns",
     "    at, other = torch.broadcast_tensors([self.table2, x])\n    at.add_(1.0)\n    x = x * self.table2", "table2"},
    {"what_einsum_returns_of_one", "    at = torch.einsum('i->i', [self.table2])\n    at.add_(1.0)\n    x = x * at",
     "table2"},
    {"what_einsum_returns_of_two",
     "    at = torch.einsum('i,i->i', [self.table2, self.table2])\n    at.add_(1.0)\n    x = x * at"},
    {"a_part_that_is_said_to_be_none",
     "    at = self.table2.unsafe_chunk(2)[0]\n    at.add_(1.0)\n    x = x * self.table2", "table2"},
    {"running_statistics",
     "    x = torch.batch_norm(x.transpose(1, 2), None, None, self.table2, self.table3, True, 0.1, 1e-5, False)"
     ".transpose(1, 2)",
     "table2"},
    {"running_statistics_that_stay",
     "    x = torch.batch_norm(x.transpose(1, 2), None, None, self.table2, self.table3, False, 0.1, 1e-5, False)"
     ".transpose(1, 2)"},
    {"written_behind_the_layers", "    x = x * self.table2", "table2", "    self.table2.mul_(0.5)"},
};

Module module_of(const State& state) {
  Script script;
  script.forward = Script::with(script.forward, "    x = self.l0", state.lines + "\n    x = self.l0");
  if (!state.after.empty()) {
    script.forward = Script::with(script.forward, "    return", state.after + "\n    return");
  }
  script.attributes = [](Module& model) {
    model.register_buffer("calls", at::zeros({1}));
    model.register_buffer("table2", at::ones({32}));
    model.register_buffer("table3", at::ones({32}));
    model.register_buffer("factor", at::full({1}, 0.75));
    model.register_buffer("alias", model.attr("places").toTensor()[2]);
    model.register_attribute("kept", c10::ListType::ofTensors(), c10::List<at::Tensor>());
    model.register_attribute("pair", c10::ListType::ofTensors(),
                             c10::List<at::Tensor>({at::ones({32}), at::ones({32})}));
    c10::Dict<std::string, at::Tensor> named;
    named.insert("a", at::ones({32}));
    model.register_attribute("named", c10::DictType::create(c10::StringType::get(), c10::TensorType::get()), named);
    model.register_attribute("duo", c10::TupleType::create({c10::TensorType::get(), c10::TensorType::get()}),
                             c10::ivalue::Tuple::create({at::ones({32}), at::ones({32})}));
    model.register_attribute("sizes", c10::ListType::ofInts(), c10::List<std::int64_t>({1, 2}));
    model.register_attribute("number", c10::IntType::get(), std::int64_t{0});
  };
  return make_module(script);
}

class WrittenState : public ::testing::TestWithParam<State> {};

TEST_P(WrittenState, IsTakenOutOrRefusedByName) {
  const State& state = GetParam();
  if (!state.writes_to.empty()) {
    const auto module = module_of(state);
    const auto refusal = [&](const std::string& part) {
      EXPECT_THAT([&] { LayerCache<Module>{module}; }, ThrowsError(ErrorCode::kUnsupportedModel, part));
    };
    refusal("'" + state.writes_to + "'");
    refusal("'" + state.writes_to + "'");
    refusal("<string>:");  // where
    return;
  }
  auto plain = module_of(state);
  LayerCache<Module> cache(module_of(state));
  const auto info = script_info(Script{});
  const auto compare = [&](const Request& request) {
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, 1e-4));
  };
  for (int turn = 0; turn < 2; ++turn) {
    for (std::uint64_t seed = 1; seed < 5; ++seed) {
      compare(right_padded(info, {static_cast<std::int64_t>(3 * seed), 2}, seed));
      compare(right_padded(info, {12}, seed));
    }
  }
  EXPECT_GT(cache.stats().identical_hits, 0U) << cache.stats().to_string();
  EXPECT_TRUE(cache.stats().fallbacks.empty());
}

INSTANTIATE_TEST_SUITE_P(All, WrittenState, ::testing::ValuesIn(kStates),
                         [](const auto& param) { return param.param.name; });

TEST(WrittenState, OfTheCallersModuleIsLeftAlone) {
  const auto module = module_of(kStates[0]);
  LayerCache<Module> cache(module);
  const auto request = right_padded(script_info(Script{}), {6}, 1);
  cache.forward(request.inputs);
  const auto before = module.attr("calls").toTensor().item<float>();
  cache.forward(request.inputs);
  EXPECT_EQ(module.attr("calls").toTensor().item<float>(), before) << "an answer that was known";
}

}  // namespace
}  // namespace llmcache::test
