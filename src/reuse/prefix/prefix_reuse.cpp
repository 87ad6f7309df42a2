#include "reuse/prefix/prefix_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <span>

#include "execute/clock.h"
#include "execute/padding_ids.h"
#include "match/size_class.h"
#include "model/packing.h"
#include "model/shallow_model.h"
#include "model/tensors_of.h"
#include "reuse/miss_reason.h"
#include "reuse/prefix/prefix_part.h"
#include "reuse/prefix/stored_prefixes.h"

namespace llmcache {
namespace {

/// Least room of a block for a sequence that grows, tokens.
constexpr std::int64_t kLeastRoom = 64;

/// The first `tokens` tokens of ranges.
std::vector<KeyRange> first_of(const std::vector<KeyRange>& ranges, std::int64_t tokens) {
  std::vector<KeyRange> first;
  for (const KeyRange& range : ranges) {
    if (tokens == 0) break;
    first.push_back(range);
    first.back().tokens = std::min(range.tokens, tokens);
    tokens -= first.back().tokens;
  }
  return first;
}

/// Appends a range, as part of the last one where it follows that in the same block.
void append(std::vector<KeyRange>& ranges, const KeyRange& range) {
  if (!ranges.empty() && ranges.back().block == range.block &&
      ranges.back().offset + ranges.back().tokens == range.offset) {
    ranges.back().tokens += range.tokens;
    ranges.back().widen(range);
  } else {
    ranges.push_back(range);
  }
}

/// Inputs that have an entry for each token.
std::size_t ids_per_token(const InputSpec& inputs) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < inputs.names.size(); ++i) count += inputs.is_source(i) ? 0 : 1;
  return count;
}

}  // namespace

/// A sequence of the batch that runs.
struct PrefixReuse::Row {
  RowKey key;
  PrefixLease lease;
  std::vector<KeyRange> prefix;  ///< known before, and computed by another row of the batch
  std::int64_t prefix_tokens = 0;
  std::size_t shared_with = 0;  ///< index of the row that computes what lies between known and prefix tokens
  std::vector<KeyRange> own;    ///< where what it computes goes; empty: it is not kept
  bool kept = false;

  [[nodiscard]] std::int64_t fresh() const { return key.span.tokens - prefix_tokens; }
};

/// States of one pass: from the ranges of its rows, into those that they reserved.
class PrefixReuse::Pass final : public EngineHook {
 public:
  Pass(const PrefixReuse& owner, const std::vector<Row>& rows) : owner_(owner), rows_(rows), final_(rows.size()) {}

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override {
    const Row& row = rows_[sequence];
    const int first = owner_.key_specs_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)];
    const auto& dims = owner_.model_.token_level()->key_dims(layer, attention_op);
    const bool all = row.prefix_tokens == 0 || layer < owner_.resume_;
    if (first >= 0 && row.kept) {
      for (std::size_t i = 0; i < fresh.size(); ++i) {
        write(row, static_cast<std::size_t>(first) + i, dims[i], fresh[i], all ? row.prefix_tokens : 0);
      }
    }
    if (all) return {{row.key.span.tokens, std::move(fresh)}};
    auto ranges = row.prefix;
    if (row.kept) {
      for (const KeyRange& range : row.own) append(ranges, range);
    }
    std::vector<KeySegment> segments;
    for (const KeyRange& range : ranges) {
      KeySegment& segment = segments.emplace_back(KeySegment{range.tokens, {}});
      for (std::size_t i = 0; i < fresh.size(); ++i) {
        segment.keys.push_back(
            range.block->tensor(static_cast<std::size_t>(first) + i).narrow(dims[i], range.offset, range.tokens));
      }
    }
    if (!row.kept) segments.push_back({row.fresh(), std::move(fresh)});
    return segments;
  }

  at::Tensor entering(std::size_t, std::int32_t, std::int64_t, std::int64_t) override { return {}; }

  void finished(std::size_t sequence, const at::Tensor& fresh) override {
    const Row& row = rows_[sequence];
    const std::int64_t skip = fresh.size(1) - row.fresh();
    final_[sequence] = fresh.narrow(1, skip, row.fresh());
    if (row.kept) write(row, owner_.final_spec_, 1, fresh, skip);
  }

  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override {
    const Row& row = rows_[sequence];
    std::vector<at::Tensor> pieces;
    std::int64_t at = 0;
    for (const KeyRange& range : row.prefix) {
      const auto from = std::max(begin, at);
      const auto to = std::min(end, at + range.tokens);
      if (from < to) {
        pieces.push_back(range.block->tensor(owner_.final_spec_).narrow(1, range.offset + from - at, to - from));
      }
      at += range.tokens;
    }
    if (end > at) {
      const auto from = std::max(begin, at);
      pieces.push_back(final_[sequence].narrow(1, from - at, end - from));
    }
    return pieces.size() == 1 ? pieces[0] : at::cat(pieces, 1);
  }

 private:
  /// `fresh` from token `skip` on, into the row's own ranges.
  static void write(const Row& row, std::size_t spec, std::int64_t dim, const at::Tensor& fresh, std::int64_t skip) {
    for (const KeyRange& range : row.own) {
      range.block->tensor(spec).narrow(dim, range.offset, range.tokens).copy_(fresh.narrow(dim, skip, range.tokens));
      skip += range.tokens;
    }
  }

  const PrefixReuse& owner_;
  const std::vector<Row>& rows_;
  std::vector<at::Tensor> final_;  ///< of the row's own tokens
};

