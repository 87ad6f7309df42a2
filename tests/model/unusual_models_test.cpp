// Models of unusual form: nested tensors, lists of states that grow from layer to layer, keys and values among the
// outputs. Each is wrapped and right, or refused in words that say what to change.
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr std::int64_t kRows = 5;  // unlike the numbers of layers and heads
const std::vector<std::int64_t> kLengths = {11, 7, 5, 10, 2};

/// The real entries of a row, wherever its dimensions are; sizes tell, for none of them is like another.
at::Tensor real_entries(at::Tensor leaf, const Request& request, std::size_t row) {
  for (std::int64_t d = leaf.dim() - 1; d >= 0; --d) {
    if (leaf.size(d) == request.padded_length) {
      leaf = leaf.narrow(d, request.spans[row].first, request.spans[row].tokens);
    } else if (leaf.size(d) == request.rows() && request.rows() == kRows) {
      leaf = leaf.narrow(d, static_cast<std::int64_t>(row), 1);
    }
  }
  return leaf;
}

void expect_right(const c10::IValue& got, const c10::IValue& want, const Request& request) {
  const auto a = leaves(got);
  const auto b = leaves(want);
  ASSERT_EQ(got.tagKind(), want.tagKind());
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].sizes(), b[i].sizes()) << i;
    for (std::size_t row = 0; row < request.spans.size(); ++row) {
      const auto x = real_entries(a[i], request, row);
      const auto y = real_entries(b[i], request, row);
      const double scale = std::max(1e-6, y.abs().max().item<double>());
      EXPECT_LE((x - y).abs().max().item<double>(), 1e-4 * scale) << "tensor " << i << ", row " << row;
    }
  }
}

/// The first `tokens` tokens of a request of one row.
Request beginning_of(const Request& whole, std::int64_t tokens) {
  Request request;
  for (const c10::IValue& input : whole.inputs) request.inputs.emplace_back(input.toTensor().narrow(1, 0, tokens));
  request.spans = {{0, tokens}};
  request.padded_length = tokens;
  return request;
}

std::vector<Request> requests_for(const ModelInfo& info) {
  std::vector<Request> requests;
  requests.push_back(right_padded(info, {9}, 1));
  requests.push_back(right_padded(info, kLengths, 2));
  requests.push_back(requests.back());
  requests.push_back(right_padded(info, {11, 11, 11, 11, 11}, 3));
  requests.push_back(left_padded(info, kLengths, 4));
  const auto whole = right_padded(info, {14}, 5);
  for (std::int64_t tokens = 6; tokens <= 14; ++tokens) requests.push_back(beginning_of(whole, tokens));
  requests.push_back(requests[1].alone(1));                          // known from a batch
  requests.push_back(right_padded(info, {11, 7, 5, 10, 2}, 2, 13));  // the same padded further
  return requests;
}

class UnusualModels : public ::testing::TestWithParam<std::string> {};

std::vector<std::string> unusual(bool nested) {
  auto names = model_names({"unusual-"});
  std::erase_if(names, [&](const std::string& name) { return name.starts_with("unusual-nested") != nested; });
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, UnusualModels, ::testing::ValuesIn(unusual(false)), test_name);

TEST_P(UnusualModels, AreRight) {
  const auto info = model_info(GetParam());
  auto module = load_model(GetParam());
  for (const auto fidelity : {Fidelity::kLossless, Fidelity::kIdentical}) {
    LayerCache<Module> cache(load_model(GetParam()), Options{.fidelity = fidelity});
    std::size_t number = 0;
    for (const Request& request : requests_for(info)) {
      SCOPED_TRACE(testing::Message() << to_string(fidelity) << ", request " << number++);
      const auto want = run_plain(module, request.inputs);
      expect_right(cache.forward(request.inputs), want, request);
      expect_right(cache.forward(request.inputs), want, request);
    }
    if (cache.profile().rows_independent) {
      EXPECT_GT(cache.stats().identical_hits, 0U);
    }
  }
}

