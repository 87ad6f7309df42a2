// Wraps a hand-written torch::nn encoder: a few lines make it a llmcache::LayeredModel, which runs
// whole layers and keeps the outputs of identical requests.
#include <llmcache/layer_cache.h>
#include <torch/torch.h>

#include <iostream>

namespace {

/// A small encoder as somebody may have written it, before LLMCache.
struct EncoderImpl : torch::nn::Module {
  EncoderImpl() {
    embedding = register_module("embedding", torch::nn::Embedding(1000, 64));
    for (int i = 0; i < 4; ++i) {
      layers->push_back(torch::nn::TransformerEncoderLayer(
          torch::nn::TransformerEncoderLayerOptions(64, 4).dim_feedforward(128).dropout(0.0)));
    }
    register_module("layers", layers);
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({64})));
  }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::ModuleList layers;
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Encoder);

/// The lines that LLMCache needs.
class LayeredEncoder {
 public:
  explicit LayeredEncoder(Encoder encoder) : encoder_(std::move(encoder)) { encoder_->eval(); }

  llmcache::Activations embed(const llmcache::Inputs& inputs) const {
    auto encoder = encoder_;
    auto padding = std::make_shared<torch::Tensor>();
    if (inputs.size() > 1 && inputs[1].isTensor()) *padding = inputs[1].toTensor().eq(0);
    return {encoder->embedding(inputs.at(0).toTensor()), padding};
  }
  std::int64_t layers() const { return static_cast<std::int64_t>(encoder_->layers->size()); }
  void layer(std::int64_t i, llmcache::Activations& activations) const {
    const auto& padding = *static_cast<torch::Tensor*>(activations.context.get());
    auto encoder = encoder_;
    auto* block = encoder->layers[static_cast<std::size_t>(i)]->as<torch::nn::TransformerEncoderLayer>();
    // torch::nn::TransformerEncoderLayer wants [tokens, batch, hidden].
    activations.hidden = block->forward(activations.hidden.transpose(0, 1), {}, padding).transpose(0, 1);
  }
  c10::IValue head(llmcache::Activations& activations) const {
    auto encoder = encoder_;
    return encoder->norm(activations.hidden);
  }
  at::Device device() const { return encoder_->parameters().front().device(); }
  at::ScalarType dtype() const { return encoder_->parameters().front().scalar_type(); }
  std::string digest() const { return "encoder, 4 layers, seed 0"; }
  llmcache::InputSpec input_spec() const { return {{"input_ids", "attention_mask"}, {false, true}, {1000, 0}}; }

 private:
  Encoder encoder_;
};

}  // namespace

int main() {
  torch::manual_seed(0);
  const LayeredEncoder model{Encoder()};
  llmcache::LayerCache cache(model, {.capacity_bytes = 1u << 20});
  std::cout << cache.profile().to_string();

  const auto ids = torch::randint(1000, {2, 12}, torch::kLong);
  const auto mask = torch::ones_like(ids);
  const auto first = cache.forward({ids, mask}).toTensor();
  const auto again = cache.forward({ids, mask}).toTensor();
  std::cout << cache.last_report().to_string() << cache.stats().to_string() << "\n";
  return torch::equal(first, again) && cache.stats().identical_hits == 2 ? 0 : 1;
}