PrefixReuse::PrefixReuse(const WrappedModel& wrapped, const Verification& verification, const PrefixOptions& options,
                         std::size_t capacity_bytes, MemoryAccount* total)
    : wrapped_(wrapped),
      model_(*wrapped.model),
      verification_(verification),
      options_((options.validate(model_.layers()), options)),
      bank_({capacity_bytes, options.eviction, ids_per_token(wrapped.inputs), key_specs(), total}) {}

std::vector<KeySpec> PrefixReuse::key_specs() {
  // One tiny sequence shows what there is to keep, through layers of each kind.
  const auto layers = static_cast<std::int32_t>(model_.layers());
  const auto shallow = ShallowModel::of(wrapped_.model);
  const Model& few = shallow == nullptr ? model_ : *shallow;
  const auto probe = probe_inputs(wrapped_.inputs, model_.device(), 1, 2);
  Donors captured;
  ForwardReport report;
  const auto depth = static_cast<std::int32_t>(few.layers());
  execute_packed(few, probe, {1, 2, depth, {compute_all(0, 0, 2, depth)}}, {}, &captured, report);
  std::vector<KeySpec> specs;
  const auto add = [&](const at::Tensor& tensor, std::int64_t dim) {
    specs.push_back({tensor.sizes().vec(), dim, tensor.options()});
  };
  for (std::int32_t l = 0; l < layers; ++l) {
    const bool kept = options_.layers.empty() || std::binary_search(options_.layers.begin(), options_.layers.end(), l);
    if (!kept) resume_ = l + 1;
    auto& attention_ops = key_specs_.emplace_back();
    for (std::int64_t s = 0; s < model_.token_level()->attention_ops(l); ++s) {
      attention_ops.push_back(kept ? static_cast<int>(specs.size()) : -1);
      if (!kept) continue;
      const auto run = static_cast<std::size_t>(shallow == nullptr ? l : shallow->like(l));
      const auto& keys = captured[0]->keys[run][static_cast<std::size_t>(s)];
      for (std::size_t i = 0; i < keys.size(); ++i) add(keys[i], model_.token_level()->key_dims(l, s)[i]);
    }
  }
  final_spec_ = specs.size();
  add(captured[0]->hidden.back(), 1);
  return specs;
}

double PrefixReuse::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

std::vector<PrefixReuse::Row> PrefixReuse::look_up(const Batch& batch, const std::string& tenant) {
  if (pins_) pins_->drop_late();
  std::vector<Row> rows;
  for (RowKey& key : batch.keys(tenant)) {
    Row& row = rows.emplace_back();
    row.key = std::move(key);
    row.lease = bank_.find(row.key.partition, row.key.tokens, now());
    row.prefix = row.lease.known();
    row.prefix_tokens = row.lease.known_tokens();
  }
  return rows;
}

