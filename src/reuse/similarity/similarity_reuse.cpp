#include "reuse/similarity/similarity_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/engine_hook.h"
#include "execute/pooled_states.h"
#include "fingerprint/attention.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"
#include "refresh/output_difference.h"
#include "reuse/miss_reason.h"
#include "reuse/similarity/layer_part.h"
#include "reuse/similarity/similarity_keys.h"

namespace llmcache {
namespace {

/// A sum with a NaN or an infinity in it is never finite, and costs a fraction of looking at each value; one that only
/// overflowed is decided by looking.
bool is_finite_state(const at::Tensor& state) {
  return std::isfinite(state.sum(at::kFloat).item<float>()) || state.isfinite().all().item<bool>();
}

/// A sequence of `tokens` tokens that goes on from donor number `donor`'s state behind layer `layer`.
SequencePlan resume(std::int64_t row, std::int64_t tokens, std::int64_t layer, std::int32_t layers,
                    std::int32_t donor) {
  const auto next = static_cast<std::int32_t>(layer + 1);
  const bool any = next < layers;
  return {row, 0, tokens, donor, {{0, tokens, any ? next : 0, any ? layers : 0, 0}}};
}

std::shared_ptr<SequenceState> donor_of(const at::Tensor& hidden, std::int64_t layer, std::int64_t layers) {
  auto state = std::make_shared<SequenceState>();
  state->tokens = hidden.size(1);
  state->hidden.resize(static_cast<std::size_t>(layers) + 1);
  state->hidden[static_cast<std::size_t>(layer) + 1] = hidden;
  return state;
}

void add_times(ForwardReport& sum, const ForwardReport& part) {
  sum.embed_ms += part.embed_ms;
  sum.head_ms += part.head_ms;
  sum.layer_ms.resize(std::max(sum.layer_ms.size(), part.layer_ms.size()), 0.0);
  for (std::size_t l = 0; l < part.layer_ms.size(); ++l) sum.layer_ms[l] += part.layer_ms[l];
}

/// Copies the states behind some layers, and the shape of the first attention's queries.
class LayerRecorder final : public EngineHook {
 public:
  bool watches(std::int32_t l) const override { return l > 0; }
  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override {
    states_[l - 1] = states.at(0).clone();
    return {};
  }
  bool watches_attention(std::int32_t l) const override { return l == 0; }
  void attended(std::int32_t /*l*/, std::int64_t attention_op, std::size_t /*sequence*/,
                const AttentionTensors& tensors) override {
    if (attention_op == 0 && tensors.queries.size() == 1 && tensors.keys.size() == 2)
      heads_ = tensors.queries[0].size(1);
  }
  const at::Tensor& behind(std::int64_t layer) const { return states_.at(layer); }
  std::int64_t heads() const { return heads_; }

 private:
  std::map<std::int64_t, at::Tensor> states_;
  std::int64_t heads_ = 0;
};

/// The options with their defaults filled in.
ThresholdOptions with_layers(ThresholdOptions options) {
  if (options.fingerprint_layers.empty()) options.fingerprint_layers = {0};
  return options;
}

}  // namespace

/// Fingerprints the sequences as their pass reaches the fingerprint layers, looks them up, and copies
/// what the banks keep.
class SimilarityReuse::Pass final : public EngineHook {
 public:
  Pass(SimilarityReuse& owner, const std::string& partition, std::vector<SequenceCapture>& captures, bool look_up,
       double now_s)
      : owner_(owner), partition_(partition), captures_(captures), look_up_(look_up), now_s_(now_s) {}

  bool watches(std::int32_t l) const override { return fingerprint_at(l) >= 0 || bank_behind(l) >= 0; }

  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override {
    std::vector<std::size_t> stopped;
    const int which = fingerprint_at(l);
    const int behind = bank_behind(l);
    for (std::size_t i = 0; i < states.size(); ++i) {
      if (!states[i].defined()) continue;
      SequenceCapture& capture = captures_[i];
      if (behind >= 0) {
        capture.kept[static_cast<std::size_t>(behind)] = states[i].clone(at::MemoryFormat::Contiguous);
      }
      if (which < 0) continue;
      fingerprint(static_cast<std::size_t>(which), states[i], capture);
      if (look_up_ && look_up(i, static_cast<std::size_t>(which), capture)) stopped.push_back(i);
    }
    return stopped;
  }

