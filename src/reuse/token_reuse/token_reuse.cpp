#include "reuse/token_reuse/token_reuse.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "execute/clock.h"
#include "execute/engine.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"
#include "reuse/token_reuse/token_part.h"

namespace llmcache {
namespace {

[[noreturn]] void unavailable(const std::string& why) { throw Error(ErrorCode::kNotAvailable, "token reuse: " + why); }

void check_model(const Model& model, const ModelProfile& profile) {
  if (profile.causal) unavailable("the model is causal; reuse of prefixes is exact there and costs no more");
  if (profile.granularity != Granularity::kTokens || model.token_level() == nullptr) {
    unavailable(fmt::format("the model cannot be run on a part of a sequence's tokens{}{}",
                            profile.notes.empty() ? "" : ": ", profile.notes.empty() ? "" : profile.notes.back()));
  }
  if (!model.token_level()->self_contained()) {
    unavailable("layers take more than the hidden state from the layers before them");
  }
  if (!profile.per_row_output || !profile.rows_independent) {
    unavailable("a sequence's result cannot be told from the rest of its batch");
  }
}

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  throw Error(ErrorCode::kInvalidOptions, fmt::format("{} is {}; {} to {} is expected", name, value, least, most));
}

void check_fraction(const char* name, double value) {
  if (value >= 0 && value <= 1) return;
  throw Error(ErrorCode::kInvalidOptions, fmt::format("{} is {}; 0 to 1 is expected", name, value));
}

constexpr std::int64_t kMany = std::int64_t{1} << 40;

/// Writes the rows of `part` into `whole`, which is made if it is None.
c10::IValue put_rows(const c10::IValue& whole, const c10::IValue& part, const OutputSpec& spec,
                     const std::vector<std::int64_t>& rows, std::int64_t batch) {
  const auto index = at::tensor(rows, at::TensorOptions().dtype(at::kLong));
  const auto into = tensors_of(whole);
  std::size_t leaf = 0;
  return map_tensors(part, [&](const at::Tensor& own) {
    const std::size_t i = leaf++;
    const int dim = spec.leaves.at(i).batch;
    auto sizes = own.sizes().vec();
    sizes[static_cast<std::size_t>(dim)] = batch;
    const auto target = into.empty() ? at::zeros(sizes, own.options()) : into.at(i);
    return target.index_copy(dim, index.to(own.device()), own);
  });
}

}  // namespace

void TokenReuseOptions::validate(std::int32_t layers) const {
  std::int32_t last = 0;
  for (const std::int32_t layer : kept_layers) {
    check_range("kept_layers (ascending): a layer", layer, last + 1, layers - 1);
    last = layer;
  }
  check_range("least_tokens", least_tokens, 1, kMany);
  check_range("least_shifted", least_shifted, 2, kMany);
  check_range("least_averaged", least_averaged, 1, kMany);
  check_range("most_averaged", most_averaged, 1, 65535);
  eviction.validate();
}

void TokenReuseSettings::validate(std::int32_t layers, const TokenReuseOptions& options) const {
  check_range("samples", samples, 0, kMany);
  check_range("neighbours", neighbours, 0, kMany);
  check_range("full_layers", full_layers, 0, layers - 1);
  check_fraction("max_edit_fraction", max_edit_fraction);
  check_fraction("max_computed_fraction", max_computed_fraction);
  check_fraction("max_read_fraction", max_read_fraction);
  check_range("first_watched", first_watched, 0, layers - 1);
  check_range("last_watched", last_watched, first_watched, kMany);
  if (!(stop_shift >= 0) || !(widen_shift >= 0)) {
    throw Error(ErrorCode::kInvalidOptions, "stop_shift and widen_shift must be at least 0");
  }
  const auto& kept = options.kept_layers;
  if (full_layers > 0 && !std::binary_search(kept.begin(), kept.end(), layers - full_layers)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("full_layers is {}, but the states that enter layer {} are not kept; add it to kept_layers",
                            full_layers, layers - full_layers));
  }
}