void PrefixReuse::reserve(Row& row) {
  if (row.fresh() == 0) {
    row.kept = true;
    return;
  }
  const std::int64_t room = row.lease.continues() ? std::max(kLeastRoom, row.prefix_tokens) : 0;
  row.kept = bank_.reserve(row.lease, row.prefix.empty() ? nullptr : &row.prefix.back(), row.fresh(), room,
                           size_class(row.key.span.tokens));
  if (row.kept) row.own = row.lease.reserved();
}

/// Rows that begin alike compute their common beginning once: the first of them does.
void PrefixReuse::share(std::vector<Row>& rows) const {
  Row& row = rows.back();
  std::int64_t best = row.prefix_tokens;
  const Row* from = nullptr;
  for (std::size_t j = 0; j + 1 < rows.size(); ++j) {
    const Row& other = rows[j];
    if (!other.kept || other.key.partition != row.key.partition) continue;
    const auto length = std::min(row.key.tokens.size(), other.key.tokens.size());
    const auto [end, _] = std::mismatch(
        row.key.tokens.begin(), row.key.tokens.begin() + static_cast<std::ptrdiff_t>(length), other.key.tokens.begin());
    const auto common = (end - row.key.tokens.begin()) / static_cast<std::ptrdiff_t>(row.key.ids_per_token);
    if (common > best) {
      best = common;
      from = &other;
    }
  }
  if (from == nullptr) return;
  auto ranges = from->prefix;
  for (const KeyRange& range : from->own) append(ranges, range);
  row.prefix = first_of(ranges, best);
  row.prefix_tokens = best;
  row.shared_with = static_cast<std::size_t>(from - rows.data());
}

/// What the rows read, and the room that they write to, may be other streams' until now.
void PrefixReuse::order_streams(const std::vector<Row>& rows) const {
  if (model_.device().is_cpu()) return;
  wrapped_.streams->enter(model_.device());
  for (const Row& row : rows) {
    for (const auto* ranges : {&row.prefix, &row.own}) {
      for (const KeyRange& range : *ranges) {
        for (std::size_t spec = 0; spec <= final_spec_; ++spec) wrapped_.streams->uses(range.block->tensor(spec));
      }
    }
  }
}

Plan PrefixReuse::plan(const Batch& batch, const std::vector<Row>& rows) const {
  const auto layers = static_cast<std::int32_t>(model_.layers());
  Plan plan{batch.rows, batch.padded_length, layers, {}};
  for (const Row& row : rows) {
    SequencePlan sequence{row.key.row, row.key.span.first, row.key.span.tokens, -1, {}};
    if (row.prefix_tokens > 0) sequence.ranges.push_back({0, row.prefix_tokens, 0, resume_, 0});
    if (row.fresh() > 0) sequence.ranges.push_back({row.prefix_tokens, row.key.span.tokens, 0, layers, 0});
    plan.sequences.push_back(std::move(sequence));
  }
  return plan;
}

Selection PrefixReuse::select(const Plan& plan, const std::vector<Row>& rows, Output output) const {
  if (output == Output::kAll || !wrapped_.profile.head_tokenwise) return select_all(plan);
  Selection selection{output == Output::kLastToken ? 1 : 0, {}, {}};
  if (output == Output::kLastToken) {
    for (const Row& row : rows) selection.spans.push_back({row.key.span.tokens - 1, 1, 0});
    return selection;
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    const auto known = row.lease.known_tokens();
    selection.spans.push_back({row.prefix_tokens, row.fresh(), row.prefix_tokens - known});
    selection.padded_length = std::max(selection.padded_length, row.key.span.tokens - known);
    // What another row computes for this one, or a row before that one.
    auto end = row.prefix_tokens;
    for (std::size_t from = row.shared_with; end > known; from = rows[from].shared_with) {
      const auto begin = std::max(known, rows[from].prefix_tokens);
      if (begin < end) selection.copies.push_back({i, from, begin, end - begin, begin - known});
      end = std::min(end, begin);
    }
  }
  return selection;
}

