// The last strategies of every chain: they run the whole model, and reuse nothing.
#pragma once

#include "reuse/strategy.h"

namespace llmcache {

/// Runs the real tokens of a padded batch without the padding between them.
class Packed final : public ReuseStrategy {
 public:
  /// `cost_tokens`: Options::packing_cost_tokens.
  Packed(const WrappedModel& wrapped, std::int64_t cost_tokens) : wrapped_(wrapped), cost_tokens_(cost_tokens) {}
  std::string name() const override { return "packed"; }
  bool accepts(const Call& call) const override { return call.packable; }
  /// Answers where the padding costs more than packing does.
  void serve(const Call& call, Answers& answers) override;
  bool looks_up() const override { return false; }

 private:
  [[nodiscard]] bool pays(const Batch& batch) const;

  const WrappedModel& wrapped_;
  const std::int64_t cost_tokens_;
};

/// Runs a call with hooks: all its real tokens, and nothing else. What the hooks and the model raise passes through.
class Hooked final : public ReuseStrategy {
 public:
  explicit Hooked(const WrappedModel& wrapped) : wrapped_(wrapped) {}
  std::string name() const override { return "hooked"; }
  bool accepts(const Call& call) const override { return !call.hooks.empty(); }
  /// Throws Error(kNotAvailable) or Error(kInvalidInput) where the batch cannot be packed.
  void serve(const Call& call, Answers& answers) override;
  bool looks_up() const override { return false; }

 private:
  [[nodiscard]] c10::IValue nothing(const Batch& batch, std::int64_t padded_length) const;

  const WrappedModel& wrapped_;
};

/// Runs the batch layer by layer as the model would, padding included.
class Dense final : public ReuseStrategy {
 public:
  explicit Dense(const WrappedModel& wrapped) : wrapped_(wrapped) {}
  std::string name() const override { return "dense"; }
  bool accepts(const Call& /*call*/) const override { return true; }
  void serve(const Call& call, Answers& answers) override;
  bool looks_up() const override { return false; }

 private:
  const WrappedModel& wrapped_;
};

}  // namespace llmcache
