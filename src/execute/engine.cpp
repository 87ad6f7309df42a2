#include "execute/engine.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "execute/clock.h"
#include "model/index_tensor.h"

namespace llmcache {
namespace {

/// Active tokens of every sequence in one layer, ascending.
using ActiveSets = std::vector<std::vector<std::int64_t>>;

ActiveSets active_in(const Plan& plan, std::int32_t layer) {
  ActiveSets sets;
  for (const SequencePlan& sequence : plan.sequences) {
    auto& set = sets.emplace_back();
    for (const TokenRange& range : sequence.ranges) {
      if (layer < range.first_layer || layer >= range.last_layer) continue;
      for (std::int64_t t = range.begin; t < range.end; ++t) set.push_back(t);
    }
  }
  return sets;
}

/// Matrix products take longer for a number of rows that fills no whole register tile (119 rows of
/// BERT-base: 3 % longer than 120), so that layouts of some size are filled up to a multiple of this.
constexpr std::int64_t kTile = 8;
constexpr std::int64_t kFilledFrom = 32;

std::int64_t filler_rows(std::int64_t rows) { return rows < kFilledFrom ? 0 : (kTile - rows % kTile) % kTile; }

/// Appends `rows` rows like the last one to what will be joined along `dim`.
void append_filler(std::vector<at::Tensor>& pieces, std::int64_t rows, std::int64_t dim) {
  if (rows == 0) return;
  const at::Tensor& last = pieces.back();
  auto shape = last.sizes().vec();
  shape[static_cast<std::size_t>(dim)] = rows;
  pieces.push_back(last.narrow(dim, last.size(dim) - 1, 1).expand(shape));
}

PackedLayout make_layout(const Plan& plan, const ActiveSets& active, at::Device device) {
  PackedLayout layout;
  layout.batch = plan.rows;
  layout.padded_length = plan.padded_length;
  std::vector<std::int64_t> position;
  std::vector<std::int64_t> flat;
  std::vector<std::int64_t> parts;  // active tokens of sequences that do not run whole
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    if (active[i].empty()) continue;
    PackedSequence packed{
        sequence.row, sequence.first, sequence.tokens, layout.rows, static_cast<std::int64_t>(active[i].size()), {}};
    if (packed.rows != packed.tokens) parts.insert(parts.end(), active[i].begin(), active[i].end());
    for (const std::int64_t t : active[i]) {
      position.push_back(sequence.first + t);
      flat.push_back(sequence.row * plan.padded_length + sequence.first + t);
    }
    layout.rows += packed.rows;
    layout.sequences.push_back(std::move(packed));
  }
  const std::int64_t filler = filler_rows(layout.rows);
  for (std::int64_t i = 0; i < filler; ++i) {
    position.push_back(position.back());
    flat.push_back(flat.back());
  }
  layout.rows += filler;
  // All of them by one copy.
  position.insert(position.end(), flat.begin(), flat.end());
  position.insert(position.end(), parts.begin(), parts.end());
  const at::Tensor all = index_tensor(position, device);
  layout.position = all.narrow(0, 0, layout.rows);
  layout.flat_index = all.narrow(0, layout.rows, layout.rows);
  std::int64_t at = 2 * layout.rows;
  for (PackedSequence& packed : layout.sequences) {
    if (packed.rows == packed.tokens) continue;
    packed.active = all.narrow(0, at, packed.rows);
    at += packed.rows;
  }
  return layout;
}

/// Index among plan.sequences of each sequence of the layout.
std::vector<std::size_t> listed(const ActiveSets& active) {
  std::vector<std::size_t> indices;
  for (std::size_t i = 0; i < active.size(); ++i) {
    if (!active[i].empty()) indices.push_back(i);
  }
  return indices;
}

/// Puts the sequences' results side by side along `dim`, token by token in memory, `rows` in all.
at::Tensor join(std::vector<at::Tensor>& parts, std::int64_t dim, std::int64_t rows) {
  for (const at::Tensor& part : parts) rows -= part.size(dim);
  append_filler(parts, rows, dim);
  if (parts.size() == 1) return std::move(parts[0]);
  for (at::Tensor& part : parts) part = part.movedim(dim, 0);
  return at::cat(parts, 0).movedim(0, dim);
}

class PackedExecution {
 public:
  PackedExecution(const Model& model, const PassInputs& given, const Plan& plan, EngineHook& hook,
                  const Selection& selection, bool capture)
      : whole_(model),
        model_(*model.token_level()),
        inputs_(given.inputs),
        plan_(plan),
        hook_(hook),
        selection_(selection),
        device_(model.device()),
        stopped_at_(plan.sequences.size(), plan.layers + 1) {
    hook_.begin(model_, plan_);
    if (model_.head_chooses()) find_read_tokens(given.batch);
    if (!capture) return;
    for (const SequencePlan& sequence : plan.sequences) {
      auto& state = captured_.emplace_back(std::make_shared<SequenceState>());
      state->tokens = sequence.tokens;
      state->hidden.resize(static_cast<std::size_t>(plan.layers) + 1);
      state->keys.resize(static_cast<std::size_t>(plan.layers));
    }
  }

