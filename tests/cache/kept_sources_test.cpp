// What is kept of a source without a copy, and what is not.
#include <memory>
#include <vector>

#include "encoder_decoder_support.h"

namespace llmcache::test {

/// Where the tensors that follow from sources were made, and where the layers found them.
struct Places {
  std::vector<std::vector<const void*>> made, found;
};

struct WithPlaces {
  std::shared_ptr<Places> places;
};

}  // namespace llmcache::test

template <>
struct llmcache::ModelTraits<llmcache::test::WithPlaces> {
  static std::unique_ptr<llmcache::Model> wrap(llmcache::test::WithPlaces model, const llmcache::Options& options);
};

namespace llmcache::test {
namespace {

constexpr std::int64_t kHidden = 8;

std::vector<const void*> places_of(const std::vector<at::Tensor>& tensors) {
  std::vector<const void*> places;
  for (const at::Tensor& tensor : tensors) places.push_back(tensor.const_data_ptr());
  return places;
}

/// States of its own, seen through a view; half of a larger tensor; and the caller's ids as they are.
class SourcesOfAllKinds final : public SourceModel {
 public:
  SourcesOfAllKinds(const at::Tensor& table, Places& places) : table_(table), places_(places) {}
  std::vector<at::Tensor> run(const Inputs& inputs) const override {
    const auto& ids = inputs.at(0).toTensor();
    const auto states = at::embedding(table_, ids).cumsum(1);
    const auto twice = at::cat({states.cos(), states.sin()}, 2);
    std::vector<at::Tensor> values{states.tanh().transpose(1, 2), twice.narrow(2, 0, kHidden), ids};
    places_.made.push_back(places_of(values));
    return values;
  }
  const std::vector<int>& token_dims() const override { return dims_; }
  bool shareable() const override { return true; }

 private:
  const at::Tensor& table_;
  Places& places_;
  std::vector<int> dims_{2, 1, 1};
};

class ModelWithPlaces final : public TwoLayers {
 public:
  explicit ModelWithPlaces(std::shared_ptr<Places> places) : places_(std::move(places)) {}

  Activations embed(const Inputs& inputs) const override {
    const auto values = inputs.size() > 2 ? inputs[2].toTensorVector() : sources_.run(inputs);
    if (inputs.size() > 2) places_->found.push_back(places_of(values));
    const auto of_source = values[0].transpose(1, 2).add(values[1]).add(values[2].unsqueeze(2).mul(0.01));
    return {at::embedding(table_, inputs.at(1).toTensor()) + of_source.mean(1, /*keepdim=*/true), nullptr};
  }
  std::string digest() const override { return "sources of all kinds"; }
  const SourceModel* source() const override { return &sources_; }

 private:
  std::shared_ptr<Places> places_;
  at::Tensor table_ = at::arange(300 * kHidden, at::kFloat).view({300, kHidden}).sin();
  SourcesOfAllKinds sources_{table_, *places_};
};

class KeptSources : public ::testing::Test {
 protected:
  [[nodiscard]] at::Tensor ids(std::size_t tokens) { return at::tensor(random_ids(random_, tokens)).unsqueeze(0); }

  /// The report of a call that gives what the model gives.
  ForwardReport ask(const at::Tensor& source, const at::Tensor& target) {
    const auto got = cache_.forward({source, target}).toTensor();
    EXPECT_TRUE(at::allclose(got, plain_.plain({source, target}).toTensor()));
    return cache_.last_report();
  }

  std::shared_ptr<Places> places_ = std::make_shared<Places>();
  ModelWithPlaces plain_{std::make_shared<Places>()};
  LayerCache<WithPlaces> cache_{WithPlaces{places_}, {.verify_rate = 0}};
  std::mt19937 random_{31};
};

TEST_F(KeptSources, WhatIsTheCallsAloneIsNotCopied) {
  ASSERT_TRUE(cache_.profile().source_reuse) << cache_.profile().to_string();
  *places_ = {};
  const auto source = ids(12);
  ask(source, ids(5));
  EXPECT_EQ(ask(source.clone(), ids(6)).sequences.at(0).source_reused, 12);
  ASSERT_EQ(places_->made.size(), 1U);
  ASSERT_EQ(places_->found.size(), 2U);
  const auto& made = places_->made[0];
  const auto& kept = places_->found[1];
  EXPECT_EQ(places_->found[0], made);
  EXPECT_EQ(kept[0], made[0]) << "a view of what nobody else holds";
  EXPECT_NE(kept[1], made[1]) << "half of what it would hold on to";
  EXPECT_NE(kept[2], made[2]) << "the caller's own";
}

TEST_F(KeptSources, NobodyWritesToThem) {
  const auto source = ids(12);
  const auto same = source.clone();
  ask(source, ids(5));
  source.fill_(7);
  const auto result = cache_.forward({same, ids(5)}).toTensor();
  result.zero_();
  EXPECT_EQ(ask(same, ids(6)).sequences.at(0).source_reused, 12);
  EXPECT_EQ(ask(source, ids(6)).sequences.at(0).source_reused, 0);
}

TEST_F(KeptSources, TheirBytesAreTrue) {
  const auto bytes_of = [&] {
    for (const BankStats& bank : cache_.stats().banks) {
      if (bank.name == "sources") return bank.bytes;
    }
    return std::size_t{0};
  };
  ask(ids(12), ids(5));
  const auto one = bytes_of();
  const std::size_t data = 12 * (2 * kHidden * sizeof(float) + sizeof(std::int64_t));
  EXPECT_GE(one, data);
  // Rows of one batch are views of what they have in common: these are copied, and take as much.
  (void)cache_.forward({at::cat({ids(12), ids(12)}), at::cat({ids(5), ids(5)})});
  EXPECT_GE(bytes_of(), one + 2 * data);
  EXPECT_LE(bytes_of(), 3 * one);
  cache_.clear();
  EXPECT_EQ(bytes_of(), 0U);
}

}  // namespace
}  // namespace llmcache::test

std::unique_ptr<llmcache::Model> llmcache::ModelTraits<llmcache::test::WithPlaces>::wrap(
    llmcache::test::WithPlaces model, const llmcache::Options& /*options*/) {
  return std::make_unique<llmcache::test::ModelWithPlaces>(std::move(model.places));
}
