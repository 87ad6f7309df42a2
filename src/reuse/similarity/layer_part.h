// The banks of the paper's mode in a snapshot, and what their fingerprints are relative to.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "bank/layer_bank.h"
#include "llmcache/fingerprint/fingerprint.h"
#include "model/wrapped_model.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

/// The running means that fingerprints are relative to. Written in front of the states of layers, so that their
/// fingerprints are made once, and are those that they were.
class CentrePart final : public SnapshotPart {
 public:
  /// One a layer that is fingerprinted; each has a running centre.
  explicit CentrePart(std::vector<Fingerprinter*> fingerprinters) : fingerprinters_(std::move(fingerprinters)) {}

  std::string name() const override { return "centres of fingerprints"; }
  FrameKind kind() const override { return FrameKind::kCentres; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return 0; }  ///< the means have their memory
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  std::string reason() const override { return "the cache has means of its own already"; }

 private:
  const std::vector<Fingerprinter*> fingerprinters_;
};

/// States behind layers. Fingerprints are not written, but what they are made of: so they fit the centres in force.
class LayerPart final : public SnapshotPart {
 public:
  struct Bank {
    std::int64_t layer = 0;
    LayerBank* entries = nullptr;
    std::vector<const Fingerprinter*> fingerprinters;  ///< that it can be asked by
  };
  /// `fingerprinted`: what decides which states are fingerprinted, as text. `now`: the clock of the banks' owner.
  LayerPart(const WrappedModel& wrapped, std::vector<Bank> banks, std::string fingerprinted,
            std::function<double()> now)
      : wrapped_(wrapped), banks_(std::move(banks)), fingerprinted_(std::move(fingerprinted)), now_(std::move(now)) {}

  std::string name() const override { return "layer states"; }
  FrameKind kind() const override { return FrameKind::kLayerState; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override;
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  std::string reason() const override { return "no fingerprint of it means anything here"; }
  void finish() override;

 private:
  [[nodiscard]] std::vector<std::int64_t> form_of(std::int64_t tokens) const;
  [[nodiscard]] const Bank& bank_of(const LayerRecord& record) const;
  [[nodiscard]] LayerBank::Candidate candidate_of(const Bank& bank, const LayerRecord& record) const;
  void take_inputs(const LayerRecord& record, std::int64_t tokens, LayerBank::Candidate& candidate) const;

  const WrappedModel& wrapped_;
  const std::vector<Bank> banks_;
  const std::string fingerprinted_;
  const std::function<double()> now_;
  std::vector<std::pair<LayerBank*, std::uint64_t>> taken_;  ///< keys, in order
};

}  // namespace llmcache