  c10::IValue run(ForwardReport& report) {
    report.layer_ms.assign(static_cast<std::size_t>(plan_.layers), 0.0);
    Stopwatch clock;
    prepare();
    report.embed_ms = clock.lap();
    for (std::int32_t l = 0; l < plan_.layers; ++l) {
      observe(l);
      steer(l);
      const bool needed = l == hook_.choosing_layer() ? choose(l) : enter(l);
      if (needed) run_layer(l);
      const double ms = clock.lap();
      if (needed) report.layer_ms[static_cast<std::size_t>(l)] = ms - take_started(report);
    }
    observe(plan_.layers);
    c10::IValue result = run_head();
    report.head_ms = clock.lap();
    report.head_ms -= take_started(report);
    return result;
  }

  /// As it was run, with what the hook has changed, but for sequences that stopped.
  [[nodiscard]] const Plan& plan() const { return plan_; }

  /// Layers that ran for sequence i: those of the plan below this one.
  [[nodiscard]] std::int32_t stopped_at(std::size_t i) const { return stopped_at_[i]; }

  Donors captured() && {
    return Donors(std::make_move_iterator(captured_.begin()), std::make_move_iterator(captured_.end()));
  }

 private:
  /// Time that start() took since it was last asked for: it counts as embedding.
  double take_started(ForwardReport& report) {
    report.embed_ms += started_ms_;
    return std::exchange(started_ms_, 0.0);
  }

  /// Of a head that reads one token a row: which.
  void find_read_tokens(const Batch* batch) {
    const bool known = batch != nullptr && !batch->read_at.empty();
    const at::Tensor positions = known ? at::Tensor() : whole_.read_positions(inputs_);
    for (const SequencePlan& sequence : plan_.sequences) {
      const std::int64_t position = known ? batch->read_at.at(static_cast<std::size_t>(sequence.row))
                                          : positions[sequence.row].item<std::int64_t>();
      const std::int64_t token = position - sequence.first;
      TORCH_CHECK(token >= 0 && token < sequence.tokens, "the output of row ", sequence.row, " is read at its padding");
      read_.push_back(token);
    }
  }

  /// The tokens of sequence i, in one piece, that the head works on.
  [[nodiscard]] Selection::Span head_span(std::size_t i) const {
    return read_.empty() ? selection_.spans[i] : Selection::Span{read_[i], 1, 0};
  }

  /// Positions of the tokens that run, and of those whose results are wanted.
  [[nodiscard]] std::vector<std::int64_t> needed_positions() const {
    std::vector<char> needed(static_cast<std::size_t>(plan_.padded_length), 0);
    for (std::size_t i = 0; i < plan_.sequences.size(); ++i) {
      const SequencePlan& sequence = plan_.sequences[i];
      const auto mark = [&](std::int64_t begin, std::int64_t end) {
        const auto first = needed.begin() + sequence.first;
        std::fill(first + begin, first + end, char{1});
      };
      for (const TokenRange& range : sequence.ranges) {
        if (range.first_layer < range.last_layer) mark(range.begin, range.end);
      }
      const auto span = head_span(i);
      mark(span.begin, span.begin + span.tokens);
    }
    std::vector<std::int64_t> positions;
    for (std::size_t p = 0; p < needed.size(); ++p) {
      if (needed[p]) positions.push_back(static_cast<std::int64_t>(p));
    }
    return positions;
  }