/// Reuse for matched sequences, copies into the pending entries of those that are kept.
class TokenReuse::Pass final : public EngineHook {
 public:
  Pass(const TokenLevelModel& model, const StateLayout& layout, CorrectedStates& corrected,
       std::vector<std::unique_ptr<PendingEntry>>& pending)
      : level_(model), layout_(layout), corrected_(corrected), pending_(pending) {}

  bool wants_hooks() const override { return true; }

  void embedded(std::size_t sequence, at::Tensor rows) override {
    write_hidden(sequence, 0, rows);
    corrected_.embedded(sequence, std::move(rows));
  }

  LayerAction before_layer(std::size_t sequence, std::int32_t layer, const at::Tensor& active) override {
    write_hidden(sequence, static_cast<std::size_t>(layer), active);
    return corrected_.before_layer(sequence, layer, active);
  }

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override {
    if (pending_[sequence]) {
      const auto first = layout_.first_key[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)];
      const auto& dims = level_.key_dims(layer, attention_op);
      for (std::size_t i = 0; i < fresh.size(); ++i) {
        pending_[sequence]->tensor(first + i).copy_(fresh[i].movedim(dims[i], 0));
      }
    }
    return corrected_.keys(sequence, layer, attention_op, std::move(fresh));
  }

  at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) override {
    return corrected_.entering(sequence, layer, begin, end);
  }

  void finished(std::size_t sequence, const at::Tensor& fresh) override {
    write_hidden(sequence, layout_.hidden.size() - 1, fresh);
    corrected_.finished(sequence, fresh);
  }

  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override {
    return corrected_.final_states(sequence, begin, end);
  }

 private:
  void write_hidden(std::size_t sequence, std::size_t layer, const at::Tensor& rows) {
    const int spec = layout_.hidden[layer];
    if (pending_[sequence] && spec >= 0) pending_[sequence]->tensor(static_cast<std::size_t>(spec)).copy_(rows[0]);
  }

  const TokenLevelModel& level_;
  const StateLayout& layout_;
  CorrectedStates& corrected_;
  std::vector<std::unique_ptr<PendingEntry>>& pending_;  ///< by sequence; null: not kept
};

TokenReuse::TokenReuse(const WrappedModel& wrapped, TokenReuseOptions options, std::size_t capacity_bytes,
                       MemoryAccount* total)
    : wrapped_(wrapped),
      model_(*wrapped.model),
      options_((options.validate(wrapped.layers()), std::move(options))),
      layers_(wrapped.layers()) {
  check_model(model_, wrapped.profile);
  if (wrapped.inputs.has_source()) unavailable("states of an encoder-decoder's target follow from its source too");
  const c10::NoGradGuard no_grad;
  try {
    positions_ = llmcache::output_positions(model_, wrapped.inputs, wrapped.output, wrapped.profile);
    supports_shift_ = layers_ignore_places(model_, wrapped.inputs);
    bank_ = make_bank(0);
    // Checked as computed, whatever the format is: that loses something on purpose.
    bank_ = make_bank(8 * bank_->layout().bytes(64) + (std::size_t{1} << 20));
    verify();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    unavailable(fmt::format("tiny sequences raised: {}", reason_of(error)));
  }
  bank_ = make_bank(capacity_bytes, options_.format, total);
}

StateLayout TokenReuse::layout() const {
  // One tiny sequence shows what there is to keep.
  const auto probe = probe_inputs(wrapped_.inputs, model_.device(), 1, 3);
  Donors captured;
  ForwardReport report;
  Plan plan{1, 3, layers_, {compute_all(0, 0, 3, layers_)}};
  execute_packed(model_, probe, plan, {}, &captured, report);
  StateLayout layout;
  const auto add = [&](const at::Tensor& tensor, std::int64_t dim) {
    auto sizes = tensor.movedim(dim, 0).sizes().vec();
    sizes.erase(sizes.begin());
    layout.specs.push_back({std::move(sizes), tensor.options()});
  };
  for (std::int32_t l = 0; l < layers_; ++l) {
    auto& attention_ops = layout.first_key.emplace_back();
    for (std::int64_t s = 0; s < model_.token_level()->attention_ops(l); ++s) {
      attention_ops.push_back(layout.specs.size());
      const auto& keys = captured[0]->keys[static_cast<std::size_t>(l)][static_cast<std::size_t>(s)];
      for (std::size_t i = 0; i < keys.size(); ++i) add(keys[i], model_.token_level()->key_dims(l, s)[i]);
    }
  }
  for (std::int32_t l = 0; l <= layers_; ++l) {
    const auto& kept = options_.kept_layers;
    const bool keeps = l == 0 || l == layers_ || std::binary_search(kept.begin(), kept.end(), l);
    layout.hidden.push_back(keeps ? static_cast<int>(layout.specs.size()) : -1);
    if (keeps) add(captured[0]->hidden.back()[0], 0);
  }
  return layout;
}