  bool watches_attention(std::int32_t l) const override { return l == 0 && owner_.options_.fingerprint.attention; }
  void attended(std::int32_t /*l*/, std::int64_t attention_op, std::size_t sequence,
                const AttentionTensors& tensors) override {
    if (attention_op != 0) return;
    // Heads that share keys (grouped-query attention) get a copy each.
    const auto shared = tensors.queries[0].size(1) / tensors.keys[0].size(1);
    const auto keys = shared > 1 ? tensors.keys[0].repeat_interleave(shared, 1) : tensors.keys[0];
    captures_[sequence].attention = attention_statistics(tensors.queries[0], keys, owner_.wrapped_.profile.causal);
  }

  const std::vector<Hit>& hits() const { return hits_; }

 private:
  int fingerprint_at(std::int32_t l) const {
    const auto& layers = owner_.options_.fingerprint_layers;
    const auto it = std::find(layers.begin(), layers.end(), l);
    return it == layers.end() ? -1 : static_cast<int>(it - layers.begin());
  }
  int bank_behind(std::int32_t l) const {
    for (std::size_t b = 0; b < owner_.banks_.size(); ++b) {
      if (owner_.banks_[b]->layer + 1 == l) return static_cast<int>(b);
    }
    return -1;
  }

  void fingerprint(std::size_t which, const at::Tensor& state, SequenceCapture& capture) const {
    const Fingerprinter& fingerprinter = *owner_.fingerprinters_[which];
    if (fingerprinter.needs_state()) {
      auto& values = capture.states[which];
      values = mean_state(state);
      // Each statistic weighs like one more dimension of the state.
      double square = 0;
      for (const float value : values) square += static_cast<double>(value) * value;
      const auto scale = static_cast<float>(std::sqrt(square / static_cast<double>(values.size())));
      for (const float value : capture.attention) values.push_back(scale * value);
    }
    capture.fingerprints[which] = fingerprinter.make(capture.states[which], capture.ids);
  }

  /// Asks the banks of the layers that have not run yet, the deepest first.
  bool look_up(std::size_t sequence, std::size_t which, SequenceCapture& capture) {
    if (!capture.fingerprints[which]) return false;
    for (std::size_t b = owner_.banks_.size(); b-- > 0;) {
      Bank& bank = *owner_.banks_[b];
      const auto own = std::find(bank.fingerprints.begin(), bank.fingerprints.end(), which);
      if (own == bank.fingerprints.end()) continue;
      auto hit = bank.entries->find(partition_, static_cast<std::size_t>(own - bank.fingerprints.begin()),
                                    *capture.fingerprints[which], owner_.monitor_->tau(b), now_s_);
      if (!hit) continue;
      hits_.push_back({sequence, b, std::move(*hit)});
      capture.found = true;
      return true;
    }
    return false;
  }

