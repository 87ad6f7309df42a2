// What a TokenBank holds of one sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory_resource>
#include <vector>

#include "bank/memory.h"
#include "bank/stored_states.h"
#include "execute/cached_states.h"
#include "match/token_alignment.h"

namespace llmcache {

/// Which tensors there are of a sequence, each `[tokens, ...]`, in the model's types. Plain data.
struct StateLayout {
  struct Spec {
    std::vector<std::int64_t> sizes;  ///< of one token
    at::TensorOptions options;
  };
  std::vector<Spec> specs;
  std::vector<std::vector<std::size_t>>
      first_key;                                ///< by layer and attention operator: spec of its first key-side tensor
  BankFormat format = BankFormat::kAsComputed;  ///< how entries hold them; pending ones are as computed
  std::vector<int> hidden;  ///< by layer, 0 .. L: spec of the states that enter it (L: the final ones); -1: not kept

  /// Of the tensors of a sequence, with what they take beside their data.
  [[nodiscard]] std::size_t bytes(std::int64_t tokens) const;
};

/// One tensor `[tokens, ...]` in the form in which it is held, which takes no more room than the tensor.
class EncodedTensor {
 public:
  /// Nobody writes to `rows` any more.
  EncodedTensor(const at::Tensor& rows, BankFormat format);
  /// As it was held in another process: `[tokens, ...]` in the format in which it is held.
  explicit EncodedTensor(StoredStates stored) : stored_(std::move(stored)) {}
  /// As the model has it. Read only.
  [[nodiscard]] at::Tensor rows() const { return rows_.defined() ? rows_ : stored_.decode(); }
  /// With what it takes beside its data.
  [[nodiscard]] std::size_t bytes() const;
  /// True if it is held in a format of its own, by held(); otherwise held() is the tensor.
  [[nodiscard]] bool encoded() const { return !rows_.defined(); }
  /// What is held: the tensor, or values, and scales where there are any. Read only.
  [[nodiscard]] std::vector<at::Tensor> held() const;

 private:
  at::Tensor rows_;  ///< as computed; undefined: in stored_
  StoredStates stored_;
};

/// Room for the states of one sequence: working memory of the pass that writes them, no part of a bank. Belongs to one
/// thread.
class PendingEntry {
 public:
  /// `reserved`: layout.bytes(tokens).
  PendingEntry(const StateLayout& layout, std::int64_t tokens, Reservation reserved);
  PendingEntry(const PendingEntry&) = delete;
  PendingEntry& operator=(const PendingEntry&) = delete;

  [[nodiscard]] std::int64_t tokens() const noexcept { return tokens_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return reserved_.bytes(); }
  /// Tensor of spec i, to be written.
  [[nodiscard]] at::Tensor& tensor(std::size_t i) { return tensors_[i]; }
  [[nodiscard]] const at::Tensor& final_states() const { return tensors_[final_]; }

 private:
  friend class TokenEntry;
  Reservation reserved_;
  std::int64_t tokens_;
  std::size_t final_;  ///< spec of the final states
  std::vector<at::Tensor> tensors_;
};

/// Tokens and states of one sequence. Immutable.
class TokenEntry final : public CachedStates {
 public:
  /// Takes the tensors of `pending`, and its bytes() that are reserved for them; what it does not need of these is
  /// given back. If it throws neither is touched. `counts`: by token, over how many sequences its states are the mean.
  TokenEntry(const StateLayout& layout, PendingEntry& pending, const TokenView& tokens,
             const std::vector<std::uint16_t>& counts, Reservation& reserved, std::pmr::memory_resource* memory);
  /// Takes tensors that were held elsewhere, and their bytes().
  TokenEntry(const StateLayout& layout, std::vector<EncodedTensor> tensors, const TokenView& tokens,
             const std::vector<std::uint16_t>& counts, Reservation& reserved, std::pmr::memory_resource* memory);
  TokenEntry(const TokenEntry&) = delete;
  TokenEntry& operator=(const TokenEntry&) = delete;

  [[nodiscard]] std::int64_t tokens() const override { return static_cast<std::int64_t>(counts_.size()); }
  [[nodiscard]] at::Tensor keys(std::int32_t layer, std::int64_t attention_op, std::size_t input) const override;
  [[nodiscard]] at::Tensor hidden(std::int32_t layer) const override;

  [[nodiscard]] TokenView view() const { return {values_, ids_per_token_}; }
  [[nodiscard]] std::uint16_t count(std::int64_t token) const { return counts_[static_cast<std::size_t>(token)]; }
  [[nodiscard]] at::Tensor rows(std::size_t spec) const { return encoded_[spec].rows(); }
  [[nodiscard]] const EncodedTensor& encoded(std::size_t spec) const { return encoded_[spec]; }
  /// Calls step(tensor) for each tensor that it holds.
  template <class Step>
  void each_tensor(const Step& step) const {
    for (const EncodedTensor& one : encoded_) {
      for (const at::Tensor& held : one.held()) step(held);
    }
  }
  [[nodiscard]] const std::pmr::vector<std::uint16_t>& counts() const noexcept { return counts_; }
  /// Of its tensors.
  [[nodiscard]] std::size_t bytes() const noexcept { return reserved_.bytes(); }

 private:
  Reservation reserved_;
  const StateLayout& layout_;
  std::pmr::vector<std::int64_t> values_;
  std::size_t ids_per_token_;
  std::pmr::vector<std::uint16_t> counts_;
  std::pmr::vector<EncodedTensor> encoded_;  ///< by spec
};

}  // namespace llmcache