  /// Embeds all tokens, unless few are needed and nobody looks at the others: start() then embeds these.
  void prepare() {
    if (!hook_.watches(0) && captured_.empty() && (model_.head_tokenwise() || !read_.empty())) {
      const auto needed = needed_positions();
      if (!needed.empty() && 2 * static_cast<std::int64_t>(needed.size()) <= plan_.padded_length) {
        positions_ = index_tensor(needed, device_);
        return;
      }
    }
    embedded_ = whole_.embed(inputs_);
  }

  void start(const PackedLayout& layout) {
    Stopwatch clock;
    if (positions_.defined()) run_ = model_.start_at(inputs_, positions_, layout);
    if (!run_) {
      if (!embedded_) embedded_ = whole_.embed(inputs_);
      run_ = model_.start(*embedded_, layout);
    }
    started_ms_ = clock.lap();
  }

  [[nodiscard]] bool running(std::size_t i) const { return stopped_at_[i] > plan_.layers; }

  /// Shows the hook the states that enter layer l, and stops the sequences that it names.
  void observe(std::int32_t l) {
    if (!hook_.watches(l) || (l > 0 && !run_)) return;
    at::Tensor rows = l == 0 ? embedded_->hidden : run_->hidden();
    if (hook_.writes_states()) rows = rows.clone();
    std::vector<at::Tensor> states(plan_.sequences.size());
    std::int64_t offset = 0;
    bool any = false;
    for (std::size_t i = 0; i < plan_.sequences.size(); ++i) {
      const SequencePlan& sequence = plan_.sequences[i];
      const auto own = i < active_.size() ? static_cast<std::int64_t>(active_[i].size()) : 0;
      if (running(i) && l == 0) {
        states[i] = rows.narrow(0, sequence.row, 1).narrow(1, sequence.first, sequence.tokens);
      } else if (running(i) && own == sequence.tokens) {
        states[i] = rows.narrow(1, offset, own);
      }
      any = any || states[i].defined();
      offset += own;
    }
    if (!any) return;
    for (const std::size_t i : hook_.at_layer(l, states)) stopped_at_.at(i) = l;
    if (!hook_.writes_states()) return;
    if (l == 0) {
      embedded_->hidden = std::move(rows);
    } else {
      run_->set_rows(layout_, std::move(rows));
    }
  }

  /// Asks the hook what the sequences do from layer l on.
  void steer(std::int32_t l) {
    if (l == 0 || !run_ || !hook_.wants_hooks()) return;
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < active_.size(); ++i) {
      const auto rows = static_cast<std::int64_t>(active_[i].size());
      if (rows > 0 && running(i)) {
        const LayerAction action = hook_.before_layer(i, l, run_->hidden().narrow(1, offset, rows));
        if (action == LayerAction::kStop) stopped_at_[i] = l;
        if (action == LayerAction::kComputeAll) compute_all_of(plan_.sequences[i], l);
      }
      offset += rows;
    }
  }

  void compute_all_of(SequencePlan& sequence, std::int32_t l) const {
    for (TokenRange& range : sequence.ranges) {
      if (range.first_layer >= l || range.last_layer <= l) range.first_layer = l;
      range.last_layer = plan_.layers;
    }
  }

