#include "reuse/segment_reuse/segment_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "execute/clock.h"
#include "llmcache/error.h"
#include "model/packing.h"
#include "reuse/miss_reason.h"
#include "reuse/segment_reuse/segment_part.h"

namespace llmcache {

SegmentReuse::SegmentReuse(const WrappedModel& wrapped, const SegmentOptions& options, std::size_t capacity_bytes,
                           MemoryAccount* total)
    : wrapped_(wrapped),
      model_(*wrapped.model),
      settings_(bank_settings(options, capacity_bytes, total)),
      most_averaged_(options.most_averaged),
      bank_(settings_) {
  layout_.positions = find_key_positions(model_, wrapped.inputs);
  verify(options);
}

SegmentBank::Settings SegmentReuse::bank_settings(const SegmentOptions& options, std::size_t capacity_bytes,
                                                  MemoryAccount* total) {
  if (!wrapped_.profile.causal || wrapped_.profile.granularity != Granularity::kTokens ||
      !wrapped_.profile.rows_independent || !wrapped_.profile.per_row_output) {
    throw Error(ErrorCode::kNotAvailable,
                "segments are reused in causal models that run any subset of tokens; the profile says why this one "
                "is none");
  }
  if (wrapped_.inputs.has_source()) {
    throw Error(ErrorCode::kNotAvailable, "segments of an encoder-decoder's target follow from its source too");
  }
  if (!wrapped_.profile.prefix_obstacle.empty())
    throw Error(ErrorCode::kNotAvailable, wrapped_.profile.prefix_obstacle);
  if (options.block_tokens < 1) {
    throw Error(ErrorCode::kInvalidOptions, "SegmentOptions.block_tokens is 0, 1 or more is expected");
  }
  layout_.layers = static_cast<std::int32_t>(model_.layers());
  // One tiny sequence shows what there is to keep.
  const auto probe = probe_inputs(wrapped_.inputs, model_.device(), 1, 2);
  Donors captured;
  ForwardReport report;
  Plan whole{1, 2, layout_.layers, {compute_all(0, 0, 2, layout_.layers)}};
  execute_packed(model_, probe, whole, {}, &captured, report);
  SegmentBank::Settings settings;
  settings.capacity_bytes = capacity_bytes;
  settings.total = total;
  settings.eviction = options.eviction;
  settings.ids_per_token = wrapped_.inputs.names.size();
  settings.block_tokens = options.block_tokens;
  settings.format = options.format;
  const auto add = [&](const at::Tensor& tensor, std::int64_t dim) {
    settings.specs.push_back({tensor.sizes().vec(), dim, tensor.options()});
  };
  for (std::int32_t l = 0; l < layout_.layers; ++l) {
    auto& attention_ops = layout_.key_specs.emplace_back();
    for (std::int64_t s = 0; s < model_.token_level()->attention_ops(l); ++s) {
      attention_ops.push_back(settings.specs.size());
      const auto& keys = captured[0]->keys[static_cast<std::size_t>(l)][static_cast<std::size_t>(s)];
      for (std::size_t i = 0; i < keys.size(); ++i) add(keys[i], model_.token_level()->key_dims(l, s)[i]);
    }
  }
  layout_.final_spec = settings.specs.size();
  add(captured[0]->hidden.back(), 1);
  return settings;
}

/// Makes passages that `entry`, which is not known yet, has in common with what the bank knows means over both.
void SegmentReuse::average_passages(SegmentBank& bank, const SegmentEntry& entry, double saved_ms) const {
  constexpr std::size_t kLeast = 32;  // tokens; what is shorter is no passage
  if (most_averaged_ < 2 || !layout_.positions.movable) return;
  const auto ids_per_token = settings_.ids_per_token;
  const SegmentBank::Wanted wanted{
      .least = static_cast<std::int64_t>(std::max(kLeast, settings_.block_tokens)), .moved = true, .use = false};
  for (const SegmentHit& hit : bank.find(entry.partition(), entry.tokens(), wanted, now())) {
    if (hit.exact) continue;
    hit.donor->each_tensor([this](const at::Tensor& tensor) { wrapped_.streams->uses(tensor); });
    wrapped_.streams->enter(model_.device());
    // A mean is followed only by one of nearly all of it: an edited passage must not cut it down.
    const auto donor_tokens = static_cast<std::int64_t>(hit.donor->tokens().size() / ids_per_token);
    if (hit.donor->is_mean() && 10 * hit.tokens < 9 * donor_tokens) continue;
    const auto known = std::min<std::int64_t>(hit.donor->origin().averaged, most_averaged_ - 1);
    const SegmentOrigin origin{hit.begin - hit.move(), static_cast<std::uint16_t>(known + 1)};
    const auto tokens = entry.tokens().subspan(static_cast<std::size_t>(hit.begin) * ids_per_token,
                                               static_cast<std::size_t>(hit.tokens) * ids_per_token);
    auto mean = bank.reserve_mean(entry.partition(), tokens, origin);
    const auto share = static_cast<double>(tokens.size()) / static_cast<double>(entry.tokens().size());
    if (mean.refused) return bank.insert_mean(std::move(mean), *hit.donor, saved_ms * share, now());
    const auto& rotations = layout_.positions.rotations;
    std::vector<RotationAngles> angles;  // back to where the donor's keys stand, by rotation
    const std::vector<std::int64_t> back(static_cast<std::size_t>(hit.tokens), -hit.move());
    for (const KeyRotation& rotation : rotations) angles.push_back(angles_of(rotation, back, model_.device()));
    const auto set = [&](std::size_t spec, int rotation) {
      auto states = entry.state(spec, hit.begin, hit.tokens).clone();
      if (rotation >= 0 && hit.move() != 0) {
        const auto number = static_cast<std::size_t>(rotation);
        rotate_(states, settings_.specs[spec].token_dim, rotations[number], angles[number]);
      }
      const double weight = static_cast<double>(known) / static_cast<double>(known + 1);
      states.lerp_(hit.donor->state(spec, hit.donor_begin, hit.tokens), weight);
      mean.pending->set(spec, states);
    };
    for (std::size_t l = 0; l < layout_.key_specs.size(); ++l) {
      for (std::size_t s = 0; s < layout_.key_specs[l].size(); ++s) {
        const auto& numbers = layout_.positions.rotation_of[l][s];
        for (std::size_t i = 0; i < numbers.size(); ++i) set(layout_.key_specs[l][s] + i, numbers[i]);
      }
    }
    set(layout_.final_spec, -1);
    bank.insert_mean(std::move(mean), *hit.donor, saved_ms * share, now());
  }
}

std::unique_ptr<SnapshotPart> SegmentReuse::snapshot_part() {
  std::string order;
  for (const auto& attention_ops : layout_.key_specs) order += fmt::format("keys {}; ", fmt::join(attention_ops, ","));
  order += fmt::format("final {}", layout_.final_spec);
  return std::make_unique<SegmentPart>(bank_, std::move(order), model_.device(), [this] { return now(); });
}

double SegmentReuse::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

std::vector<SegmentRow> SegmentReuse::rows_of(const Batch& batch, const std::string& tenant) const {
  std::vector<SegmentRow> rows;
  for (RowKey& key : batch.keys(tenant)) static_cast<RowKey&>(rows.emplace_back()) = std::move(key);
  return rows;
}

void SegmentReuse::check(const SegmentSettings& settings) const {
  settings.validate();
  if (!settings.chooses()) return;
  if (!model_.token_level()->self_contained()) {
    throw Error(ErrorCode::kNotAvailable,
                "tokens cannot be chosen by their keys: the active tokens of this model must be the same in all "
                "layers; use a recompute_share of 0 or 1");
  }
  const auto layer = settings.choosing_layer;
  if (layer < 1 || layer >= layout_.layers || model_.token_level()->attention_ops(layer) == 0) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("SegmentSettings.choosing_layer is {}; a layer above 0 with attention is expected, the "
                            "model has {} layers",
                            layer, layout_.layers));
  }
}

