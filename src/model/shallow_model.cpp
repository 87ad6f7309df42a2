#include "model/shallow_model.h"

#include <utility>

#include "model/graph_findings.h"
#include "model/packing.h"

namespace llmcache {
namespace {

using Layers = std::vector<std::int64_t>;

class ShallowRun final : public TokenRun {
 public:
  ShallowRun(std::unique_ptr<TokenRun> run, const Layers& layers) : run_(std::move(run)), layers_(layers) {}

  void set_rows(const PackedLayout& layout, at::Tensor hidden) override { run_->set_rows(layout, std::move(hidden)); }
  const at::Tensor& hidden() const override { return run_->hidden(); }
  AttentionTensors before(std::int64_t l, std::int64_t s) override { return run_->before(at(l), s); }
  at::Tensor attend(std::int64_t l, std::int64_t s, std::size_t q, const std::vector<at::Tensor>& queries,
                    const std::vector<KeySegment>& keys) override {
    return run_->attend(at(l), s, q, queries, keys);
  }
  void after(std::int64_t l, std::int64_t s, at::Tensor attended) override {
    run_->after(at(l), s, std::move(attended));
  }
  void finish(std::int64_t l) override { run_->finish(at(l)); }
  c10::IValue head(const PackedLayout& placed) override { return unpack_rows(run_->hidden(), {0, 1, -1}, placed); }

 private:
  [[nodiscard]] std::int64_t at(std::int64_t l) const { return layers_.at(static_cast<std::size_t>(l)); }

  std::unique_ptr<TokenRun> run_;
  const Layers& layers_;
};

class ShallowTokens final : public TokenLevelModel {
 public:
  ShallowTokens(const TokenLevelModel& whole, const Layers& layers) : whole_(whole), layers_(layers) {}

  std::int64_t attention_ops(std::int64_t layer) const override { return whole_.attention_ops(at(layer)); }
  const std::vector<std::int64_t>& query_dims(std::int64_t layer, std::int64_t attention_op) const override {
    return whole_.query_dims(at(layer), attention_op);
  }
  const std::vector<std::int64_t>& key_dims(std::int64_t layer, std::int64_t attention_op) const override {
    return whole_.key_dims(at(layer), attention_op);
  }
  std::int64_t output_dim(std::int64_t layer, std::int64_t attention_op) const override {
    return whole_.output_dim(at(layer), attention_op);
  }
  bool partial() const override { return whole_.partial(); }
  bool self_contained() const override { return whole_.self_contained(); }
  bool head_tokenwise() const override { return true; }

  std::unique_ptr<TokenRun> start(const Activations& embedded, const PackedLayout& layout) const override {
    return shallow(whole_.start(embedded, layout));
  }
  std::unique_ptr<TokenRun> start_at(const std::vector<c10::IValue>& inputs, const at::Tensor& positions,
                                     const PackedLayout& layout) const override {
    return shallow(whole_.start_at(inputs, positions, layout));
  }

 private:
  [[nodiscard]] std::int64_t at(std::int64_t l) const { return layers_.at(static_cast<std::size_t>(l)); }
  [[nodiscard]] std::unique_ptr<TokenRun> shallow(std::unique_ptr<TokenRun> run) const {
    return run == nullptr ? nullptr : std::make_unique<ShallowRun>(std::move(run), layers_);
  }

  const TokenLevelModel& whole_;
  const Layers& layers_;
};

}  // namespace

std::shared_ptr<ShallowModel> ShallowModel::of(const std::shared_ptr<Model>& model) {
  const GraphFindings* findings = model->findings();
  const TokenLevelModel* token_level = model->token_level();
  if (findings == nullptr || token_level == nullptr) return nullptr;
  if (!token_level->head_tokenwise() && !token_level->head_chooses()) return nullptr;
  const Layers& distinct = findings->layers.distinct;
  if (distinct.empty() || static_cast<std::int64_t>(distinct.size()) == model->layers()) return nullptr;
  return std::make_shared<ShallowModel>(model, findings->layers);
}

ShallowModel::ShallowModel(std::shared_ptr<Model> model, LayerKinds layers)
    : model_(std::move(model)),
      kinds_(std::move(layers)),
      token_level_(std::make_unique<ShallowTokens>(*model_->token_level(), kinds_.distinct)) {}

}  // namespace llmcache