  /// Lets the hook change the embedded rows.
  void change_embedded(const PackedLayout& layout, const ActiveSets& active) {
    auto hidden = run_->hidden().clone();
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < active.size(); ++i) {
      const auto rows = static_cast<std::int64_t>(active[i].size());
      if (rows > 0) hook_.embedded(i, hidden.narrow(1, offset, rows));
      offset += rows;
    }
    run_->set_rows(layout, std::move(hidden));
  }

  /// Active tokens of layer l, of the sequences that have not stopped.
  [[nodiscard]] ActiveSets active_at(std::int32_t l) const {
    auto active = active_in(plan_, l);
    for (std::size_t i = 0; i < active.size(); ++i) {
      if (!running(i)) active[i].clear();
    }
    return active;
  }

  /// Makes the active rows of layer l current; false if nobody is active.
  bool enter(std::int32_t l) {
    auto active = active_at(l);
    if (run_ && active == active_) return layout_.rows > 0;
    auto layout = make_layout(plan_, active, device_);
    if (layout.rows > 0) {
      if (!run_) {
        start(layout);
        bool all_from_embedding = true;
        for (const SequencePlan& sequence : plan_.sequences) {
          for (const TokenRange& range : sequence.ranges) {
            if (range.first_layer > 0 && range.first_layer <= l && l < range.last_layer) all_from_embedding = false;
          }
        }
        if (!all_from_embedding) {
          run_->set_rows(layout, hidden_rows(l, active, {}));
        } else if (hook_.wants_hooks()) {
          change_embedded(layout, active);
        }
      } else {
        run_->set_rows(layout, hidden_rows(l, active, run_->hidden()));
      }
    }
    active_ = std::move(active);
    layout_ = std::move(layout);
    listed_ = listed(active_);
    return layout_.rows > 0;
  }

  /// As enter(), with the active rows cut to those that the hook chooses by their keys in this layer. These are made
  /// once more for the rows that stay: a small part of what a layer costs.
  bool choose(std::int32_t l) {
    if (!enter(l)) return false;
    const at::Tensor entering = run_->hidden();
    const AttentionTensors tensors = run_->before(l, 0);
    const auto& dims = model_.key_dims(l, 0);
    for (std::size_t q = 0; q < listed_.size(); ++q) {
      const PackedSequence& packed = layout_.sequences[q];
      std::vector<at::Tensor> fresh;
      for (std::size_t i = 0; i < tensors.keys.size(); ++i) {
        fresh.push_back(tensors.keys[i].narrow(dims[i], packed.offset, packed.rows));
      }
      plan_.sequences[listed_[q]].ranges = hook_.choose(listed_[q], fresh);
    }
    auto active = active_at(l);
    auto layout = make_layout(plan_, active, device_);
    if (layout.rows > 0) run_->set_rows(layout, hidden_rows(l, active, entering));
    active_ = std::move(active);
    layout_ = std::move(layout);
    listed_ = listed(active_);
    return layout_.rows > 0;
  }

  /// Hidden states that enter layer l for `active`, from the rows of the layer before (`previous`,
  /// in the order of active_), the embedding, or a donor. `[1, rows, hidden]`
  at::Tensor hidden_rows(std::int32_t l, const ActiveSets& active, const at::Tensor& previous) {
    std::vector<at::Tensor> pieces;
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < plan_.sequences.size(); ++i) {
      const SequencePlan& sequence = plan_.sequences[i];
      const auto& before = i < active_.size() ? active_[i] : std::vector<std::int64_t>{};
      for (const TokenRange& range : sequence.ranges) {
        if (active[i].empty() || l < range.first_layer || l >= range.last_layer) continue;
        const std::int64_t n = range.end - range.begin;
        if (l > range.first_layer) {  // was active in the layer before, and its range is in one piece there
          const auto at = std::lower_bound(before.begin(), before.end(), range.begin) - before.begin();
          pieces.push_back(previous.narrow(1, offset + at, n));
        } else if (l == 0) {
          pieces.push_back(embedded_->hidden.narrow(0, sequence.row, 1).narrow(1, sequence.first + range.begin, n));
        } else {
          pieces.push_back(hook_.entering(i, l, range.begin, range.end));
        }
      }
      offset += static_cast<std::int64_t>(before.size());
    }
    std::int64_t rows = 0;
    for (const at::Tensor& piece : pieces) rows += piece.size(1);
    append_filler(pieces, filler_rows(rows), 1);
    return at::cat(pieces, 1);
  }

  void run_layer(std::int32_t l) {
    capture_hidden(l);
    for (std::int64_t s = 0; s < model_.attention_ops(l); ++s) {
      const AttentionTensors tensors = run_->before(l, s);
      const auto& query_dims = model_.query_dims(l, s);
      const auto& key_dims = model_.key_dims(l, s);
      const auto own_rows = [&](const at::Tensor& all, std::int64_t dim, const PackedSequence& packed) {
        return packed.rows == layout_.rows ? all : all.narrow(dim, packed.offset, packed.rows);
      };
      std::vector<std::vector<KeySegment>> keys;
      for (std::size_t q = 0; q < listed_.size(); ++q) {
        std::vector<at::Tensor> fresh;
        for (std::size_t i = 0; i < tensors.keys.size(); ++i) {
          fresh.push_back(own_rows(tensors.keys[i], key_dims[i], layout_.sequences[q]));
        }
        keys.push_back(hook_.keys(listed_[q], l, s, std::move(fresh)));
      }
      std::vector<at::Tensor> parts;
      parts.reserve(listed_.size());
      for (std::size_t q = 0; q < listed_.size(); ++q) {
        std::vector<at::Tensor> queries;
        for (std::size_t i = 0; i < tensors.queries.size(); ++i) {
          queries.push_back(own_rows(tensors.queries[i], query_dims[i], layout_.sequences[q]));
        }
        if (hook_.watches_attention(l)) {
          hook_.attended(l, s, listed_[q], {queries, keys[q].at(0).keys});
        }
        parts.push_back(run_->attend(l, s, q, queries, keys[q]));
        if (!captured_.empty()) {
          auto& kept = captured_[listed_[q]]->keys[static_cast<std::size_t>(l)].emplace_back();
          for (const at::Tensor& key : keys[q].at(0).keys) kept.push_back(key.clone());
        }
      }
      run_->after(l, s, join(parts, model_.output_dim(l, s), layout_.rows));
    }
    run_->finish(l);
  }

  void capture_hidden(std::int32_t l) {
    if (captured_.empty()) return;
    for (std::size_t q = 0; q < listed_.size(); ++q) {
      const PackedSequence& packed = layout_.sequences[q];
      if (packed.active.defined()) continue;  // not all tokens have a state here
      captured_[listed_[q]]->hidden[static_cast<std::size_t>(l)] =
          run_->hidden().narrow(1, packed.offset, packed.rows).clone();
    }
  }

  /// Runs the head on the selected tokens of the sequences that have not stopped; None if there are none.
  c10::IValue run_head() {
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < active_.size(); ++i) {
      const auto own = static_cast<std::int64_t>(active_[i].size());
      if (own > 0 && running(i)) hook_.finished(i, run_->hidden().narrow(1, offset, own));
      offset += own;
    }
    if (!captured_.empty()) capture_final();
    ActiveSets wanted;
    for (std::size_t i = 0; i < plan_.sequences.size(); ++i) {
      auto& set = wanted.emplace_back();
      const auto span = head_span(i);
      for (std::int64_t t = 0; running(i) && t < span.tokens; ++t) set.push_back(span.begin + t);
    }
    const auto layout = run_ && active_ == wanted ? layout_ : make_layout(plan_, wanted, device_);
    if (layout.rows == 0) return {};
    if (!run_ || active_ != wanted) {
      std::vector<at::Tensor> pieces;
      for (const std::size_t i : listed(wanted)) {
        const auto span = head_span(i);
        pieces.push_back(hook_.final_states(i, span.begin, span.begin + span.tokens));
      }
      std::int64_t rows = 0;
      for (const at::Tensor& piece : pieces) rows += piece.size(1);
      append_filler(pieces, filler_rows(rows), 1);
      auto hidden = at::cat(pieces, 1);
      if (!run_) start(layout);
      run_->set_rows(layout, std::move(hidden));
    }
    return run_->head(placed(layout, listed(wanted)));
  }

  void capture_final() {
    for (std::size_t i = 0; i < captured_.size(); ++i) {
      if (running(i)) captured_[i]->hidden.back() = hook_.final_states(i, 0, plan_.sequences[i].tokens).clone();
    }
  }

  /// The layout with the places of the results instead of those of the tokens.
  [[nodiscard]] PackedLayout placed(const PackedLayout& layout, const std::vector<std::size_t>& sequences) const {
    PackedLayout result = layout;
    result.padded_length = read_.empty() ? selection_.padded_length : 1;
    for (std::size_t i = 0; i < result.sequences.size(); ++i) {
      const auto span = head_span(sequences[i]);
      result.sequences[i].first = span.first;
      result.sequences[i].tokens = span.tokens;
    }
    for (const Selection::Copy& copy : selection_.copies) {
      const auto listed_at = std::find(sequences.begin(), sequences.end(), copy.from) - sequences.begin();
      const PackedSequence& source = layout.sequences[static_cast<std::size_t>(listed_at)];
      const std::int64_t offset = source.offset + copy.begin - selection_.spans[copy.from].begin;
      result.sequences.push_back({plan_.sequences[copy.to].row, copy.first, copy.tokens, offset, copy.tokens, {}});
    }
    return result;
  }

  const Model& whole_;
  const TokenLevelModel& model_;
  const Inputs& inputs_;
  Plan plan_;  ///< its own: the hook may change it
  EngineHook& hook_;
  const Selection& selection_;
  at::Device device_;
  std::vector<std::int64_t> read_;        ///< by sequence, the token that the head reads; empty: it reads otherwise
  std::vector<std::int32_t> stopped_at_;  ///< by sequence; above the number of layers: it has not
  std::unique_ptr<TokenRun> run_;
  double started_ms_ = 0;
  std::optional<Activations> embedded_;  ///< of all tokens; empty: only of those at positions_
  at::Tensor positions_;
  ActiveSets active_;
  PackedLayout layout_;
  std::vector<std::size_t> listed_;
  std::vector<std::shared_ptr<SequenceState>> captured_;
};

}  // namespace