/// Which tokens run how far, before any is chosen.
void SegmentReuse::plan(SegmentRow& row, const SegmentBank& bank, const SegmentSettings& settings) const {
  row.last.assign(static_cast<std::size_t>(row.span.tokens), layout_.layers);
  row.reused.clear();
  row.beginning = 0;
  row.rounded = !bank.lossless();
  if (settings.recompute_share == 1)
    std::erase_if(row.segments, [&](const SegmentHit& hit) { return !hit.exact || row.rounded; });
  for (const SegmentHit& segment : row.segments) {
    const auto end = segment.begin + segment.tokens;
    if (segment.exact) {
      row.beginning = end;
      std::fill(row.last.begin(), row.last.begin() + end, 0);
      continue;
    }
    for (std::int64_t t = segment.begin + settings.head_tokens; t < std::min(end, row.span.tokens - 1); ++t) {
      row.reused.push_back(t);
      row.last[static_cast<std::size_t>(t)] = settings.chooses() ? settings.choosing_layer + 1 : 0;
    }
  }
}

std::vector<std::optional<SegmentMatch>> SegmentReuse::find_in(SegmentBank& bank, const Batch& batch,
                                                               const std::string& tenant,
                                                               const SegmentSettings& settings) const {
  check(settings);
  std::vector<std::optional<SegmentMatch>> matches(static_cast<std::size_t>(batch.rows));
  for (SegmentRow& row : rows_of(batch, tenant)) {
    if (row.span.first != 0) continue;
    row.segments = bank.find(row.partition, row.tokens, {settings.least_segment, layout_.positions.movable}, now());
    if (row.segments.empty()) continue;
    for (const SegmentHit& hit : row.segments) {
      hit.donor->each_tensor([this](const at::Tensor& tensor) { wrapped_.streams->uses(tensor); });
    }
    plan(row, bank, settings);
    double computed = 0;
    for (const std::int32_t layers : row.last) computed += layers;
    if (settings.chooses()) {
      const auto count = static_cast<double>(row.reused.size());
      computed +=
          std::ceil(settings.recompute_share * count) * static_cast<double>(layout_.layers - settings.choosing_layer) -
          count;
    }
    const double all = static_cast<double>(row.span.tokens) * static_cast<double>(layout_.layers);
    matches[static_cast<std::size_t>(row.row)] = SegmentMatch{std::move(row.segments), row.exact(), computed / all};
  }
  wrapped_.streams->enter(model_.device());
  return matches;
}

