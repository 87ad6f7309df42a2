#include "reuse/source/source_reuse.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <exception>
#include <unordered_map>
#include <utility>

#include "bank/tensor_bytes.h"
#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/run_model.h"
#include "match/size_class.h"
#include "model/index_tensor.h"
#include "model/packing.h"
#include "model/probe.h"
#include "model/tensors_of.h"
#include "reuse/exact_match/stored_outputs.h"
#include "store/byte_io.h"

namespace llmcache {

/// A source of the batch.
struct SourceReuse::Distinct {
  std::string key;
  std::int64_t row = 0;                      ///< the first that has it
  std::int64_t tokens = 0;                   ///< that decide anything
  std::shared_ptr<const OutputEntry> entry;  ///< null: it is not known
  std::vector<at::Tensor> values;            ///< `[1, ...]`, cut to its tokens
  std::int64_t computed_length = 0;          ///< padded length that it was computed in
};

struct SourceReuse::Found {
  std::vector<Distinct> sources;
  std::vector<std::size_t> of_row;   ///< index in sources
  std::vector<at::Tensor> as_model;  ///< of all rows, computed as the model itself does; empty: they were not
};

bool SourceReuse::accepts(const Call& call) const {
  return wrapped_.profile.source_reuse && bank_.capacity() > 0 && call.batch.rows > 0 && call.batch.padded_length > 0 &&
         call.batch.source.padded_length > 0 && !verification_.closed(Mechanism::kSource);
}

void SourceReuse::serve(const Call& call, Answers& answers) {
  answers.know_source(find(answers.open(), call.request.tenant, answers.writes()));
}

KnownSource SourceReuse::find(const Batch& batch, const std::string& tenant, DeferredWrites& writes) {
  KnownSource known;
  Stopwatch clock;
  Found found = look_up(batch, tenant);
  known.lookup_ms = clock.lap();
  compute(batch, found, writes);
  known.values = put_together(batch, found);
  known.compute_ms = clock.lap();
  const auto served = size_class(batch.source.padded_length);
  for (std::size_t row = 0; row < found.of_row.size(); ++row) {
    const Distinct& source = found.sources[found.of_row[row]];
    const bool reused = source.entry != nullptr || source.row != static_cast<std::int64_t>(row);
    known.reused_tokens.push_back(reused ? source.tokens : 0);
    if (source.entry) known.owners.push_back(source.entry);
    if (found.as_model.empty()) {
      known.sizes.emplace_back(SizeCode::Kind::kSource, size_class(source.computed_length), served);
    }
  }
  known.as_model = !found.as_model.empty();
  return known;
}

SourceReuse::Found SourceReuse::look_up(const Batch& batch, const std::string& tenant) {
  Found found;
  std::unordered_map<std::string, std::size_t> index;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    std::string key = batch.source_key(row, tenant);
    const auto [at, fresh] = index.try_emplace(key, found.sources.size());
    found.of_row.push_back(at->second);
    if (!fresh) continue;
    Distinct& source = found.sources.emplace_back();
    source.row = row;
    source.tokens = batch.source.tokens[static_cast<std::size_t>(row)];
    source.entry = bank_.find(key, /*exact=*/false);
    source.key = std::move(key);
    if (!source.entry) continue;
    source.values.assign(source.entry->tensors().begin(), source.entry->tensors().end());
    for (const at::Tensor& value : source.values) wrapped_.streams->uses(value);
    source.computed_length = source.entry->padded_length();
  }
  wrapped_.streams->enter(wrapped_.model->device());
  return found;
}