std::size_t SequenceState::bytes() const {
  std::size_t total = 0;
  for (const at::Tensor& state : hidden) {
    if (state.defined()) total += state.nbytes();
  }
  for (const auto& layer : keys) {
    for (const auto& attention_op : layer) {
      for (const at::Tensor& key : attention_op) total += key.nbytes();
    }
  }
  return total;
}

std::vector<SequenceReport> count_tokens(const Plan& plan) {
  std::vector<SequenceReport> reports(static_cast<std::size_t>(plan.rows));
  for (auto& report : reports) report.layers.resize(static_cast<std::size_t>(plan.layers));
  for (const SequencePlan& sequence : plan.sequences) {
    auto& report = reports[static_cast<std::size_t>(sequence.row)];
    report.tokens = sequence.tokens;
    report.source = sequence.computes_all(plan.layers) ? Source::kComputed : Source::kPartial;
    for (const TokenRange& range : sequence.ranges) {
      const auto n = static_cast<std::int32_t>(range.end - range.begin);
      for (std::int32_t l = 0; l < plan.layers; ++l) {
        auto& layer = report.layers[static_cast<std::size_t>(l)];
        (l >= range.first_layer && l < range.last_layer ? layer.computed : layer.reused) += n;
      }
    }
  }
  return reports;
}