bool PrefixReuse::accepts(const Call& call) const { return call.packable && !verification_.closed(Mechanism::kPrefix); }

void PrefixReuse::serve(const Call& call, Answers& answers) {
  answers.put(run(answers.open(), call.request.tenant, call.request.output, answers.writes()));
}

void PrefixReuse::add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) {
  parts.push_back(std::make_unique<PrefixPart>(bank_, kept_layers(), [this] { return now(); }));
}

void PrefixReuse::add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) {
  parts.push_back(std::make_unique<StoredPrefixes>(
      bank_, kept_layers(), [this] { return now(); }, [this](const Call& call) { return accepts(call); }));
}

std::string PrefixReuse::kept_layers() const {
  return options_.layers.empty() ? "all" : fmt::format("{}", fmt::join(options_.layers, ","));
}

void PrefixReuse::add_to(Stats& stats) const {
  if (pins_) stats.pins = pins_->count();
  const PrefixBank::Counters counters = bank_.counters();
  stats.pinned_bytes = counters.kept_bytes;
  add(stats, "prefixes", counters);
}

PrefixReuse::~PrefixReuse() {
  if (pins_) pins_->drop_all();  // leases of the caller's may live on
}

void PrefixReuse::clear() {
  if (pins_) pins_->drop_all();
  bank_.clear();
}

TenantErasure PrefixReuse::erase_tenant(const std::string& tenant) {
  const std::uint64_t pins = pins_ ? pins_->drop(tenant) : 0;
  TenantErasure erased = ReuseStrategy::erase_tenant(tenant);
  erased.pins = pins;
  return erased;
}

void PrefixReuse::allow_pins(double share, std::function<double()> clock) {
  pinned_share_ = share;
  pins_ = std::make_shared<PinnedPrefixes>(std::move(clock));
}

PinLease PrefixReuse::pin(const Batch& batch, const std::string& tenant, double seconds) {
  std::vector<PrefixLease> leases;
  std::int64_t tokens = 0;
  pins_->drop_late();
  for (const RowKey& key : batch.keys(tenant)) {
    auto kept = bank_.keep(key.partition, key.tokens, pinned_share_);
    if (!kept.refused.empty()) {
      throw Error(ErrorCode::kNotAvailable, fmt::format("row {} cannot be pinned: {}", key.row, kept.refused));
    }
    tokens += key.span.tokens;
    leases.push_back(std::move(kept.lease));
  }
  return {pins_, pins_->add(tenant, seconds, std::move(leases)), tokens};
}

PassResult PrefixReuse::run(const Batch& batch, const std::string& tenant, Output output, DeferredWrites& writes) {
  PassResult done;
  ForwardReport& report = done.report;
  Stopwatch clock;
  auto all = look_up(batch, tenant);
  std::vector<Row> rows;
  rows.reserve(all.size());
  for (Row& row : all) {
    rows.push_back(std::move(row));
    share(rows);
    reserve(rows.back());
  }
  order_streams(rows);
  const Plan passed = plan(batch, rows);
  report.lookup_ms += clock.lap();
  Pass pass(*this, rows);
  done.value = execute_packed(model_, batch, passed, pass, select(passed, rows, output), report);
  const double model_ms = clock.lap();

  std::int64_t computed = 0;
  for (const Row& row : rows) computed += row.fresh();
  const double saved_ms = computed == 0 ? 0 : model_ms / static_cast<double>(computed);
  for (const Row& row : rows) {
    SequenceReport& sequence = report.sequences[static_cast<std::size_t>(row.key.row)];
    const std::int64_t known = row.lease.known_tokens();
    const bool identical = known == row.key.span.tokens && resume_ == 0;
    sequence.source = known == 0 ? Source::kComputed : identical ? Source::kIdentical : Source::kPrefix;
    sequence.similarity = identical ? 1 : 0;
    sequence.reused_tokens = known;
    sequence.shared_tokens = row.prefix_tokens - known;
    tell_evicted(sequence, row.lease.evicted());
    if (known == 0) continue;
    sequence.resumed_layer = resume_;
    const auto served = size_class(row.key.span.tokens);
    done.sizes.emplace_back(SizeCode::Kind::kPrefix, row.lease.shortest(), served);
    done.sizes.emplace_back(SizeCode::Kind::kPrefix, row.lease.longest(), served);
  }
  // The leases of all rows live until then, known ones too: rows build on what others have computed, and what is still
  // read on this stream must not be written to on another.
  if (computed > 0 || !model_.device().is_cpu()) {
    writes.add([this, rows = std::move(rows), saved_ms]() mutable {
      for (Row& row : rows) {
        if (row.fresh() == 0) continue;
        auto ranges = std::move(row.prefix);
        ranges.insert(ranges.end(), row.own.begin(), row.own.end());
        bank_.commit(row.lease, row.key.partition, row.key.tokens, ranges, saved_ms, now());
      }
    });
  }
  report.store_ms += clock.lap();
  done.cut = wrapped_.profile.head_tokenwise;
  return done;
}