  SimilarityReuse& owner_;
  const std::string& partition_;
  std::vector<SequenceCapture>& captures_;
  const bool look_up_;
  const double now_s_;
  std::vector<Hit> hits_;
};

SimilarityReuse::SimilarityReuse(const WrappedModel& wrapped, const Options& options, std::size_t capacity_bytes,
                                 MemoryAccount* total)
    : wrapped_(wrapped), model_(*wrapped.model), options_(with_layers(options.threshold)), refresh_(options.refresh) {
  const ModelProfile& profile = wrapped.profile;
  const auto unavailable = [](const std::string& why) {
    throw Error(ErrorCode::kNotAvailable, "fidelity 'threshold' is not available for this model: " + why);
  };
  options_.validate(model_.layers());
  if (wrapped.inputs.has_source()) unavailable("states of an encoder-decoder belong to their source too");
  if (profile.granularity != Granularity::kTokens) {
    unavailable("it runs " + std::string(to_string(profile.granularity)) + " only; its profile says why");
  }
  if (!model_.token_level()->self_contained()) unavailable("its layers use values of other layers than the one before");
  choose_layers();
  const std::int64_t heads = check_resuming(wrapped.inputs);
  std::int64_t dims = profile.hidden;
  if (options_.fingerprint.attention) {
    const bool sdpa = std::any_of(
        profile.attention.begin(), profile.attention.end(),
        [](const AttentionOp& attention_op) { return attention_op.layer == 0 && attention_op.kind == "sdpa"; });
    if (!sdpa || heads == 0) {
      unavailable(
          "attention statistics need scaled_dot_product_attention in the first layer; export the model with it, "
          "or set FingerprintOptions.attention to false");
    }
    dims += attention_statistics_size(heads);
  }
  for (std::size_t i = 0; i < options_.fingerprint_layers.size(); ++i) {
    fingerprinters_.push_back(std::make_unique<Fingerprinter>(options_.fingerprint, dims));
  }
  double shares = 0;
  for (std::size_t b = 0; b < banks_.size(); ++b) {
    shares += options_.capacity_split.empty() ? 1 : options_.capacity_split[b];
  }
  std::vector<double> taus;
  for (std::size_t b = 0; b < banks_.size(); ++b) {
    const double share = options_.capacity_split.empty() ? 1 : options_.capacity_split[b];
    LayerBank::Settings settings;
    settings.capacity_bytes = static_cast<std::size_t>(static_cast<double>(capacity_bytes) * (share / shares));
    settings.total = total;
    settings.eviction = options_.eviction;
    settings.ttl_seconds = options_.ttl_seconds;
    settings.flush_below = refresh_.flush_below;
    std::vector<const Fingerprinter*> own;
    for (const std::size_t which : banks_[b]->fingerprints) own.push_back(fingerprinters_[which].get());
    banks_[b]->entries = std::make_unique<LayerBank>(settings, own);
    taus.push_back(options_.layer_taus.empty() ? options_.tau : options_.layer_taus[b]);
  }
  monitor_ = std::make_unique<DivergenceMonitor>(refresh_, taus);
}

SimilarityReuse::~SimilarityReuse() = default;

void SimilarityReuse::choose_layers() {
  std::vector<std::int64_t> layers = options_.cache_layers;
  if (layers.empty()) {
    for (std::int64_t l = options_.fingerprint_layers.front(); l < model_.layers(); ++l) layers.push_back(l);
  }
  if (!options_.layer_taus.empty() && options_.layer_taus.size() != layers.size()) {
    throw Error(
        ErrorCode::kInvalidOptions,
        fmt::format("ThresholdOptions.layer_taus has {} values; one for each of the {} cached layers, or none is "
                    "expected",
                    options_.layer_taus.size(), layers.size()));
  }
  if (!options_.capacity_split.empty() && options_.capacity_split.size() != layers.size()) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("ThresholdOptions.capacity_split has {} values; one for each of the {} cached layers, or "
                            "none is expected",
                            options_.capacity_split.size(), layers.size()));
  }
  for (const std::int64_t layer : layers) {
    auto bank = std::make_unique<Bank>();
    bank->layer = layer;
    for (std::size_t which = 0; which < options_.fingerprint_layers.size(); ++which) {
      if (options_.fingerprint_layers[which] <= layer) bank->fingerprints.push_back(which);
    }
    banks_.push_back(std::move(bank));
  }
}