/// Computes those that are not known, all at once, no longer than the longest of them.
void SourceReuse::compute(const Batch& batch, Found& found, DeferredWrites& writes) {
  std::vector<Distinct*> missing;
  std::int64_t length = 0;
  for (Distinct& source : found.sources) {
    if (source.entry) continue;
    missing.push_back(&source);
    length = std::max(length, source.tokens);
  }
  if (missing.empty()) return;
  const bool as_model = static_cast<std::int64_t>(missing.size()) == batch.rows && length == batch.source.padded_length;
  Inputs inputs = batch.inputs;
  if (!as_model) {
    std::vector<std::int64_t> rows;
    for (const Distinct* source : missing) rows.push_back(source->row);
    const auto index = index_tensor(rows, wrapped_.model->device());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!batch.source.has(i) || !inputs[i].isTensor()) continue;
      inputs[i] = inputs[i].toTensor().index_select(0, index).narrow(1, 0, length).contiguous();
    }
  }
  const SourceModel& model = *wrapped_.model->source();
  const auto values = run_model([&] { return model.run(inputs); });
  // Of a single source what was made for it alone is kept as it is. Asked while the inputs are held, which may be it.
  std::vector<char> own;
  for (const at::Tensor& value : values) own.push_back(missing.size() == 1 && owns_memory(value) ? 1 : 0);
  for (std::size_t k = 0; k < missing.size(); ++k) {
    Distinct& source = *missing[k];
    source.computed_length = length;
    for (std::size_t v = 0; v < values.size(); ++v) {
      const auto of_row = values[v].narrow(0, static_cast<std::int64_t>(k), 1);
      const int dim = model.token_dims()[v];
      source.values.push_back(dim < 0 ? of_row : of_row.narrow(dim, 0, source.tokens));
    }
    const BatchSize size{static_cast<std::int32_t>(missing.size()), static_cast<std::int32_t>(length)};
    writes.add(
        [this, key = source.key, tensors = source.values, size, own] { bank_.insert(key, tensors, false, size, own); });
  }
  if (!as_model) return;
  found.as_model = values;
  // Layers that write to them must not write to what is kept.
  if (!model.shareable())
    std::ranges::transform(values, found.as_model.begin(), [](const auto& v) { return v.clone(); });
}

/// For each row of the batch those of its source, zero at padding.
std::vector<at::Tensor> SourceReuse::put_together(const Batch& batch, const Found& found) const {
  if (!found.as_model.empty()) return found.as_model;
  const SourceModel& model = *wrapped_.model->source();
  const bool one_source = found.sources.size() == 1 && found.sources[0].tokens == batch.source.padded_length;
  std::vector<at::Tensor> values;
  for (std::size_t v = 0; v < model.token_dims().size(); ++v) {
    const int dim = model.token_dims()[v];
    auto sizes = found.sources[0].values[v].sizes().vec();
    sizes[0] = batch.rows;
    if (dim >= 0) sizes[static_cast<std::size_t>(dim)] = batch.source.padded_length;
    if (one_source && model.shareable()) {
      values.push_back(found.sources[0].values[v].expand(sizes));  // not copied: they may be large
      continue;
    }
    auto all = at::zeros(sizes, found.sources[0].values[v].options());
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const at::Tensor& own = found.sources[found.of_row[static_cast<std::size_t>(row)]].values[v];
      auto place = all.narrow(0, row, 1);
      if (dim >= 0) place = place.narrow(dim, 0, own.size(dim));
      place.copy_(own);
    }
    values.push_back(std::move(all));
  }
  return values;
}

/// A tiny run tells.
RowForms SourceReuse::forms() const {
  const c10::NoGradGuard no_grad;
  const SourceModel& model = *wrapped_.model->source();
  RowForms forms;
  forms.tensors = run_model([&] { return model.run(probe_inputs(wrapped_.inputs, wrapped_.model->device(), 1, 6)); });
  for (at::Tensor& one : forms.tensors) one = at::empty_like(one, one.options().device(at::kMeta));
  for (const int dim : model.token_dims()) forms.dims.push_back({0, dim, -1});
  // Batch::source_key(): the tenant, a character for each input, tokens.
  forms.tokens_of = [inputs = wrapped_.inputs.names.size()](std::string_view key) {
    ByteReader reader(key);
    static_cast<void>(reader.text());
    static_cast<void>(reader.take(inputs));
    const auto tokens = reader.number<std::int64_t>();
    if (tokens < 1) throw DamagedData("it has what follows from no token");
    return tokens;
  };
  return forms;
}

void SourceReuse::add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) {
  if (!wrapped_.profile.source_reuse) return;
  parts.push_back(std::make_unique<OutputPart>("sources", FrameKind::kSource, std::make_shared<const RowForms>(forms()),
                                               bank_, wrapped_.model->device()));
}

