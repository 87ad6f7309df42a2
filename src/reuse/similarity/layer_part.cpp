#include "reuse/similarity/layer_part.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <span>

#include "bank/tenant_key.h"
#include "bank/tensor_bytes.h"
#include "bank/tensor_record.h"
#include "execute/batch.h"
#include "llmcache/error.h"
#include "reuse/similarity/similarity_keys.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// What an entry takes beside its tensors, what its fingerprints are made of, and these.
constexpr std::size_t kLayerEntryBytes = 1024;

}  // namespace

std::string CentrePart::layout() const {
  std::string text;
  for (const Fingerprinter* one : fingerprinters_) text += fmt::format("{} values; ", one->dims());
  return text;
}

void CentrePart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  CentresRecord record;
  bool any = false;
  for (const Fingerprinter* one : fingerprinters_) {
    auto state = one->running().value();
    any |= state.observations > 0;
    record.centres.push_back({state.observations, std::move(state.sums), std::move(state.centre)});
  }
  if (!any) return;
  writer.frame(kind(), write_centres(record));
  ++report.entries;
}

std::size_t CentrePart::check(std::string_view entry) const {
  const CentresRecord record = read_centres(entry);
  if (record.centres.size() != fingerprinters_.size()) throw DamagedData("it has means of other layers");
  for (std::size_t i = 0; i < record.centres.size(); ++i) {
    const CentresRecord::Centre& one = record.centres[i];
    const auto dims = static_cast<std::size_t>(fingerprinters_[i]->dims());
    const std::size_t values = one.observations < RunningCentre::kFirst ? 0 : dims;
    if (one.observations > RunningCentre::kLast || one.sums.size() != dims || one.centre.size() != values) {
      throw DamagedData("it has a mean of another form");
    }
  }
  return 0;
}

SnapshotPart::Outcome CentrePart::take(std::string_view entry, SnapshotPartReport& /*report*/) {
  CentresRecord record = read_centres(entry);
  const bool used = std::ranges::any_of(fingerprinters_, [](const auto* one) { return one->running()->observations; });
  if (used) return Outcome::kOther;
  bool taken = true;
  for (std::size_t i = 0; i < record.centres.size(); ++i) {
    CentresRecord::Centre& one = record.centres[i];
    taken &= fingerprinters_[i]->restore({one.observations, std::move(one.sums), std::move(one.centre)});
  }
  return taken ? Outcome::kTaken : Outcome::kOther;
}

std::string LayerPart::layout() const {
  const ModelProfile& profile = wrapped_.profile;
  std::string text = fmt::format("{} of {} values; ids {}, mask {}; {}; behind", c10::toString(wrapped_.model->dtype()),
                                 profile.hidden, profile.ids_argument, profile.mask_argument, fingerprinted_);
  for (const Bank& bank : banks_) text += fmt::format(" {}", bank.layer);
  return text;
}

std::vector<std::int64_t> LayerPart::form_of(std::int64_t tokens) const { return {1, tokens, wrapped_.profile.hidden}; }

void LayerPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  for (const Bank& bank : banks_) {
    for (const LayerBank::Place& place : bank.entries->listed()) {
      const auto found = bank.entries->look(place);
      if (!found) continue;  // it went meanwhile
      if (!has_form(record_of(found->entry->hidden()).value_or(TensorRecord{}), form_of(found->entry->tokens()),
                    wrapped_.model->dtype())) {
        if (report.left++ == 0) report.why = "a state is not of the model's type";
        continue;
      }
      LayerRecord record;
      record.layer = static_cast<std::uint32_t>(bank.layer);
      record.partition = found->partition;
      record.states = found->states;
      record.audits = found->audits;
      record.error_sum = found->error_sum;
      record.saved_ms = found->saved_ms;
      std::vector<at::Tensor> tensors{found->entry->hidden()};
      for (const at::Tensor& input : found->entry->inputs()) {
        record.given.push_back(input.defined() ? 1 : 0);
        if (input.defined()) tensors.push_back(input);
      }
      record.tensors = records_of(tensors).value();
      write_entry(writer, kind(), write_layer_state(record), tensors);
      ++report.entries;
      report.tokens += static_cast<std::uint64_t>(found->entry->tokens());
    }
  }
}

const LayerPart::Bank& LayerPart::bank_of(const LayerRecord& record) const {
  const auto bank = std::ranges::find(banks_, static_cast<std::int64_t>(record.layer), &Bank::layer);
  if (bank == banks_.end()) throw DamagedData("it has the state behind a layer that is not kept");
  return *bank;
}