std::vector<std::optional<SegmentMatch>> SegmentReuse::find(const Batch& batch, const std::string& tenant,
                                                            const SegmentSettings& settings) {
  return find_in(bank_, batch, tenant, settings);
}

Selection SegmentReuse::select(const Plan& plan, const std::vector<SegmentRow>& rows,
                               std::optional<Output> output) const {
  Selection selection{0, {}, {}};
  if (!output) {
    selection.spans.resize(rows.size());
    return selection;
  }
  if (*output == Output::kAll || !wrapped_.profile.head_tokenwise) return select_all(plan);
  for (const SegmentRow& row : rows) {
    const auto tokens = *output == Output::kLastToken ? 1 : row.span.tokens - row.exact();
    selection.spans.push_back({row.span.tokens - tokens, tokens, 0});
    selection.padded_length = std::max(selection.padded_length, tokens);
  }
  return selection;
}

c10::IValue SegmentReuse::run_in(SegmentBank& bank, const Batch& batch, const std::string& tenant,
                                 std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                                 std::optional<Output> output, ForwardReport& report, DeferredWrites& writes) const {
  check(settings);
  if (static_cast<std::int64_t>(matches.size()) != batch.rows) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("{} matches for a batch of {} rows, one a row is expected", matches.size(), batch.rows));
  }
  Stopwatch clock;
  auto rows = rows_of(batch, tenant);
  Plan passed{batch.rows, batch.padded_length, layout_.layers, {}};
  for (SegmentRow& row : rows) {
    auto& match = matches[static_cast<std::size_t>(row.row)];
    if (match) row.segments = std::move(match->segments);
    plan(row, bank, settings);
    passed.sequences.push_back({row.row, row.span.first, row.span.tokens, -1, ranges_of(row)});
    if (settings.keep && row.is_exact() && row.span.first == 0) row.room = bank.reserve(row.partition, row.tokens);
  }
  report.lookup_ms += clock.lap();
  SegmentPass pass(*model_.token_level(), layout_, rows, settings);
  const Selection selection = select(passed, rows, output);
  auto result = execute_packed(model_, batch, passed, pass, selection, report);
  const double model_ms = clock.lap();

  std::int64_t computed = 0;
  for (const SegmentRow& row : rows) computed += row.span.tokens - row.beginning;
  for (const SegmentRow& row : rows) {
    SequenceReport& sequence = report.sequences[static_cast<std::size_t>(row.row)];
    sequence.source = !row.is_exact() ? Source::kPartial : row.exact() > 0 ? Source::kPrefix : Source::kComputed;
    sequence.reused_tokens = row.exact();
    // Where segments were found it is not known of how many of the others was.
    if (row.reused.empty()) tell_evicted(sequence, bank.evicted_tokens(row.partition, row.tokens, row.beginning));
    if (sequence.source == Source::kPrefix) sequence.resumed_layer = 0;
  }
  const double token_ms = model_ms / static_cast<double>(std::max<std::int64_t>(computed, 1));
  if (std::ranges::any_of(rows, [](const SegmentRow& row) { return row.room.pending || row.room.refused; })) {
    writes.add([this, &bank, rows = std::move(rows), token_ms]() mutable {
      for (SegmentRow& row : rows) keep(bank, std::move(row.room), token_ms * static_cast<double>(row.span.tokens));
    });
  }
  report.store_ms += clock.lap();
  return result;
}

