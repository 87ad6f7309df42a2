#include "segment_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "execute/clock.h"
#include "llmcache/error.h"
#include "model/packing.h"

namespace llmcache {
namespace {

bool chooses(const SegmentSettings& settings) { return settings.recompute_share > 0 && settings.recompute_share < 1; }

/// Tokens that go through the same layers, [0, last[t]), as ranges.
std::vector<TokenRange> ranges_of(const std::vector<std::int32_t>& last) {
  std::vector<TokenRange> ranges;
  for (std::size_t t = 0; t < last.size(); ++t) {
    const auto at = static_cast<std::int64_t>(t);
    if (ranges.empty() || ranges.back().last_layer != last[t]) ranges.push_back({at, at, 0, last[t], at});
    ranges.back().end = at + 1;
  }
  return ranges;
}

}  // namespace

void SegmentSettings::validate() const {
  const auto invalid = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidOptions, "SegmentSettings." + what);
  };
  if (!(recompute_share >= 0 && recompute_share <= 1)) {
    invalid(fmt::format("recompute_share is {}, 0 to 1 is expected", recompute_share));
  }
  if (head_tokens < 0) invalid(fmt::format("head_tokens is {}, 0 or more is expected", head_tokens));
  if (least_segment < 1) invalid(fmt::format("least_segment is {}, 1 or more is expected", least_segment));
}

/// A sequence of the batch that runs.
struct SegmentReuse::Row {
  std::int64_t row = 0;
  RowSpan span;
  std::string space;
  std::vector<std::int64_t> tokens;  ///< token after token
  std::vector<SegmentHit> segments;
  std::int64_t exact = 0;            ///< tokens of the exact prefix
  std::vector<std::int32_t> last;    ///< by token: one past the last layer that computes it
  std::vector<std::int64_t> reused;  ///< tokens that need not be computed, the exact prefix left out
  std::shared_ptr<SegmentEntry> entry;

  [[nodiscard]] bool active(std::int64_t token, std::int32_t layer) const {
    return layer < last[static_cast<std::size_t>(token)];
  }
};