/// The sources of a call, each once.
std::vector<StoredRow> SourceReuse::stored_rows(const Call& call) const {
  std::vector<StoredRow> rows;
  if (!accepts(call)) return rows;
  for (std::int64_t row = 0; row < call.batch.rows; ++row) {
    std::string key = call.batch.source_key(row, call.request.tenant);
    if (std::ranges::any_of(rows, [&](const StoredRow& one) { return one.partition == key; })) continue;
    const std::int64_t tokens = call.batch.source.tokens[static_cast<std::size_t>(row)];
    rows.push_back({row, tokens, call.request.tenant, std::move(key), {}, 1, false});
  }
  return rows;
}

namespace {

/// A row is not answered by what follows from its source.
class StoredSources final : public StoredOutputs {
 public:
  using StoredOutputs::StoredOutputs;
  std::int64_t known_before(const SequenceReport& made) const override { return made.source_reused; }
  bool answers_rows() const override { return false; }
};

}  // namespace

void SourceReuse::add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) {
  if (!wrapped_.profile.source_reuse) return;
  parts.push_back(std::make_unique<StoredSources>(TierDomain::kSource, forms(), bank_, wrapped_.model->device(),
                                                  [this](const Call& call) { return stored_rows(call); }));
}

namespace {

constexpr std::int64_t kVerifiedSource = 16;  // tokens: the largest power of two below those of the probe

bool rows_agree(const WrappedModel& wrapped, SourceReuse& reuse, const Batch& batch, DeferredWrites& writes) {
  const Model& model = *wrapped.model;
  Batch own = batch;
  own.source.values = reuse.find(batch, "", writes).values;
  ForwardReport report;
  const auto got = tensors_of(execute_dense(model, own.model_inputs(), report));
  const auto want = tensors_of(model.plain(batch.inputs));
  if (got.size() != want.size()) return false;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (!nearly_equal(got[i], want[i], model.rounding())) return false;
  }
  return true;
}

/// Two rows of one source and one of a shorter one, padded: once as the model does it, once from what is kept of each.
bool sources_agree(const WrappedModel& wrapped) {
  const Model& model = *wrapped.model;
  Inputs inputs = probe_inputs(wrapped.inputs, model.device(), 3, 6, 13);
  const bool masked = wrapped.profile.source_mask_argument >= 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!wrapped.inputs.is_source(i)) continue;
    auto source = inputs[i].toTensor().clone();
    source[1].copy_(source[0]);
    if (static_cast<int>(i) == wrapped.profile.source_mask_argument) source[2].narrow(0, 7, source.size(1) - 7).zero_();
    inputs[i] = source;
  }
  const Batch batch = check_batch(inputs, wrapped);
  constexpr std::size_t kVerifying = std::size_t{1} << 30;
  const Verification none(0);
  // Taken from a row of the same batch, and then known; the last source first alone and without its padding.
  {
    SourceReuse reuse(wrapped, none, kVerifying);
    DeferredWrites writes;
    if (masked) {
      (void)reuse.find(batch.select({2}), "", writes);
      writes.commit();
    }
    for (int round = 0; round < 2; ++round) {
      if (!rows_agree(wrapped, reuse, batch, writes)) return false;
      writes.commit();
    }
  }
  // Computed as the model itself does it; kept only then, as in a call; and known.
  SourceReuse reuse(wrapped, none, kVerifying);
  const Batch first = batch.select({0});
  for (int round = 0; round < 3; ++round) {
    DeferredWrites writes;
    if (!rows_agree(wrapped, reuse, first, writes)) return false;
    writes.commit();
  }
  return true;
}

}  // namespace

void find_source_reuse(WrappedModel& wrapped) {
  ModelProfile& profile = wrapped.profile;
  if (wrapped.model->source() == nullptr || !wrapped.keeps_rows()) return;
  std::string why = "kept sources give another result than the plain model";
  try {
    profile.source_reuse = sources_agree(wrapped);
  } catch (const std::exception& error) {
    why = reason_of(error);
  }
  for (std::uint8_t a = 0; profile.source_reuse && a <= size_class(kVerifiedSource); ++a) {
    for (std::uint8_t b = a; b <= size_class(kVerifiedSource); ++b) {
      profile.verified.codes.push_back(SizeCode(SizeCode::Kind::kSource, a, b).number());
    }
  }
  if (!profile.source_reuse) profile.notes.push_back("what follows from a source alone is not kept: " + why);
}

}  // namespace llmcache
