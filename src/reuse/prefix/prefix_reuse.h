// Fidelity::kLossless on causal models: keys and values of known prefixes are taken from a PrefixBank, the tokens
// behind them are computed and kept.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bank/prefix_bank.h"
#include "execute/engine.h"
#include "reuse/prefix/pinned_prefixes.h"
#include "reuse/strategy.h"

namespace llmcache {

/// Fidelity::kLossless on causal models. Thread-safe.
class PrefixReuse final : public ReuseStrategy {
 public:
  /// The model has a token level that runs parts of sequences. Throws Error(kInvalidOptions) if options name a layer
  /// that the model does not have, and what the model throws: it is run once. `wrapped` must outlive it, and so must
  /// `verification`, by which it may be closed. `total`: the account that the bank's is part of; null: of none.
  PrefixReuse(const WrappedModel& wrapped, const Verification& verification, const PrefixOptions& options,
              std::size_t capacity_bytes, MemoryAccount* total = nullptr);

  ~PrefixReuse() override;
  PrefixReuse(const PrefixReuse&) = delete;
  PrefixReuse& operator=(const PrefixReuse&) = delete;

  std::string name() const override { return "prefix"; }
  bool accepts(const Call& call) const override;
  void serve(const Call& call, Answers& answers) override;
  void clear() override;
  void each_bank(const BankVisitor& visit) override { visit(bank_); }
  TenantErasure erase_tenant(const std::string& tenant) override;
  void add_to(Stats& stats) const override;
  void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) override;
  void add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) override;
  bool cuts_output(const Call&) const override { return true; }

  /// Runs a batch that can be packed (check_packable) and has a real token. The result covers the tokens that `output`
  /// names; all of them where the head is not token-wise. None if these are no tokens at all. What it computed is the
  /// call's own, until `writes` are taken.
  PassResult run(const Batch& batch, const std::string& tenant, Output output, DeferredWrites& writes);

  /// size_class() of the longest sequences that verify() compares.
  static constexpr std::uint8_t kVerifiedClass = 5;
  /// Does a sequence come out right that takes its beginning from another one, whose tokens differ behind it? Compares
  /// tiny sequences with the plain model, or one of them (`briefly`); says why not in `why`. What it kept is dropped.
  bool verify(std::string& why, bool briefly);

  /// From now on pins may be made of at most this share, by that clock. To be called once, before there is one.
  void allow_pins(double share, std::function<double()> clock);
  /// LayerCacheBase::pin(): holds on to all rows of a batch that can be packed (check_packable), all of whose tokens
  /// are known. Throws Error(kNotAvailable) that says why it cannot.
  PinLease pin(const Batch& batch, const std::string& tenant, double seconds);

  [[nodiscard]] PrefixBank::Counters counters() const { return bank_.counters(); }

 private:
  class Pass;
  struct Row;

  [[nodiscard]] std::string kept_layers() const;
  [[nodiscard]] std::vector<KeySpec> key_specs();
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<Row> look_up(const Batch& batch, const std::string& tenant);
  void share(std::vector<Row>& rows) const;
  void reserve(Row& row);
  void order_streams(const std::vector<Row>& rows) const;
  [[nodiscard]] Plan plan(const Batch& batch, const std::vector<Row>& rows) const;
  [[nodiscard]] Selection select(const Plan& plan, const std::vector<Row>& rows, Output output) const;
  void keep(const Inputs& inputs);
  [[nodiscard]] bool agrees(const Inputs& inputs, std::string& why);

  const WrappedModel& wrapped_;
  const Model& model_;
  const Verification& verification_;
  const PrefixOptions options_;
  std::int32_t resume_ = 0;  ///< first layer that a known prefix does not run through
  std::vector<std::vector<int>>
      key_specs_;               ///< by layer and attention operator, the first spec of its keys; -1: not kept
  std::size_t final_spec_ = 0;  ///< of the final states
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  PrefixBank bank_;
  double pinned_share_ = 0;
  std::shared_ptr<PinnedPrefixes> pins_;  ///< null until allow_pins()
};

/// Where the model lets a sequence take its beginning from another one, seen on tiny sequences: sets prefix_reuse of
/// the profile, adds the sizes that were compared to its envelope, and says in its notes why not.
void find_prefix_reuse(WrappedModel& wrapped);

}  // namespace llmcache