void SegmentReuse::keep(SegmentBank& bank, SegmentBank::Room room, double ms) const {
  try {
    if (room.pending) average_passages(bank, *room.pending, ms);
  } catch (const std::exception&) {
    // No memory for a mean: the sequence itself is kept all the same.
  }
  bank.insert(std::move(room), ms, now());
}

void SegmentReuse::verify(const SegmentOptions& options) {
  // Checked in a bank of its own, whatever capacity and format are.
  SegmentBank::Settings own = settings_;
  own.capacity_bytes = std::size_t{1} << 30;
  own.total = nullptr;
  own.format = BankFormat::kAsComputed;
  SegmentBank bank(std::move(own));
  const auto block = static_cast<std::int64_t>(options.block_tokens);
  const std::int64_t tokens = 3 * block + 8;
  const auto main = probe_inputs(wrapped_.inputs, model_.device(), 1, tokens, 5);
  const auto other = probe_inputs(wrapped_.inputs, model_.device(), 1, tokens, 17);
  const auto run = [&](std::int64_t own_tokens, std::int64_t main_begin, std::int64_t main_tokens, double share) {
    // Some tokens of `main` behind or before some of `other`.
    Inputs given;
    for (std::size_t i = 0; i < main.size(); ++i) {
      const auto known = main[i].toTensor().narrow(1, main_begin, main_tokens);
      const auto fresh = other[i].toTensor().narrow(1, 0, own_tokens);
      given.emplace_back(main_begin == 0 ? at::cat({known, fresh}, 1) : at::cat({fresh, known}, 1));
    }
    const Batch batch = check_batch(given, wrapped_);
    SegmentSettings settings;
    settings.recompute_share = share;
    settings.least_segment = block;
    ForwardReport report;
    DeferredWrites kept;
    const auto got = run_in(bank, batch, "", find_in(bank, batch, "", settings), settings, Output::kAll, report, kept);
    kept.commit();
    if (share < 1) return;
    const auto plain = model_.plain(given);
    const auto want = row_of(plain.isNone() ? run_dense(model_, given) : plain, wrapped_.output, 0, 0,
                             batch.padded_length, batch.padded_length);
    const auto have = row_of(got, wrapped_.output, 0, 0, batch.padded_length, batch.padded_length);
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (nearly_equal(have.at(i), want[i], model_.rounding())) continue;
      throw Error(
          ErrorCode::kNotAvailable,
          fmt::format("a sequence of {} tokens, {} of them known, comes out otherwise than from the plain model",
                      batch.padded_length, report.sequences[0].reused_tokens));
    }
  };
  run(0, 0, tokens, 1);         // computed, and known from here on
  run(5, 0, 2 * block + 3, 1);  // leaves it
  run(6, 4, tokens - 4, 0);     // has a part of it elsewhere: is it run at all?
  if (model_.token_level()->self_contained() && layout_.layers > 1) run(7, 4, tokens - 4, 0.3);
}

c10::IValue SegmentReuse::run(const Batch& batch, const std::string& tenant,
                              std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                              Output output, ForwardReport& report, DeferredWrites& writes) {
  return run_in(bank_, batch, tenant, std::move(matches), settings, output, report, writes);
}

c10::IValue SegmentReuse::run(const Batch& batch, const std::string& tenant,
                              std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                              Output output, ForwardReport& report) {
  DeferredWrites kept;
  auto result = run(batch, tenant, std::move(matches), settings, output, report, kept);
  kept.commit();
  return result;
}

void SegmentReuse::keep(const Batch& batch, const std::string& tenant, ForwardReport& report) {
  SegmentSettings lossless;
  lossless.recompute_share = 1;
  DeferredWrites kept;
  run_in(bank_, batch, tenant, find(batch, tenant, lossless), lossless, std::nullopt, report, kept);
  kept.commit();
}

}  // namespace llmcache