std::unique_ptr<TokenBank> TokenReuse::make_bank(std::size_t capacity_bytes, BankFormat format,
                                                 MemoryAccount* total) const {
  TokenBank::Settings settings;
  settings.capacity_bytes = capacity_bytes;
  settings.eviction = options_.eviction;
  settings.layout = bank_ ? bank_->layout() : layout();
  settings.layout.format = format;
  settings.alignment = {options_.least_shifted, supports_shift_};
  settings.least_averaged = options_.least_averaged;
  settings.most_averaged = options_.most_averaged;
  settings.total = total;
  return std::make_unique<TokenBank>(std::move(settings));
}

/// An identical sequence must come out as the plain model's, reused as far as it can be.
void TokenReuse::verify() {
  const auto tokens = std::max<std::int64_t>(24, std::min<std::int64_t>(options_.least_tokens, 64));
  const Batch batch = check_batch(probe_inputs(wrapped_.inputs, model_.device(), 1, tokens, 41), wrapped_);
  const auto plain = tensors_of(model_.plain(batch.inputs));
  const auto same = [&](const c10::IValue& value) {
    const auto got = tensors_of(value);
    if (got.size() != plain.size()) return false;
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (!nearly_equal(got[i], plain[i], model_.rounding())) return false;
    }
    return true;
  };
  ForwardReport report;
  const TokenReuseSettings settings{.samples = 4};
  auto full = run(batch, {}, settings, "", true, report);
  if (!same(full.value)) unavailable("a sequence comes out otherwise than from the plain model");
  keep(std::move(full.computed));
  if (tokens < options_.least_tokens) return;
  const auto matches = find(batch, "");
  if (!matches[0] || matches[0]->edit_fraction != 0) unavailable("a sequence was not found again");
  if (!same(run(batch, matches, settings, "", false, report).value)) {
    unavailable("an identical sequence comes out otherwise when its states are reused");
  }
}

double TokenReuse::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

/// By input, 1 if no state depends on it.
std::vector<char> TokenReuse::left_out() const {
  std::vector<char> left;
  for (std::size_t i = 0; i < wrapped_.inputs.names.size(); ++i) {
    left.push_back(positions_.head_only[i] || static_cast<int>(i) == wrapped_.profile.mask_argument ? 1 : 0);
  }
  return left;
}

std::vector<RowKey> TokenReuse::keys_of(const Batch& batch, const std::string& tenant) const {
  auto keys = batch.keys(tenant, left_out());
  // Padding in front decides places.
  std::erase_if(keys,
                [&](const RowKey& key) { return key.span.tokens < options_.least_tokens || key.span.first != 0; });
  return keys;
}

std::vector<std::int64_t> TokenReuse::read_tokens(const Batch& batch, std::int64_t row) const {
  std::vector<std::int64_t> tokens;
  if (positions_.read != OutputRead::kMaskedOnes) return tokens;
  const at::Tensor& marks = batch.on_host[static_cast<std::size_t>(positions_.mask_argument)];
  if (!marks.defined()) return tokens;
  const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
  const std::int64_t* own = marks.const_data_ptr<std::int64_t>() + row * batch.padded_length + span.first;
  for (std::int64_t t = 0; t < span.tokens; ++t) {
    if (own[t] != 0) tokens.push_back(t);
  }
  return tokens;
}