/// States of one pass: from donors where they are not computed.
class SegmentReuse::Pass final : public StateSource {
 public:
  Pass(const SegmentReuse& owner, std::vector<Row>& rows, const SegmentSettings& settings)
      : owner_(owner), rows_(rows), settings_(settings), merges_(rows.size()), final_(rows.size()) {
    bool any = false;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      any = any || !rows[i].reused.empty();
      std::vector<std::int64_t>& moves = merges_[i].moves;
      moves.assign(static_cast<std::size_t>(rows[i].span.tokens), 0);
      for (const SegmentHit& segment : rows[i].segments) {
        const auto first = moves.begin() + segment.begin;
        std::fill(first, first + segment.tokens, segment.begin - segment.donor_begin);
      }
      if (std::ranges::all_of(moves, [](std::int64_t move) { return move == 0; })) moves.clear();
      merges_[i].turns.resize(owner.positions_.rotations.size());
    }
    choosing_ = any && chooses(settings) ? settings.choosing_layer : -1;
  }

  [[nodiscard]] std::int32_t choosing_layer() const override { return choosing_; }

  std::vector<TokenRange> choose(std::size_t sequence, const std::vector<at::Tensor>& fresh) override {
    Row& row = rows_[sequence];
    const auto count = static_cast<std::int64_t>(row.reused.size());
    if (count == 0) return ranges_of(row.last);
    const auto device = fresh[0].device();
    const auto reused = at::tensor(row.reused, at::TensorOptions().dtype(at::kLong)).to(device);
    const auto& dims = owner_.model_.token_level()->key_dims(choosing_, 0);
    at::Tensor deviation = at::zeros({count}, fresh[0].options().dtype(at::kFloat));
    for (std::size_t i = 0; i < fresh.size(); ++i) {
      // What is active here stands behind the exact prefix, without gap.
      const auto now = fresh[i].index_select(dims[i], reused - row.exact).to(at::kFloat);
      const auto then =
          known(sequence, choosing_, 0, i, fresh[i], dims[i]).index_select(dims[i], reused).to(at::kFloat);
      const auto squares = [&](const at::Tensor& all) { return all.square().movedim(dims[i], 0).flatten(1).sum(1); };
      const auto scale = squares(now).mean().clamp_min(1e-12);
      deviation += squares(now - then) / scale;
    }
    const auto chosen = static_cast<std::int64_t>(std::ceil(settings_.recompute_share * static_cast<double>(count)));
    const auto best = std::get<1>(deviation.nan_to_num(0.0).topk(chosen)).cpu();
    const auto* number = best.const_data_ptr<std::int64_t>();
    for (const std::int64_t t : row.reused) row.last[static_cast<std::size_t>(t)] = choosing_;
    for (std::int64_t i = 0; i < chosen; ++i) {
      row.last[static_cast<std::size_t>(row.reused[static_cast<std::size_t>(number[i])])] = owner_.layers_;
    }
    return ranges_of(row.last);
  }

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t site,
                               std::vector<at::Tensor> fresh) override {
    const Row& row = rows_[sequence];
    const auto& dims = owner_.model_.token_level()->key_dims(layer, site);
    for (std::size_t i = 0; i < fresh.size(); ++i) {
      if (fresh[i].size(dims[i]) < row.span.tokens) {
        auto all = known(sequence, layer, site, i, fresh[i], dims[i]);
        all.index_copy_(dims[i], active(sequence, layer, fresh[i].device()), fresh[i]);
        fresh[i] = std::move(all);
      }
      if (row.entry) row.entry->set(spec_of(layer, site) + i, fresh[i]);
    }
    return {{row.span.tokens, std::move(fresh)}};
  }

  at::Tensor entering(std::size_t, std::int32_t, std::int64_t, std::int64_t) override { return {}; }

  void finished(std::size_t sequence, const at::Tensor& fresh) override {
    final_[sequence] = fresh;
    if (Row& row = rows_[sequence]; row.entry) row.entry->set(owner_.final_spec_, all_final(sequence));
  }

  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override {
    const Row& row = rows_[sequence];
    if (end - begin == 1 && row.active(begin, owner_.layers_ - 1)) {  // the usual one: the last token alone
      const auto before = std::count(row.last.begin(), row.last.begin() + begin, owner_.layers_);
      return final_[sequence].narrow(1, before, 1);
    }
    return all_final(sequence).narrow(1, begin, end - begin);
  }

 private:
  struct Merge {
    std::vector<std::int64_t> moves;         ///< by token; empty: nothing has moved
    std::vector<std::optional<Turn>> turns;  ///< by rotation
    std::int32_t layer = -1;                 ///< of which `active` is
    at::Tensor active;
  };

  [[nodiscard]] std::size_t spec_of(std::int32_t layer, std::int64_t site) const {
    return owner_.key_specs_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(site)];
  }

  /// Active tokens of a sequence in a layer: the same ones in all layers but the chosen one's neighbours.
  const at::Tensor& active(std::size_t sequence, std::int32_t layer, at::Device device) {
    Merge& merge = merges_[sequence];
    const std::int32_t since = choosing_ >= 0 && layer >= choosing_ ? choosing_ : 0;
    if (merge.layer != since) {
      std::vector<std::int64_t> tokens;
      const Row& row = rows_[sequence];
      for (std::int64_t t = 0; t < row.span.tokens; ++t) {
        if (row.active(t, layer)) tokens.push_back(t);
      }
      merge.active = at::tensor(tokens, at::TensorOptions().dtype(at::kLong)).to(device);
      merge.layer = since;
    }
    return merge.active;
  }

  /// The donors' states of tensor `spec` in their places; what no segment covers is not set.
  [[nodiscard]] at::Tensor gather(const Row& row, std::size_t spec, const at::Tensor& like, std::int64_t dim) const {
    auto shape = like.sizes().vec();
    shape[static_cast<std::size_t>(dim)] = row.span.tokens;
    auto all = at::empty(shape, like.options());
    for (const SegmentHit& segment : row.segments) {
      all.narrow(dim, segment.begin, segment.tokens)
          .copy_(segment.donor->state(spec, segment.donor_begin, segment.tokens));
    }
    return all;
  }

  /// The donors' keys, turned to their places.
  at::Tensor known(std::size_t sequence, std::int32_t layer, std::int64_t site, std::size_t i, const at::Tensor& like,
                   std::int64_t dim) {
    auto all = gather(rows_[sequence], spec_of(layer, site) + i, like, dim);
    Merge& merge = merges_[sequence];
    if (merge.moves.empty()) return all;
    const int number =
        owner_.positions_.rotation_of[static_cast<std::size_t>(layer)][static_cast<std::size_t>(site)][i];
    if (number < 0) return all;
    const KeyRotation& rotation = owner_.positions_.rotations[static_cast<std::size_t>(number)];
    auto& turn = merge.turns[static_cast<std::size_t>(number)];
    if (!turn) turn = turn_of(rotation, merge.moves, like.device());
    rotate_(all, dim, rotation, *turn);
    return all;
  }

  at::Tensor all_final(std::size_t sequence) {
    const Row& row = rows_[sequence];
    const at::Tensor& fresh = final_[sequence];
    if (fresh.defined() && fresh.size(1) == row.span.tokens) return fresh;
    const at::Tensor like = fresh.defined() ? fresh : row.segments[0].donor->state(owner_.final_spec_, 0, 1);
    auto all = gather(row, owner_.final_spec_, like, 1);
    if (fresh.defined()) all.index_copy_(1, active(sequence, owner_.layers_ - 1, fresh.device()), fresh);
    return all;
  }

  const SegmentReuse& owner_;
  std::vector<Row>& rows_;
  const SegmentSettings& settings_;
  std::int32_t choosing_ = -1;
  std::vector<Merge> merges_;
  std::vector<at::Tensor> final_;  ///< of the tokens that ran through the last layer
};

