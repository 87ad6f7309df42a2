// Generation of targets, greedily and by beam search: what transformers generates, and each source computed once.
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "encoder_decoder_support.h"

namespace llmcache::test {
namespace {

/// Beam search as transformers does it where no sequence ends: the end token is never chosen, and no token twice. One
/// beam: greedy. All beams of all sources are one batch.
class BeamSearch {
 public:
  BeamSearch(LayerCacheBase& cache, std::vector<Ids> sources, std::int64_t start, std::int64_t end, std::size_t beams)
      : cache_(cache), sources_(std::move(sources)), end_(end), beams_(beams) {
    for (std::size_t s = 0; s < sources_.size(); ++s) {
      for (std::size_t b = 0; b < beams; ++b) all_.push_back({{start}, b == 0 ? 0.0 : -1e9});
    }
  }

  void step() {
    std::vector<Row> batch;
    for (std::size_t i = 0; i < all_.size(); ++i) batch.push_back({sources_[i / beams_], all_[i].ids});
    const auto request = request_of(cache_.profile(), batch);
    const auto logits = cache_.forward(request.inputs, {.output = Output::kLastToken}).toTensor().select(1, 0);
    auto scores = logits.to(at::kDouble).log_softmax(1);
    std::vector<Beam> next;
    for (std::size_t s = 0; s < sources_.size(); ++s) choose(s, scores, next);
    all_ = std::move(next);
  }

  /// Of each source the best.
  [[nodiscard]] std::vector<Ids> best() const {
    std::vector<Ids> found;
    for (std::size_t s = 0; s < sources_.size(); ++s) found.push_back(all_[s * beams_].ids);
    return found;
  }

 private:
  struct Beam {
    Ids ids;
    double score = 0;
  };

  void choose(std::size_t s, const at::Tensor& scores, std::vector<Beam>& next) const {
    std::vector<Beam> candidates;
    for (std::size_t b = 0; b < beams_; ++b) {
      const Beam& from = all_[s * beams_ + b];
      const double* own = scores.const_data_ptr<double>() + static_cast<std::int64_t>(s * beams_ + b) * scores.size(1);
      for (std::int64_t id = 0; id < scores.size(1); ++id) {
        if (id == end_ || std::find(from.ids.begin(), from.ids.end(), id) != from.ids.end()) continue;
        candidates.push_back({from.ids, from.score + own[id]});
        candidates.back().ids.push_back(id);
      }
    }
    std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(beams_), candidates.end(),
                      [](const Beam& a, const Beam& b) { return a.score > b.score; });
    for (std::size_t b = 0; b < beams_; ++b) next.push_back(std::move(candidates[b]));
  }

  LayerCacheBase& cache_;
  std::vector<Ids> sources_;
  std::int64_t end_;
  std::size_t beams_;
  std::vector<Beam> all_;
};

/// In float32. In bfloat16 tokens tie, and which comes first is nobody's promise.
class EncoderDecoderGeneration : public EncoderDecoder {};

TEST_P(EncoderDecoderGeneration, GeneratesWhatTransformersGenerate) {
  const std::filesystem::path models = std::getenv("LLMCACHE_MODELS_DIR");
  const auto sidecar = nlohmann::json::parse(std::ifstream(models / (GetParam() + ".json")));
  const auto& known = sidecar.at("generations");
  const auto sources = known.at("sources").get<std::vector<Ids>>();
  std::int64_t source_tokens = 0;
  for (const Ids& source : sources) source_tokens += static_cast<std::int64_t>(source.size());
  for (const bool beams : {false, true}) {
    const auto want = known.at(beams ? "beam" : "greedy").get<std::vector<Ids>>();
    const auto width = beams ? known.at("beams").get<std::size_t>() : 1;
    auto cache = cache_with({});
    BeamSearch search(cache, sources, want[0][0], known.at("end").get<std::int64_t>(), width);
    const std::size_t steps = want[0].size() - 1;
    for (std::size_t i = 0; i < steps; ++i) search.step();
    EXPECT_EQ(search.best(), want) << (beams ? "beam search" : "greedy");
    // Each source is computed once; so is what the beams of a source begin with, then one token a beam and step.
    const Stats stats = cache.stats();
    EXPECT_EQ(stats.source_tokens, static_cast<std::uint64_t>(source_tokens) * width * steps);
    EXPECT_EQ(stats.source_tokens - stats.source_reused, static_cast<std::uint64_t>(source_tokens));
    EXPECT_EQ(stats.tokens_computed, sources.size() * (1 + width * (steps - 1)));
  }
}

TEST_P(EncoderDecoderGeneration, GenerateContinuesTargets) {
  std::mt19937 random(21);
  const std::vector<Ids> sources{random_ids(random, 8), random_ids(random, 5)};
  std::vector<Ids> prompts{{0, 31}, {0, 17, 44}};
  auto cache = cache_with({});
  const auto got = generate_batch(cache, prompts, {.max_new_tokens = 4, .sources = sources});
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    Ids target = prompts[i];
    Ids want;
    for (int step = 0; step < 4; ++step) {
      const auto logits = plain(request_of(profile(), {{sources[i], target}})).toTensor();
      want.push_back(logits[0][-1].argmax().item<std::int64_t>());
      target.push_back(want.back());
    }
    EXPECT_EQ(got[i].tokens, want);
  }
  EXPECT_THAT([&] { (void)generate_batch(cache, prompts, {.sources = {sources[0]}}); },
              ThrowsError(ErrorCode::kInvalidInput, "1 sources, 2 expected: one for each prompt"));
  EXPECT_THAT(
      [&] {
        (void)generate_batch(cache, prompts, {.sources = {sources[0], {}}});
      },
      ThrowsError(ErrorCode::kInvalidInput, "source 1 has no token"));
}

std::vector<std::string> in_float32() {
  auto names = model_names({"seq2seq-"});
  std::erase_if(names, [](const std::string& name) { return name.ends_with("-bf16"); });
  return names;
}

INSTANTIATE_TEST_SUITE_P(Seq2Seq, EncoderDecoderGeneration, ::testing::ValuesIn(in_float32()), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, EncoderDecoderGeneration, ::testing::ValuesIn(program_names({"seq2seq-"})),
                         test_name);

}  // namespace
}  // namespace llmcache::test