/// Goes on from behind each cached layer with the states of a tiny run, which must give that run's result.
/// Returns the number of attention heads of the first layer, 0 if its attention has another shape.
std::int64_t SimilarityReuse::check_resuming(const InputSpec& spec) {
  constexpr std::int64_t kTokens = 6;
  const auto layers = static_cast<std::int32_t>(model_.layers());
  const auto inputs = probe_inputs(spec, model_.device(), 1, kTokens, 41);
  LayerRecorder recorder;
  ForwardReport report;
  const Plan full{1, kTokens, layers, {compute_all(0, 0, kTokens, layers)}};
  const auto want = tensors_of(execute_packed(model_, inputs, full, {}, nullptr, report, &recorder));
  for (const auto& bank : banks_) {
    const Plan plan{1, kTokens, layers, {resume(0, kTokens, bank->layer, layers, 0)}};
    const Donors donors{donor_of(recorder.behind(bank->layer), bank->layer, layers)};
    const auto got = tensors_of(execute_packed(model_, inputs, plan, donors, nullptr, report));
    bool same = got.size() == want.size();
    for (std::size_t i = 0; same && i < got.size(); ++i) same = nearly_equal(got[i], want[i], model_.rounding());
    if (!same) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("fidelity 'threshold' is not available for this model: going on behind layer {} from its "
                              "own state gives another result",
                              bank->layer));
    }
  }
  return recorder.heads();
}