SegmentReuse::SegmentReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                           const ModelProfile& profile, const SegmentOptions& options, std::size_t capacity_bytes)
    : model_(model),
      inputs_(inputs),
      output_(output),
      profile_(profile),
      layers_(static_cast<std::int32_t>(model.layers())),
      settings_(bank_settings(options, capacity_bytes)),
      positions_(find_key_positions(model, inputs.vocabulary)),
      bank_(settings_) {
  verify(options);
}

SegmentBank::Settings SegmentReuse::bank_settings(const SegmentOptions& options, std::size_t capacity_bytes) {
  if (!profile_.causal || profile_.granularity != Granularity::kTokens || !profile_.rows_independent ||
      !profile_.per_row_output) {
    throw Error(ErrorCode::kNotAvailable,
                "segments are reused in causal models that run any subset of tokens; the profile says why this one "
                "is none");
  }
  if (options.block_tokens < 1) {
    throw Error(ErrorCode::kInvalidOptions, "SegmentOptions.block_tokens is 0, 1 or more is expected");
  }
  // One tiny sequence shows what there is to keep.
  const auto probe = probe_inputs(inputs_.vocabulary, model_.device(), 1, 2);
  Donors captured;
  ForwardReport report;
  Plan whole{1, 2, layers_, {compute_all(0, 0, 2, layers_)}};
  execute_packed(model_, probe, whole, {}, &captured, report);
  SegmentBank::Settings settings;
  settings.capacity_bytes = capacity_bytes;
  settings.eviction = options.eviction;
  settings.token_width = inputs_.names.size();
  settings.block_tokens = options.block_tokens;
  settings.format = options.format;
  const auto add = [&](const at::Tensor& tensor, std::int64_t dim) {
    settings.specs.push_back({tensor.sizes().vec(), dim, tensor.options()});
  };
  for (std::int32_t l = 0; l < layers_; ++l) {
    auto& sites = key_specs_.emplace_back();
    for (std::int64_t s = 0; s < model_.token_level()->sites(l); ++s) {
      sites.push_back(settings.specs.size());
      const auto& keys = captured[0]->keys[static_cast<std::size_t>(l)][static_cast<std::size_t>(s)];
      for (std::size_t i = 0; i < keys.size(); ++i) add(keys[i], model_.token_level()->key_dims(l, s)[i]);
    }
  }
  final_spec_ = settings.specs.size();
  add(captured[0]->hidden.back(), 1);
  return settings;
}

double SegmentReuse::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

std::vector<SegmentReuse::Row> SegmentReuse::rows_of(const Batch& batch, const std::string& tenant) const {
  std::vector<at::Tensor> values;  // [batch, tokens] on the CPU, of all inputs
  std::string space;
  for (const c10::IValue& input : batch.inputs) {
    space.push_back(input.isTensor() ? static_cast<char>(input.toTensor().scalar_type()) : static_cast<char>(-1));
    values.push_back(input.isTensor() ? input.toTensor().to(at::kCPU, at::kLong).contiguous()
                                      : at::zeros({batch.rows, batch.width}, at::kLong));
  }
  space += tenant;
  std::vector<Row> rows;
  for (std::int64_t r = 0; r < batch.rows; ++r) {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(r)];
    if (span.tokens == 0) continue;
    Row& row = rows.emplace_back();
    row.row = r;
    row.span = span;
    row.space = space;
    for (std::int64_t t = 0; t < span.tokens; ++t) {
      for (const at::Tensor& value : values) {
        row.tokens.push_back(value.const_data_ptr<std::int64_t>()[r * batch.width + span.first + t]);
      }
    }
  }
  return rows;
}