/// The inputs of the entry, which must be those of one sequence of the model. Fills the key and the ids too.
void LayerPart::take_inputs(const LayerRecord& record, std::int64_t tokens, LayerBank::Candidate& candidate) const {
  Inputs inputs;
  std::size_t next = 1;
  for (const std::uint8_t given : record.given) {
    if (given == 0) {
      inputs.emplace_back();
      candidate.inputs.emplace_back();
      continue;
    }
    const TensorRecord& one = record.tensors[next++];
    if (one.sizes != std::vector<std::int64_t>{tokens}) throw DamagedData("it has a layer's state of other inputs");
    candidate.inputs.push_back(tensor_of(one, wrapped_.model->device()));
    inputs.emplace_back(candidate.inputs.back().unsqueeze(0));
  }
  try {
    const Batch batch = check_batch(inputs, wrapped_.inputs, wrapped_.profile, wrapped_.model->device());
    const std::string partition = similarity_partition(batch, tenant_of(record.partition));
    const bool whole = inputs.size() == batch.inputs.size() && batch.tokens == tokens && batch.plain_only.empty();
    if (!whole || partition != record.partition) throw DamagedData("it has a layer's state of other inputs");
    candidate.key = similarity_key(partition, candidate.inputs);
    const at::Tensor& ids = batch.on_host[static_cast<std::size_t>(wrapped_.profile.ids_argument)];
    const auto* const first = ids.const_data_ptr<std::int64_t>();
    candidate.ids.assign(first, first + tokens);
  } catch (const Error& error) {
    throw DamagedData(fmt::format("it has a layer's state of inputs that are none: {}", error.what()));
  }
}

/// Without fingerprints. Throws DamagedData unless it is one of this bank's.
LayerBank::Candidate LayerPart::candidate_of(const Bank& bank, const LayerRecord& record) const {
  const TensorRecord& hidden = record.tensors.at(0);
  const std::int64_t tokens = hidden.sizes.size() == 3 ? hidden.sizes[1] : 0;
  if (tokens < 1 || !has_form(hidden, form_of(tokens), wrapped_.model->dtype())) {
    throw DamagedData("it has a layer's state of another form");
  }
  LayerBank::Candidate candidate;
  candidate.number = LayerEntry::kElsewhere;
  take_inputs(record, tokens, candidate);
  std::span<const float> states = record.states;
  for (const Fingerprinter* one : bank.fingerprinters) {
    const std::size_t dims = one->needs_state() ? static_cast<std::size_t>(one->dims()) : 0;
    if (states.size() < dims) throw DamagedData("it has a layer's state with fingerprints of another form");
    candidate.states.emplace_back(states.begin(), states.begin() + static_cast<std::ptrdiff_t>(dims));
    states = states.subspan(dims);
  }
  if (!states.empty()) throw DamagedData("it has a layer's state with fingerprints of another form");
  candidate.audits = record.audits;
  candidate.error_sum = record.error_sum;
  candidate.saved_ms = record.saved_ms;
  return candidate;
}

std::size_t LayerPart::check(std::string_view entry) const {
  const LayerRecord record = read_layer_state(entry);
  const LayerBank::Candidate candidate = candidate_of(bank_of(record), record);
  std::size_t bytes = kLayerEntryBytes + record.states.size() * sizeof(float);
  for (const TensorRecord& tensor : record.tensors) bytes += tensor.bytes.size() + kTensorOverhead;
  return bytes;
}

/// Of the bank that has most: each entry is looked at by its own.
std::size_t LayerPart::room() const {
  std::size_t most = 0;
  for (const Bank& bank : banks_) most = std::max(most, bank.entries->room());
  return most;
}

SnapshotPart::Outcome LayerPart::take(std::string_view entry, SnapshotPartReport& report) {
  const LayerRecord record = read_layer_state(entry);
  const Bank& bank = bank_of(record);
  LayerBank::Candidate candidate = candidate_of(bank, record);
  candidate.hidden = tensor_of(record.tensors[0], wrapped_.model->device());
  const std::uint64_t key = candidate.key;
  switch (bank.entries->restore(record.partition, std::move(candidate), now_())) {
    case LayerBank::Restored::kTaken:
      break;
    case LayerBank::Restored::kKnown:
      return Outcome::kKnown;
    case LayerBank::Restored::kNoRoom:
      return Outcome::kNoRoom;
    case LayerBank::Restored::kNoFingerprint:
      return Outcome::kOther;
  }
  report.tokens += static_cast<std::uint64_t>(record.tensors[0].sizes[1]);
  taken_.emplace_back(bank.entries, key);
  return Outcome::kTaken;
}

void LayerPart::finish() {
  for (auto one = taken_.rbegin(); one != taken_.rend(); ++one) one->first->use(one->second, now_());
}

}  // namespace llmcache