void PrefixReuse::keep(const Inputs& inputs) {
  DeferredWrites writes;
  run(check_batch(inputs, wrapped_.inputs, wrapped_.profile, model_.device()), "", Output::kAll, writes);
  writes.commit();
}

bool PrefixReuse::agrees(const Inputs& inputs, std::string& why) {
  Batch batch;
  c10::IValue plain;
  try {
    batch = check_batch(inputs, wrapped_);
    plain = model_.plain(inputs);
  } catch (const std::exception&) {
    return true;  // the model itself does not take this shape
  }
  if (!batch.reads_real_tokens()) return true;  // never packed
  DeferredWrites writes;
  const PassResult got = run(batch, "", Output::kAll, writes);
  writes.commit();
  for (std::int64_t r = 0; r < batch.rows; ++r) {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(r)];
    const auto a = row_of(got.value, wrapped_.output, r, span.first, span.tokens, batch.padded_length);
    const auto b = row_of(plain, wrapped_.output, r, span.first, span.tokens, batch.padded_length);
    for (std::size_t i = 0; i < b.size(); ++i) {
      if (a.size() == b.size() && nearly_equal(a[i], b[i], model_.rounding())) continue;
      why = fmt::format("a sequence of {} tokens, {} of them known, comes out otherwise than from the plain model",
                        span.tokens, got.report.sequences[static_cast<std::size_t>(r)].reused_tokens);
      return false;
    }
  }
  return true;
}

namespace {

/// Ids and types that the model looks for stand in both, so that what they do to tokens before them shows.
void put_special_values(const InputSpec& spec, int mask, const Inputs& main, const Inputs& other) {
  for (std::size_t i = 0; i < main.size(); ++i) {
    if (static_cast<int>(i) == mask || spec.is_source(i)) continue;
    const auto special = special_values(spec, i);
    for (std::size_t k = 0; k < 5; ++k) {
      const auto value = special[(special.size() - 1 + k) % special.size()];
      other[i].toTensor()[0][static_cast<std::int64_t>(6 + 3 * k)].fill_(value);
      main[i].toTensor()[0][static_cast<std::int64_t>(2 + 7 * k)].fill_(value);
    }
  }
}

}  // namespace