TokenReuse::Matches TokenReuse::find(const Batch& batch, const std::string& tenant) {
  Matches matches(static_cast<std::size_t>(batch.rows));
  for (const RowKey& key : keys_of(batch, tenant)) {
    auto candidate = bank_->find(key.partition, {key.tokens, key.ids_per_token}, now());
    if (!candidate) continue;
    Match match;
    candidate->entry->each_tensor([this](const at::Tensor& tensor) { wrapped_.streams->uses(tensor); });
    match.donor = std::move(candidate->entry);
    match.alignment = std::move(candidate->alignment);
    match.read = read_tokens(batch, key.row);
    match.edit_fraction = match.alignment.edit_fraction();
    for (const AlignedBlock& block : match.alignment.blocks) match.shifted += block.shifted() ? block.tokens : 0;
    matches[static_cast<std::size_t>(key.row)] = std::move(match);
  }
  wrapped_.streams->enter(model_.device());
  return matches;
}

ActiveSet TokenReuse::active_set(const Match& match, const TokenReuseSettings& settings) const {
  const auto limit = settings.max_read_fraction * static_cast<double>(match.alignment.tokens);
  const bool computes_read = static_cast<double>(match.read.size()) <= limit;
  return choose_active(match.alignment, {settings.samples, settings.neighbours},
                       computes_read ? match.read : std::vector<std::int64_t>{});
}

double TokenReuse::computed_fraction(const Match& match, const TokenReuseSettings& settings) const {
  const auto tokens = static_cast<double>(match.alignment.tokens);
  const auto active = static_cast<double>(active_set(match, settings).active.size());
  const double full = static_cast<double>(settings.full_layers) / static_cast<double>(layers_);
  return tokens == 0 ? 1 : full + (1 - full) * active / tokens;
}

bool TokenReuse::accepts(const Match& match, const TokenReuseSettings& settings) const {
  return match.edit_fraction <= settings.max_edit_fraction &&
         computed_fraction(match, settings) <= settings.max_computed_fraction;
}

void TokenReuse::run_pass(const Batch& batch, const Matches& matches, const TokenReuseSettings& settings,
                          const std::string& tenant, bool capture, Result& result, std::vector<std::int64_t>& stopped,
                          ForwardReport& report) {
  Stopwatch clock;
  Plan plan{batch.rows, batch.padded_length, layers_, {}};
  std::vector<ReusedSequence> reused;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
    if (span.tokens == 0) continue;
    ReusedSequence& sequence = reused.emplace_back();
    const auto* match =
        matches.empty() || !matches[static_cast<std::size_t>(row)] ? nullptr : &*matches[static_cast<std::size_t>(row)];
    if (match == nullptr || !accepts(*match, settings)) {
      plan.sequences.push_back(compute_all(row, span.first, span.tokens, layers_));
      continue;
    }
    sequence = {match->donor, match->alignment.donor_positions(), active_set(*match, settings),
                layers_ - settings.full_layers};
    plan.sequences.push_back(plan_active(row, span.first, span.tokens, layers_, sequence.set.active, sequence.widened));
  }
  // Room for what is to be kept, before it is computed.
  auto keys = capture ? keys_of(batch, tenant) : std::vector<RowKey>{};
  std::vector<std::unique_ptr<PendingEntry>> pending(plan.sequences.size());
  std::vector<Computed> computed;
  std::vector<std::size_t> computed_by;
  for (RowKey& key : keys) {
    const auto it = std::find_if(plan.sequences.begin(), plan.sequences.end(),
                                 [&](const SequencePlan& sequence) { return sequence.row == key.row; });
    const auto i = static_cast<std::size_t>(it - plan.sequences.begin());
    if (reused[i].donor) continue;
    pending[i] = bank_->reserve(key.span.tokens);
    computed.push_back({std::move(key), nullptr, 0});
    computed_by.push_back(i);
  }
  report.lookup_ms += clock.lap();

  const auto monitor = [&](std::size_t, std::int32_t l, const SampleShift& shift) {
    if (!std::isfinite(shift.relative)) return LayerAction::kStop;
    if (l - 1 < settings.first_watched || l - 1 > settings.last_watched) return LayerAction::kGoOn;
    if (shift.relative > settings.stop_shift) return LayerAction::kStop;
    return shift.relative > settings.widen_shift ? LayerAction::kComputeAll : LayerAction::kGoOn;
  };
  CorrectedStates corrected(*model_.token_level(), layers_, reused, model_.device(), monitor);
  Pass pass(*model_.token_level(), bank_->layout(), corrected, pending);
  result.value = execute_packed(model_, batch, plan, pass, select_all(plan), report);
  const double ms = clock.lap();

  for (std::size_t k = 0; k < computed.size(); ++k) {
    const auto tokens = static_cast<double>(plan.sequences[computed_by[k]].tokens);
    computed[k].states = std::move(pending[computed_by[k]]);
    computed[k].ms = ms * tokens / static_cast<double>(batch.tokens);
    result.computed.push_back(std::move(computed[k]));
  }
  result.shifts.resize(static_cast<std::size_t>(batch.rows));
  for (std::size_t i = 0; i < reused.size(); ++i) {
    if (!reused[i].donor) continue;
    const auto row = static_cast<std::size_t>(plan.sequences[i].row);
    result.shifts[row] = corrected.shifts(i);
    report.sequences[row].similarity = 1 - matches[row]->edit_fraction;
    if (corrected.stopped(i)) stopped.push_back(plan.sequences[i].row);
  }
}