/// What is not available is said in words, and what to change; what PyTorch said may stand behind that.
TEST_P(UnusualModels, NotesSayWhatToChange) {
  LayerCache<Module> cache(load_model(GetParam()), Options{.capacity_bytes = 0});
  const auto profile = cache.profile().to_string();
  if (GetParam().find("keys") != std::string::npos || GetParam().find("past") != std::string::npos) {
    EXPECT_EQ(cache.profile().granularity, Granularity::kPacked) << profile;
    EXPECT_THAT(profile, AllOf(HasSubstr("keys and values"), HasSubstr("use_cache=False")));
  } else if (GetParam() == "unusual-states-back") {
    EXPECT_EQ(cache.profile().granularity, Granularity::kTokens) << profile;  // only its last state is returned
  } else if (GetParam().find("states") != std::string::npos) {
    EXPECT_EQ(cache.profile().granularity, Granularity::kPacked) << profile;
    EXPECT_THAT(profile, HasSubstr("output_hidden_states=False"));
  } else {
    EXPECT_THAT(profile, HasSubstr("set_fastpath_enabled(False)"));
  }
  EXPECT_THAT(profile, AllOf(Not(HasSubstr("exceeds dimension size")), Not(HasSubstr("' backend"))));
}

class NestedModels : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, NestedModels, ::testing::ValuesIn(unusual(true)), test_name);

TEST_P(NestedModels, AreRefusedWithTheWayOut) {
  EXPECT_THAT([] { LayerCache<Module> cache(load_model(GetParam())); },
              ThrowsError(ErrorCode::kUnsupportedModel, "construct it with enable_nested_tensor=False"));
  try {
    LayerCache<Module> cache(load_model(GetParam()));
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), Not(HasSubstr("' backend")));
  }
}

TEST(UnusualModelsAll, AreExported) {
  EXPECT_EQ(unusual(true).size(), 3U);
  EXPECT_EQ(unusual(false).size(), 14U);
}

/// What is complete before the layers run may be made in any way.
TEST(UnusualLists, MayBeMadeAnyhowBeforeTheLayers) {
  Script script;
  std::string forward =
      Script::with(Script::kForward, "    bias =", "    hs: List[Tensor] = [x, x]\n    hs[0] = 2 * x\n    bias =");
  script.forward = Script::with(forward, "return torch.tanh(x)", "return torch.tanh(x) + hs[0] + hs[-1]");
  auto module = make_module(script);
  LayerCache<Module> cache(make_module(script));
  for (const Request& request : requests_for(script_info(script))) {
    expect_right(cache.forward(request.inputs), run_plain(module, request.inputs), request);
  }
}

/// Lists that are changed otherwise than by append().
TEST(UnusualLists, AreRefusedByName) {
  for (const char* change : {"hs.insert(0, x)", "hs += [x]", "hs[0] = x", "hs.extend([x, x])", "hs.pop()"}) {
    Script script;
    std::string forward =
        Script::with(Script::kForward, "    bias =", "    hs: List[Tensor] = [x, x, x, x]\n    bias =");
    forward = Script::with(forward, "    x = self.l2", std::string("    ") + change + "\n    x = self.l2");
    script.forward = Script::with(forward, "return torch.tanh(x)", "return torch.tanh(x) + hs[0] + hs[-1]");
    EXPECT_THAT([&] { LayerCache<Module> cache(make_module(script)); },
                ThrowsError(ErrorCode::kUnsupportedModel, "between its layers by other means than append()"))
        << change;
  }
}

/// A list that was put into the result before it was complete must be found complete there.
TEST(UnusualLists, WhoKeepsThemSeesTheAppends) {
  Script script;
  std::string forward = Script::with(Script::kForward, "-> Tensor:", "-> Tuple[List[Tensor], Tensor]:");
  forward = Script::with(forward, "    bias =", "    hs: List[Tensor] = []\n    result = (hs, x)\n    bias =");
  forward = Script::with(forward, "    x = self.l2", "    hs.append(x)\n    x = self.l2");
  script.forward = Script::with(forward, "return torch.tanh(x)", "return result");
  EXPECT_THAT([&] { LayerCache<Module> cache(make_module(script)); }, ThrowsError(ErrorCode::kUnsupportedModel));
}

}  // namespace
}  // namespace llmcache::test