double SimilarityReuse::now() const {
  if (refresh_.clock) return refresh_.clock();
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<SimilarityReuse::SequenceCapture> SimilarityReuse::start(const Batch& batch, const Plan& plan,
                                                                     std::uint64_t first_number,
                                                                     const std::vector<std::int64_t>& rows) const {
  std::vector<SequenceCapture> captures(plan.sequences.size());
  const at::Tensor& ids = batch.on_host[static_cast<std::size_t>(wrapped_.profile.ids_argument)];
  for (std::size_t i = 0; i < captures.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    captures[i].number = first_number + static_cast<std::uint64_t>(rows[static_cast<std::size_t>(sequence.row)]);
    captures[i].states.resize(fingerprinters_.size());
    captures[i].fingerprints.resize(fingerprinters_.size());
    captures[i].kept.resize(banks_.size());
    if (options_.fingerprint.kind == FingerprintKind::kJaccard) {
      const auto* begin = ids.const_data_ptr<std::int64_t>() + sequence.row * batch.padded_length + sequence.first;
      captures[i].ids.assign(begin, begin + sequence.tokens);
    }
  }
  return captures;
}

void SimilarityReuse::serve(const Call& call, Answers& answers) {
  Stopwatch clock;
  const double now_s = now();
  const Batch& batch = answers.open();
  DeferredWrites& writes = answers.writes();
  const std::string partition = similarity_partition(batch, call.request.tenant);
  const Plan plan = batch.full_plan(wrapped_.layers());
  auto captures = start(batch, plan, call.first_number, answers.open_rows());
  Pass pass(*this, partition, captures, call.request.look_up, now_s);
  PassResult answer;
  answer.verified = false;  // it is another one's answer, and is meant to be
  answer.storable = false;
  answer.rows.resize(static_cast<std::size_t>(batch.rows));
  answer.value = execute_packed(model_, batch, plan, {}, nullptr, answer.report, &pass);
  const ForwardReport own = answer.report;
  for (const Hit& hit : pass.hits()) {
    wrapped_.streams->uses(hit.found.entry->hidden());
    for (const at::Tensor& input : hit.found.entry->inputs()) wrapped_.streams->uses(input);
  }
  wrapped_.streams->enter(model_.device());
  auto resumed = resume_all(pass.hits(), answer.report);
  for (std::size_t h = 0; h < pass.hits().size(); ++h) {
    const Hit& hit = pass.hits()[h];
    const SequencePlan& sequence = plan.sequences[hit.sequence];
    answer.rows[static_cast<std::size_t>(sequence.row)] =
        fitted(std::move(resumed[h].leaves), hit.found.entry->tokens(), sequence.tokens);
    SequenceReport& report = answer.report.sequences[static_cast<std::size_t>(sequence.row)];
    for (std::size_t l = 0; l < report.layers.size(); ++l) {
      if (resumed[h].layers[l].computed > 0) report.layers[l] = resumed[h].layers[l];
    }
    report.source = Source::kSimilar;
    report.similarity = hit.found.similarity;
    report.entry = static_cast<std::int64_t>(hit.found.entry->number());
    report.resumed_layer = banks_[hit.bank]->layer + 1;
  }
  audit(call, answers.open_rows(), batch, plan, pass.hits(), answer, now_s, writes);
  std::vector<std::size_t> banks;  // that answered
  for (const Hit& hit : pass.hits()) {
    const auto row = static_cast<std::size_t>(plan.sequences[hit.sequence].row);
    if (!answer.report.sequences[row].audited) banks.push_back(hit.bank);
  }
  writes.add([this, banks = std::move(banks)] {
    for (const std::size_t bank : banks) ++banks_[bank]->hits;
    hits_ += banks.size();
  });
  keep(batch, plan, partition, captures, own, now_s, writes);
  for (std::size_t i = 0; i < captures.size(); ++i) {
    SequenceReport& sequence = answer.report.sequences[static_cast<std::size_t>(plan.sequences[i].row)];
    sequence.miss = call.request.look_up ? captures[i].miss : MissReason::kNotLookedUp;
  }
  const ForwardReport& report = answer.report;
  const double model_ms =
      report.embed_ms + report.head_ms + std::accumulate(report.layer_ms.begin(), report.layer_ms.end(), 0.0);
  answer.report.lookup_ms = std::max(clock.lap() - model_ms, 0.0);
  answers.put(std::move(answer));
}

/// Runs what is left of the layers, and the head, on the states of the entries. One result a hit.
std::vector<SimilarityReuse::Served> SimilarityReuse::resume_all(const std::vector<Hit>& hits, ForwardReport& report) {
  std::vector<Served> results(hits.size());
  const auto layers = static_cast<std::int32_t>(model_.layers());
  std::vector<std::size_t> waiting(hits.size());
  std::iota(waiting.begin(), waiting.end(), std::size_t{0});
  while (!waiting.empty()) {
    const auto& first = *hits[waiting[0]].found.entry;
    // Without a mask only sequences of one length fit into a batch, nor where padding may decide which token is read.
    const bool masked = wrapped_.profile.mask_argument >= 0 && !wrapped_.profile.head_chooses &&
                        first.inputs()[static_cast<std::size_t>(wrapped_.profile.mask_argument)].defined();
    std::vector<std::size_t> group;
    std::int64_t padded_length = 0;
    for (const std::size_t f : waiting) {
      const std::int64_t tokens = hits[f].found.entry->tokens();
      if (!masked && tokens != first.tokens()) continue;
      group.push_back(f);
      padded_length = std::max(padded_length, tokens);
    }
    std::erase_if(waiting, [&](std::size_t f) { return std::find(group.begin(), group.end(), f) != group.end(); });

    const auto rows = static_cast<std::int64_t>(group.size());
    Inputs inputs;
    for (std::size_t j = 0; j < first.inputs().size(); ++j) {
      if (!first.inputs()[j].defined()) {
        inputs.emplace_back();
        continue;
      }
      auto input = at::zeros({rows, padded_length}, first.inputs()[j].options());
      for (std::int64_t r = 0; r < rows; ++r) {
        const at::Tensor& own = hits[group[static_cast<std::size_t>(r)]].found.entry->inputs()[j];
        input.select(0, r).narrow(0, 0, own.size(0)).copy_(own);
      }
      inputs.emplace_back(std::move(input));
    }
    Plan plan{rows, padded_length, layers, {}};
    Donors donors;
    for (std::int64_t r = 0; r < rows; ++r) {
      const Hit& one = hits[group[static_cast<std::size_t>(r)]];
      const std::int64_t layer = banks_[one.bank]->layer;
      plan.sequences.push_back(
          resume(r, one.found.entry->tokens(), layer, layers, static_cast<std::int32_t>(donors.size())));
      donors.push_back(donor_of(one.found.entry->hidden(), layer, layers));
    }
    ForwardReport own;
    const auto result = execute_packed(model_, inputs, plan, donors, nullptr, own);
    add_times(report, own);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::size_t f = group[static_cast<std::size_t>(r)];
      results[f] = {row_of(result, wrapped_.output, r, 0, hits[f].found.entry->tokens(), padded_length),
                    own.sequences[static_cast<std::size_t>(r)].layers};
    }
  }
  return results;
}