c10::IValue execute_dense(const Model& model, const Inputs& inputs, ForwardReport& report) {
  report.execution = Execution::kDense;
  Stopwatch clock;
  Activations activations = model.embed(inputs);
  report.embed_ms = clock.lap();
  for (std::int64_t l = 0; l < model.layers(); ++l) {
    model.layer(l, activations);
    report.layer_ms.push_back(clock.lap());
  }
  auto result = model.head(activations);
  report.head_ms = clock.lap();
  return result;
}

Selection select_all(const Plan& plan) {
  Selection all{plan.padded_length, {}, {}};
  for (const SequencePlan& sequence : plan.sequences) all.spans.push_back({0, sequence.tokens, sequence.first});
  return all;
}

namespace {

c10::IValue execute(const Model& model, const PassInputs& inputs, const Plan& plan, EngineHook& hook,
                    const Selection& selection, Donors* capture, ForwardReport& report) {
  report.execution = Execution::kPacked;
  PackedExecution execution(model, inputs, plan, hook, selection, capture != nullptr);
  auto result = execution.run(report);
  report.sequences = count_tokens(execution.plan());
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    auto& layers = report.sequences[static_cast<std::size_t>(plan.sequences[i].row)].layers;
    for (auto l = static_cast<std::size_t>(execution.stopped_at(i)); l < layers.size(); ++l) {
      layers[l].reused += layers[l].computed;
      layers[l].computed = 0;
    }
  }
  if (capture != nullptr) *capture = std::move(execution).captured();
  return result;
}

}  // namespace

c10::IValue execute_packed(const Model& model, const PassInputs& inputs, const Plan& plan, const Donors& donors,
                           Donors* capture, ForwardReport& report, EngineHook* watcher) {
  DonorStates states(donors);
  if (watcher == nullptr) return execute(model, inputs, plan, states, select_all(plan), capture, report);
  WatchedStates watched(states, *watcher);
  return execute(model, inputs, plan, watched, select_all(plan), capture, report);
}

c10::IValue execute_packed(const Model& model, const PassInputs& inputs, const Plan& plan, EngineHook& hook,
                           const Selection& selection, ForwardReport& report) {
  return execute(model, inputs, plan, hook, selection, nullptr, report);
}

}  // namespace llmcache
