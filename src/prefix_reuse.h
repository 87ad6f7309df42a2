// Fidelity::kLossless on causal models: keys and values of known prefixes are taken from a PrefixBank, the tokens
// behind them are computed and kept.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bank/prefix_bank.h"
#include "execute/batch.h"
#include "execute/engine.h"
#include "kept_later.h"
#include "llmcache/options.h"
#include "model/probe.h"

namespace llmcache {

/// What a row took from the bank.
struct PrefixUse {
  std::int64_t row = 0;           ///< of the batch that was run
  std::int64_t known_tokens = 0;  ///< length of its known prefix, above 0
  /// The least and the greatest size_class() of the sequences in whose passes that prefix was computed.
  std::uint8_t shortest = 0, longest = 0;
};

/// Thread-safe.
class PrefixReuse {
 public:
  /// The model has a token level that runs parts of sequences; `profile` and `output` are what probing found. Throws
  /// Error(kInvalidOptions) if options name a layer that the model does not have, and what the model throws: it is run
  /// once. `total`: the account that the bank's is part of; null: of none.
  PrefixReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output, const ModelProfile& profile,
              const PrefixOptions& options, std::size_t capacity_bytes, MemoryAccount* total = nullptr);

  /// Runs a batch that can be packed (check_packable) and has a real token. Fills `report`, its sequences included. The
  /// result covers the tokens that `output` names; all of them where the head is not token-wise. None if these are no
  /// tokens at all. What it computed is the call's own, until `kept` is committed. Adds to `uses` what rows took from
  /// the bank.
  c10::IValue run(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report, KeptLater& kept,
                  std::vector<PrefixUse>& uses);

  /// size_class() of the longest sequences that verify() compares.
  static constexpr std::uint8_t kVerifiedClass = 5;
  /// Does a sequence come out right that takes its beginning from another one, whose tokens differ behind it? Compares
  /// tiny sequences with the plain model; says why not in `why`. What it kept is dropped.
  bool verify(std::string& why);

  void clear() { bank_.clear(); }
  [[nodiscard]] PrefixBank::Counters counters() const { return bank_.counters(); }

 private:
  class Pass;
  struct Row;

  [[nodiscard]] std::vector<KeySpec> key_specs();
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<Row> look_up(const Batch& batch, const std::string& tenant);
  void share(std::vector<Row>& rows) const;
  void reserve(Row& row);
  [[nodiscard]] Plan plan(const Batch& batch, const std::vector<Row>& rows) const;
  [[nodiscard]] Selection select(const Plan& plan, const std::vector<Row>& rows, Output output) const;
  [[nodiscard]] bool agrees(const Inputs& inputs, const Batch& batch, std::string& why);

  const Model& model_;
  const InputSpec& inputs_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const PrefixOptions options_;
  std::int32_t resume_ = 0;                  ///< first layer that a known prefix does not run through
  std::vector<std::vector<int>> key_specs_;  ///< by layer and site, the first spec of its keys; -1: not kept
  std::size_t final_spec_ = 0;               ///< of the final states
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  PrefixBank bank_;
};

/// Of a result over all tokens of a batch the part that `output` names; `known[row]`: tokens known before the call.
c10::IValue cut_output(const c10::IValue& result, const OutputSpec& spec, const Batch& batch,
                       const std::vector<std::int64_t>& known, Output output);

}  // namespace llmcache