/// Results for `from` tokens as results for `to` tokens; see ThresholdOptions.
std::vector<at::Tensor> SimilarityReuse::fitted(std::vector<at::Tensor> leaves, std::int64_t from,
                                                std::int64_t to) const {
  if (from == to) return leaves;
  const std::int64_t shift = wrapped_.profile.causal ? from - to : 0;
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const int dim = wrapped_.output.leaves[i].tokens;
    if (dim < 0) continue;
    const auto index = at::arange(shift, shift + to, at::TensorOptions().dtype(at::kLong)).clamp(0, from - 1);
    leaves[i] = leaves[i].index_select(dim, index.to(leaves[i].device()));
  }
  return leaves;
}

/// Computes some of the hits in full too, compares, and answers with the full computation.
void SimilarityReuse::audit(const Call& call, const std::vector<std::int64_t>& open, const Batch& batch,
                            const Plan& plan, const std::vector<Hit>& hits, PassResult& answer, double now_s,
                            DeferredWrites& writes) {
  std::vector<const Hit*> chosen;
  for (const Hit& hit : hits) {
    if (monitor_->choose()) chosen.push_back(&hit);
  }
  if (chosen.empty()) return;
  const auto row_number = [&](const Hit* hit) { return plan.sequences[hit->sequence].row; };
  std::sort(chosen.begin(), chosen.end(), [&](auto* a, auto* b) { return row_number(a) < row_number(b); });
  std::vector<std::int64_t> rows;
  for (const Hit* hit : chosen) rows.push_back(row_number(hit));
  const Batch part = batch.select(rows);
  const Plan full = part.full_plan(wrapped_.layers());
  const std::string partition = similarity_partition(batch, call.request.tenant);
  std::vector<std::int64_t> numbers;
  for (const std::int64_t row : rows) numbers.push_back(open[static_cast<std::size_t>(row)]);
  auto captures = start(part, full, call.first_number, numbers);
  Pass pass(*this, partition, captures, false, now_s);
  ForwardReport own;
  const auto result = execute_packed(model_, part, full, {}, nullptr, own, &pass);
  add_times(answer.report, own);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const auto row = static_cast<std::size_t>(rows[i]);
    const RowSpan& span = part.spans[i];
    auto leaves =
        row_of(result, wrapped_.output, static_cast<std::int64_t>(i), span.first, span.tokens, part.padded_length);
    const OutputDifference difference = difference_of_outputs(answer.rows[row], leaves, refresh_.decision);
    writes.add([this, hit = *chosen[i], difference] {
      const bool good = monitor_->record(hit.bank, difference);
      banks_[hit.bank]->entries->record(hit.found, difference.relative, good);
    });
    answer.rows[row] = std::move(leaves);
    SequenceReport& report = answer.report.sequences[row];
    report.source = Source::kComputed;
    report.audited = true;
    report.error = difference.relative;
    report.layers = own.sequences[i].layers;
  }
  keep(part, full, partition, captures, own, now_s, writes);
}

/// Of a sequence with these inputs, which was not found.
MissReason SimilarityReuse::why_missed(std::uint64_t key) const {
  for (const auto& bank : banks_) {
    const auto cause = bank->entries->why_gone(key);
    if (!cause) continue;
    return miss_reason_of(*cause);
  }
  return MissReason::kNew;
}