void SegmentReuse::check(const SegmentSettings& settings) const {
  settings.validate();
  if (!chooses(settings)) return;
  if (!model_.token_level()->self_contained()) {
    throw Error(ErrorCode::kNotAvailable,
                "tokens cannot be chosen by their keys: the active tokens of this model must be the same in all "
                "layers; use a recompute_share of 0 or 1");
  }
  const auto layer = settings.choosing_layer;
  if (layer < 1 || layer >= layers_ || model_.token_level()->sites(layer) == 0) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("SegmentSettings.choosing_layer is {}; a layer above 0 with attention is expected, the "
                            "model has {} layers",
                            layer, layers_));
  }
}

/// Which tokens run how far, before any is chosen.
void SegmentReuse::plan(Row& row, const SegmentSettings& settings) const {
  row.last.assign(static_cast<std::size_t>(row.span.tokens), layers_);
  row.reused.clear();
  row.exact = 0;
  if (settings.recompute_share == 1) std::erase_if(row.segments, [](const SegmentHit& hit) { return !hit.exact; });
  for (const SegmentHit& segment : row.segments) {
    const auto end = segment.begin + segment.tokens;
    if (segment.exact) {
      row.exact = end;
      std::fill(row.last.begin(), row.last.begin() + end, 0);
      continue;
    }
    for (std::int64_t t = segment.begin + settings.head_tokens; t < std::min(end, row.span.tokens - 1); ++t) {
      row.reused.push_back(t);
      row.last[static_cast<std::size_t>(t)] = chooses(settings) ? settings.choosing_layer + 1 : 0;
    }
  }
}

std::vector<std::optional<SegmentMatch>> SegmentReuse::find_in(SegmentBank& bank, const Batch& batch,
                                                               const std::string& tenant,
                                                               const SegmentSettings& settings) const {
  check(settings);
  std::vector<std::optional<SegmentMatch>> matches(static_cast<std::size_t>(batch.rows));
  for (Row& row : rows_of(batch, tenant)) {
    if (row.span.first != 0) continue;
    row.segments = bank.find(row.space, row.tokens, {settings.least_segment, positions_.movable}, now());
    if (row.segments.empty()) continue;
    plan(row, settings);
    double computed = 0;
    for (const std::int32_t layers : row.last) computed += layers;
    if (chooses(settings)) {
      const auto count = static_cast<double>(row.reused.size());
      computed +=
          std::ceil(settings.recompute_share * count) * static_cast<double>(layers_ - settings.choosing_layer) - count;
    }
    const double all = static_cast<double>(row.span.tokens) * static_cast<double>(layers_);
    matches[static_cast<std::size_t>(row.row)] = SegmentMatch{std::move(row.segments), row.exact, computed / all};
  }
  return matches;
}

std::vector<std::optional<SegmentMatch>> SegmentReuse::find(const Batch& batch, const std::string& tenant,
                                                            const SegmentSettings& settings) {
  return find_in(bank_, batch, tenant, settings);
}

Selection SegmentReuse::select(const Plan& plan, const std::vector<Row>& rows, std::optional<Output> output) const {
  Selection selection{0, {}, {}};
  if (!output) {
    selection.spans.resize(rows.size());
    return selection;
  }
  if (*output == Output::kAll || !profile_.head_tokenwise) return select_all(plan);
  for (const Row& row : rows) {
    const auto tokens = *output == Output::kLastToken ? 1 : row.span.tokens - row.exact;
    selection.spans.push_back({row.span.tokens - tokens, tokens, 0});
    selection.width = std::max(selection.width, tokens);
  }
  return selection;
}