bool PrefixReuse::verify(std::string& why, bool briefly) {
  const auto device = model_.device();
  const auto mask = wrapped_.profile.mask_argument;
  // All sequences are beginnings of `main`, or leave it for `other` at some token.
  const auto main = probe_inputs(wrapped_.inputs, device, 1, 40, 5);
  const auto other = probe_inputs(wrapped_.inputs, device, 1, 40, 17);
  put_special_values(wrapped_.inputs, mask, main, other);
  struct Line {
    std::int64_t from_main, tokens;
  };
  const auto inputs_of = [&](const std::vector<Line>& lines, bool left) {
    std::int64_t padded_length = 0;
    for (const Line& line : lines) padded_length = std::max(padded_length, line.tokens);
    std::vector<RowSpan> spans;
    for (const Line& line : lines) spans.push_back({left ? padded_length - line.tokens : 0, line.tokens});
    Inputs inputs;
    for (std::size_t i = 0; i < main.size(); ++i) {
      const auto& first = main[i].toTensor();
      const auto& second = other[i].toTensor();
      if (wrapped_.inputs.is_source(i)) {
        inputs.emplace_back(first.expand({static_cast<std::int64_t>(lines.size()), -1}).contiguous());
        continue;
      }
      auto all = at::zeros({static_cast<std::int64_t>(lines.size()), padded_length}, first.options());
      for (std::size_t r = 0; r < lines.size(); ++r) {
        const Line& line = lines[r];
        auto row = all[static_cast<std::int64_t>(r)].narrow(0, spans[r].first, line.tokens);
        if (static_cast<int>(i) == mask) {
          row.fill_(1);
          continue;
        }
        row.narrow(0, 0, line.from_main).copy_(first[0].narrow(0, 0, line.from_main));
        row.narrow(0, line.from_main, line.tokens - line.from_main)
            .copy_(second[0].narrow(0, line.from_main, line.tokens - line.from_main));
      }
      inputs.emplace_back(all);
    }
    if (!reads_real_tokens(model_, inputs, spans)) {
      fill_padding(model_, wrapped_.inputs, wrapped_.profile.ids_argument, inputs, spans);
    }
    return inputs;
  };
  const auto check = [&](const std::vector<Line>& lines, bool left) { return agrees(inputs_of(lines, left), why); };
  bool right = false;
  try {
    if (briefly) {
      keep(inputs_of({{9, 9}}, false));
      right = check({{5, 14}}, false);
    } else {
      right = check({{9, 9}}, false) &&    // computed
              check({{5, 14}}, false) &&   // leaves it in the middle
              check({{12, 12}}, false) &&  // continues it
              check({{3, 36}}, false);     // leaves it early, and is far longer
      if (right && mask >= 0) right = check({{14, 18}, {6, 9}, {22, 24}, {14, 15}}, false);
      if (right && mask >= 0 && wrapped_.profile.left_padding) {
        right = check({{4, 6}, {9, 11}}, true) && check({{4, 7}, {9, 12}}, true);
      }
    }
  } catch (const std::exception& error) {
    why = reason_of(error);
  }
  clear();
  return right;
}

void find_prefix_reuse(WrappedModel& wrapped) {
  ModelProfile& profile = wrapped.profile;
  if (!profile.causal || profile.granularity != Granularity::kTokens || !wrapped.keeps_rows()) return;
  const InputSpec& inputs = wrapped.inputs;
  for (std::size_t i = 0; i < inputs.opens_attention.size() && profile.prefix_obstacle.empty(); ++i) {
    // A mask closes attention, and a source is known as a whole; what another input does is not known.
    if (inputs.is_source(i)) continue;
    if (static_cast<int>(i) != profile.mask_argument) profile.prefix_obstacle = inputs.opens_attention[i];
  }
  std::string why = profile.prefix_obstacle;
  if (why.empty()) {
    // Verified in a cache of its own, whatever the capacity is.
    constexpr std::size_t kVerifying = std::size_t{1} << 30;
    try {
      const Verification none(0);
      const auto verified = [&](const WrappedModel& of, bool briefly) {
        return PrefixReuse(of, none, PrefixOptions{}, kVerifying).verify(why, briefly);
      };
      if (const auto shallow = ShallowModel::of(wrapped.model)) {
        WrappedModel few = wrapped;
        few.model = shallow;
        few.output = states_output();
        profile.prefix_reuse = verified(few, false) && verified(wrapped, true);
      } else {
        profile.prefix_reuse = verified(wrapped, false);
      }
    } catch (const std::exception& error) {
      why = reason_of(error);
    }
  }
  if (!profile.prefix_reuse) {
    profile.notes.push_back("prefix reuse is not available: " + why);
    return;
  }
  for (std::uint8_t a = 0; a <= PrefixReuse::kVerifiedClass; ++a) {
    for (std::uint8_t b = 0; b <= PrefixReuse::kVerifiedClass; ++b) {
      profile.verified.codes.push_back(SizeCode(SizeCode::Kind::kPrefix, a, b).number());
    }
  }
}

}  // namespace llmcache