void SimilarityReuse::keep(const Batch& batch, const Plan& plan, const std::string& partition,
                           std::vector<SequenceCapture>& captures, const ForwardReport& report, double now_s,
                           DeferredWrites& writes) {
  struct Entry {
    std::size_t bank = 0;
    LayerBank::Candidate candidate;
  };
  std::vector<std::vector<std::vector<float>>> states;  // that the fingerprints learn from, by sequence
  std::vector<Entry> entries;
  std::uint64_t unusable = 0;
  for (std::size_t i = 0; i < captures.size(); ++i) {
    SequenceCapture& one = captures[i];
    states.push_back(one.states);
    if (one.found) continue;
    const bool usable =
        std::all_of(one.fingerprints.begin(), one.fingerprints.end(), [](const auto& f) { return f.has_value(); }) &&
        std::all_of(one.kept.begin(), one.kept.end(), is_finite_state);
    if (!usable) {
      ++unusable;
      continue;
    }
    const SequencePlan& sequence = plan.sequences[i];
    LayerBank::Candidate candidate;
    candidate.number = one.number;
    candidate.ids = one.ids;
    for (const c10::IValue& input : batch.inputs) {
      candidate.inputs.push_back(
          input.isTensor() ? input.toTensor().select(0, sequence.row).narrow(0, sequence.first, sequence.tokens).clone()
                           : at::Tensor());
    }
    candidate.key = similarity_key(partition, candidate.inputs);
    one.miss = why_missed(candidate.key);
    const double share =
        static_cast<double>(sequence.tokens) / static_cast<double>(std::max<std::int64_t>(1, batch.tokens));
    std::int64_t done = 0;
    for (std::size_t b = 0; b < banks_.size(); ++b) {
      const Bank& bank = *banks_[b];
      for (; done <= bank.layer; ++done) {
        candidate.saved_ms += report.layer_ms[static_cast<std::size_t>(done)] * share;
      }
      candidate.hidden = std::move(one.kept[b]);
      candidate.states.clear();
      candidate.fingerprints.clear();
      for (const std::size_t which : bank.fingerprints) {
        candidate.states.push_back(one.states[which]);
        candidate.fingerprints.push_back(one.fingerprints[which]);
      }
      entries.push_back({b, candidate});
    }
  }
  writes.add([this, states = std::move(states), entries = std::move(entries), unusable, partition, now_s] {
    for (const auto& sequence : states) {
      for (std::size_t which = 0; which < fingerprinters_.size(); ++which) {
        if (!sequence[which].empty()) fingerprinters_[which]->observe(sequence[which]);
      }
    }
    unusable_ += unusable;
    for (const Entry& entry : entries) banks_[entry.bank]->entries->insert(partition, entry.candidate, now_s);
  });
}

void SimilarityReuse::clear() {
  for (const auto& fingerprinter : fingerprinters_) fingerprinter->forget();
  for (const auto& bank : banks_) bank->entries->clear();
}

void SimilarityReuse::add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) {
  std::vector<Fingerprinter*> running;
  for (const auto& one : fingerprinters_) {
    if (one->running()) running.push_back(one.get());
  }
  if (!running.empty()) parts.push_back(std::make_unique<CentrePart>(std::move(running)));
  std::vector<LayerPart::Bank> banks;
  for (const auto& bank : banks_) {
    LayerPart::Bank& one = banks.emplace_back(LayerPart::Bank{bank->layer, bank->entries.get(), {}});
    for (const std::size_t which : bank->fingerprints) one.fingerprinters.push_back(fingerprinters_[which].get());
  }
  const std::string fingerprinted =
      options_.fingerprint.kind == FingerprintKind::kJaccard
          ? "token ids"
          : fmt::format("states {} of {} values", fmt::join(options_.fingerprint_layers, ","),
                        fingerprinters_.at(0)->dims());
  parts.push_back(std::make_unique<LayerPart>(wrapped_, std::move(banks), fingerprinted, [this] { return now(); }));
}

void SimilarityReuse::add_to(Stats& stats) const {
  stats.similar_hits = hits_;
  stats.unusable_states = unusable_;
  for (std::size_t b = 0; b < banks_.size(); ++b) {
    const auto counters = banks_[b]->entries->counters();
    LayerStats& layer = stats.layers.emplace_back();
    layer.layer = banks_[b]->layer;
    layer.hits = banks_[b]->hits;
    layer.entries = counters.entries;
    layer.bytes = counters.bytes;
    layer.peak_bytes = counters.peak_bytes;
    layer.insertions = counters.insertions;
    layer.evictions = counters.evictions;
    layer.rejected = counters.rejected;
    layer.expired = counters.expired + counters.aged;
    layer.decayed = counters.decayed;
    layer.dropped = counters.dropped;
    layer.audited_entries = counters.audited_entries;
    monitor_->add_to(b, layer);
    add(stats, "layer states", counters, counters.expired + counters.decayed);
  }
}

}  // namespace llmcache