void TokenReuse::run_stopped(const Batch& batch, const std::vector<std::int64_t>& stopped, const std::string& tenant,
                             bool capture, Result& result, ForwardReport& report) {
  Result again;
  ForwardReport part;
  std::vector<std::int64_t> none;
  run_pass(batch.select(stopped), {}, {}, tenant, capture, again, none, part);
  result.value = put_rows(result.value, again.value, wrapped_.output, stopped, batch.rows);
  for (Computed& computed : again.computed) {
    computed.key.row = stopped[static_cast<std::size_t>(computed.key.row)];
    result.computed.push_back(std::move(computed));
  }
  report.lookup_ms += part.lookup_ms;
  report.embed_ms += part.embed_ms;
  report.head_ms += part.head_ms;
  for (std::size_t l = 0; l < part.layer_ms.size(); ++l) report.layer_ms[l] += part.layer_ms[l];
  for (std::size_t i = 0; i < stopped.size(); ++i) {
    SequenceReport& sequence = report.sequences[static_cast<std::size_t>(stopped[i])];
    sequence.source = Source::kComputed;
    for (std::size_t l = 0; l < sequence.layers.size(); ++l) {  // what was computed for nothing is counted too
      sequence.layers[l].computed += part.sequences[i].layers[l].computed;
      sequence.layers[l].reused = 0;
    }
  }
}

TokenReuse::Result TokenReuse::run(const Batch& batch, const Matches& matches, const TokenReuseSettings& settings,
                                   const std::string& tenant, bool capture, ForwardReport& report) {
  settings.validate(layers_, options_);
  const c10::NoGradGuard no_grad;
  Result result;
  std::vector<std::int64_t> stopped;
  run_pass(batch, matches, settings, tenant, capture, result, stopped, report);
  if (!stopped.empty()) run_stopped(batch, stopped, tenant, capture, result, report);
  return result;
}

std::unique_ptr<SnapshotPart> TokenReuse::snapshot_part() {
  std::size_t ids_per_token = 0;
  for (const char none : left_out()) ids_per_token += none == 0 ? 1 : 0;
  return std::make_unique<TokenPart>(*bank_, ids_per_token, model_.device(), [this] { return now(); });
}

void TokenReuse::keep(std::vector<Computed> computed) {
  const c10::InferenceMode any_tensor;  // pending entries may come from a pass in that mode
  for (Computed& one : computed) {
    // Attention spreads what is not finite to all final states.
    if (one.states && !one.states->final_states().isfinite().all().item<bool>()) continue;
    bank_->keep(one.key.partition, {one.key.tokens, one.key.ids_per_token}, std::move(one.states), one.ms, now());
  }
}

}  // namespace llmcache
