// What an OutputBank keeps in a snapshot: whole outputs, and what follows from sources.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bank/output_bank.h"
#include "model/packing.h"
#include "model/wrapped_model.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

/// Which tensors an entry has, and which of their sizes follow from its key.
struct RowForms {
  std::vector<at::Tensor> tensors;  ///< of one row, of any number of tokens
  std::vector<TokenDims> dims;      ///< of each
  /// Tokens of the entry with that key. Throws DamagedData for what is no key.
  std::function<std::int64_t(std::string_view key)> tokens_of;

  /// Tells entries of other forms apart.
  [[nodiscard]] std::string text() const;
  /// True if the tensors are those of a row with that key.
  [[nodiscard]] bool fit(std::string_view key, const std::vector<TensorRecord>& records) const;
};

/// Of whole outputs of a model.
RowForms forms_of_outputs(const WrappedModel& wrapped);

class OutputPart final : public SnapshotPart {
 public:
  /// `device`: of the model.
  OutputPart(std::string name, FrameKind kind, std::shared_ptr<const RowForms> forms, OutputBank& bank,
             at::Device device)
      : name_(std::move(name)), kind_(kind), forms_(std::move(forms)), bank_(bank), device_(device) {}

  std::string name() const override { return name_; }
  FrameKind kind() const override { return kind_; }
  std::string layout() const override { return forms_->text(); }
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return bank_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  void finish() override;

  /// Appends the entry of a key to a text, as save() writes it. False if there is none, or none that files hold.
  bool append_entry_of(std::string& to, std::string_view key, bool exact) const;

 private:
  const std::string name_;
  const FrameKind kind_;
  const std::shared_ptr<const RowForms> forms_;
  OutputBank& bank_;
  const at::Device device_;
  std::vector<std::string> taken_;  ///< keys, in order
};

}  // namespace llmcache