c10::IValue SegmentReuse::run_in(SegmentBank& bank, const Batch& batch, const std::string& tenant,
                                 std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                                 std::optional<Output> output, ForwardReport& report) const {
  check(settings);
  if (static_cast<std::int64_t>(matches.size()) != batch.rows) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("{} matches for a batch of {} rows, one a row is expected", matches.size(), batch.rows));
  }
  Stopwatch clock;
  auto rows = rows_of(batch, tenant);
  Plan passed{batch.rows, batch.width, layers_, {}};
  for (Row& row : rows) {
    auto& match = matches[static_cast<std::size_t>(row.row)];
    if (match) row.segments = std::move(match->segments);
    plan(row, settings);
    passed.sequences.push_back({row.row, row.span.first, row.span.tokens, -1, ranges_of(row.last)});
    const bool exact = row.reused.empty() && row.span.first == 0;
    if (settings.keep && exact) row.entry = bank.reserve(row.space, row.tokens, now());
  }
  report.lookup_ms += clock.lap();
  Pass pass(*this, rows, settings);
  auto result = execute_packed(model_, batch.inputs, passed, pass, select(passed, rows, output), report);
  const double model_ms = clock.lap();

  std::int64_t computed = 0;
  for (const Row& row : rows) computed += row.span.tokens - row.exact;
  for (Row& row : rows) {
    if (row.entry) {
      const double part =
          static_cast<double>(row.span.tokens) / static_cast<double>(std::max<std::int64_t>(computed, 1));
      bank.insert(std::move(row.entry), model_ms * part, now());
    }
    SequenceReport& sequence = report.sequences[static_cast<std::size_t>(row.row)];
    sequence.source = !row.reused.empty() ? Source::kPartial : row.exact > 0 ? Source::kPrefix : Source::kComputed;
    sequence.reused_tokens = row.exact;
    if (sequence.source == Source::kPrefix) sequence.resumed_layer = 0;
  }
  report.store_ms += clock.lap();
  return result;
}

void SegmentReuse::verify(const SegmentOptions& options) {
  // Checked in a bank of its own, whatever capacity and format are.
  SegmentBank::Settings own = settings_;
  own.capacity_bytes = std::size_t{1} << 30;
  own.format = nullptr;
  SegmentBank bank(std::move(own));
  const auto block = static_cast<std::int64_t>(options.block_tokens);
  const std::int64_t tokens = 3 * block + 8;
  const auto main = probe_inputs(inputs_.vocabulary, model_.device(), 1, tokens, 5);
  const auto other = probe_inputs(inputs_.vocabulary, model_.device(), 1, tokens, 17);
  const auto run = [&](std::int64_t own_tokens, std::int64_t main_begin, std::int64_t main_tokens, double share) {
    // Some tokens of `main` behind or before some of `other`.
    Inputs given;
    for (std::size_t i = 0; i < main.size(); ++i) {
      const auto known = main[i].toTensor().narrow(1, main_begin, main_tokens);
      const auto fresh = other[i].toTensor().narrow(1, 0, own_tokens);
      given.emplace_back(main_begin == 0 ? at::cat({known, fresh}, 1) : at::cat({fresh, known}, 1));
    }
    const Batch batch = check_batch(given, inputs_, profile_, model_.device());
    SegmentSettings settings;
    settings.recompute_share = share;
    settings.least_segment = block;
    ForwardReport report;
    const auto got = run_in(bank, batch, "", find_in(bank, batch, "", settings), settings, Output::kAll, report);
    if (share < 1) return;
    const auto plain = model_.plain(given);
    const auto want =
        row_of(plain.isNone() ? run_dense(model_, given) : plain, output_, 0, 0, batch.width, batch.width);
    const auto have = row_of(got, output_, 0, 0, batch.width, batch.width);
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (nearly_equal(have.at(i), want[i])) continue;
      throw Error(
          ErrorCode::kNotAvailable,
          fmt::format("a sequence of {} tokens, {} of them known, comes out otherwise than from the plain model",
                      batch.width, report.sequences[0].reused_tokens));
    }
  };
  run(0, 0, tokens, 1);         // computed, and known from here on
  run(5, 0, 2 * block + 3, 1);  // leaves it
  run(6, 4, tokens - 4, 0);     // has a part of it elsewhere: is it run at all?
  if (model_.token_level()->self_contained() && layers_ > 1) run(7, 4, tokens - 4, 0.3);
}

c10::IValue SegmentReuse::run(const Batch& batch, const std::string& tenant,
                              std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                              Output output, ForwardReport& report) {
  return run_in(bank_, batch, tenant, std::move(matches), settings, output, report);
}

void SegmentReuse::keep(const Batch& batch, const std::string& tenant, ForwardReport& report) {
  SegmentSettings lossless;
  lossless.recompute_share = 1;
  run_in(bank_, batch, tenant, find(batch, tenant, lossless), lossless, std::nullopt, report);
}

}  // namespace llmcache
