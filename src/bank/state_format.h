// How a bank holds tensors of states: the seam at which smaller formats come in.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bank/prefix_bank.h"

namespace llmcache {

/// Const and thread-safe. A tensor is encoded whole and decoded by ranges of tokens.
class StateFormat {
 public:
  virtual ~StateFormat() = default;

  /// What encode() takes for `tokens` tokens, data and tensors, at most.
  [[nodiscard]] virtual std::size_t bytes(const KeySpec& spec, std::int64_t tokens) const = 0;
  /// An own copy of `state`, which has the shape, type and device of the spec.
  [[nodiscard]] virtual std::vector<at::Tensor> encode(const KeySpec& spec, const at::Tensor& state) const = 0;
  /// Tokens [begin, begin + tokens), in the type of the spec. May be a view of what is stored: not to be written to.
  [[nodiscard]] virtual at::Tensor decode(const KeySpec& spec, const std::vector<at::Tensor>& stored,
                                          std::int64_t begin, std::int64_t tokens) const = 0;
};

/// Bit by bit as it was computed.
class AsComputed final : public StateFormat {
 public:
  [[nodiscard]] std::size_t bytes(const KeySpec& spec, std::int64_t tokens) const override;
  [[nodiscard]] std::vector<at::Tensor> encode(const KeySpec& spec, const at::Tensor& state) const override;
  [[nodiscard]] at::Tensor decode(const KeySpec& spec, const std::vector<at::Tensor>& stored, std::int64_t begin,
                                  std::int64_t tokens) const override;
};

}  // namespace llmcache
