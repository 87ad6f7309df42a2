// Running a model on some tokens only. Everything in a transformer layer but attention is
// token-wise: the rows of a batch can be packed to [1, rows, hidden] and the layer run on them,
// with the work stopped at each attention operator, where the tokens of one sequence meet.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace llmcache {

struct Activations;

/// Active tokens of one sequence within a packed layer.
struct PackedSequence {
  std::int64_t row = 0;     ///< row of the batch
  std::int64_t first = 0;   ///< position of its first real token in that row
  std::int64_t tokens = 0;  ///< real tokens
  std::int64_t offset = 0;  ///< first packed row that is its own
  std::int64_t rows = 0;    ///< packed rows (active tokens)
  /// Active tokens, ascending, counted from `first`, int64 `[rows]` on the model's device.
  /// Undefined if all are active.
  at::Tensor active;
};

/// What the packed rows are: those of `sequences`, in packed order, and perhaps a few at the end that
/// repeat the last one and belong to nobody (they make the number of rows a convenient one).
/// Sequences without active tokens are not listed.
struct PackedLayout {
  std::int64_t batch = 0;
  std::int64_t padded_length = 0;
  std::int64_t rows = 0;
  std::vector<PackedSequence> sequences;
  /// int64 `[rows]` on the model's device, for every packed row: its position in its row of the
  /// batch, and row * padded_length + position.
  at::Tensor position;
  at::Tensor flat_index;
};

/// The tensors that meet at an attention operator, each with its token dimension. Query-side tensors
/// have one entry an active token, key-side ones (keys, values) one a token of the sequence.
struct AttentionTensors {
  std::vector<at::Tensor> queries;
  std::vector<at::Tensor> keys;
};

/// Key-side tensors of some neighbouring tokens of one sequence.
struct KeySegment {
  std::int64_t tokens = 0;
  std::vector<at::Tensor> keys;  ///< in the order of AttentionTensors::keys
};

/// One packed pass over a model's layers. Belongs to one thread. Calls come in this order, a layer
/// at a time: before(l, 0), [attend(l, 0, ...) per sequence], before(l, 1), ..., finish(l).
class TokenRun {
 public:
  virtual ~TokenRun() = default;

  /// Changes the active rows; call it between layers only, with the hidden state of the new rows,
  /// `[1, rows, hidden]`.
  virtual void set_rows(const PackedLayout& layout, at::Tensor hidden) = 0;
  [[nodiscard]] virtual const at::Tensor& hidden() const = 0;  ///< `[1, rows, hidden]`

  /// Runs layer l up to its attention operator s and returns the tensors that meet there.
  virtual AttentionTensors before(std::int64_t l, std::int64_t s) = 0;
  /// Attention of sequence number `q` of the layout at attention operator s of layer l: `queries` are cut to its active
  /// rows, `keys` cover all its tokens, in order.
  virtual at::Tensor attend(std::int64_t l, std::int64_t s, std::size_t q, const std::vector<at::Tensor>& queries,
                            const std::vector<KeySegment>& keys) = 0;
  /// Gives the attention operator's result for all packed rows; the token dimension is output_dim(l, s).
  virtual void after(std::int64_t l, std::int64_t s, at::Tensor attended) = 0;
  /// Runs the rest of layer l.
  virtual void finish(std::int64_t l) = 0;

  /// The model's result from the current rows, which must be final states. `placed` says where their results stand:
  /// it lists the same rows in the same order, in a batch of perhaps another padded length; elsewhere is zero. Where
  /// the head chooses tokens that length is 1. Where it neither does so nor is token-wise the rows must be all real
  /// tokens, and `placed` the current layout.
  virtual c10::IValue head(const PackedLayout& placed) = 0;
};

/// The token-level side of a Model. Const and thread-safe.
class TokenLevelModel {
 public:
  virtual ~TokenLevelModel() = default;

  [[nodiscard]] virtual std::int64_t attention_ops(std::int64_t layer) const = 0;
  /// Token dimension of each query-side and key-side tensor of an attention operator, and of its result.
  [[nodiscard]] virtual const std::vector<std::int64_t>& query_dims(std::int64_t layer,
                                                                    std::int64_t attention_op) const = 0;
  [[nodiscard]] virtual const std::vector<std::int64_t>& key_dims(std::int64_t layer,
                                                                  std::int64_t attention_op) const = 0;
  [[nodiscard]] virtual std::int64_t output_dim(std::int64_t layer, std::int64_t attention_op) const = 0;
  /// True if keys may cover more tokens than queries, so that part of a sequence can be run.
  [[nodiscard]] virtual bool partial() const = 0;
  /// True if a layer takes nothing but the hidden state from the layers before it, so that the
  /// active tokens may differ from layer to layer.
  [[nodiscard]] virtual bool self_contained() const = 0;
  /// True if head() works on packed rows, false if it fills the padded batch first.
  [[nodiscard]] virtual bool head_tokenwise() const = 0;
  /// True if head() takes one row a sequence: the token at Model::read_positions().
  [[nodiscard]] virtual bool head_chooses() const { return false; }

  /// Starts a packed pass from embedded activations.
  [[nodiscard]] virtual std::unique_ptr<TokenRun> start(const Activations& embedded,
                                                        const PackedLayout& layout) const = 0;

  /// Starts a packed pass from the model's inputs, preparing nothing but what tokens at `positions` need (of any row;
  /// int64 `[n]`, ascending, on the model's device): layouts may list only these. The head must be token-wise, or
  /// choose tokens. Null where a model cannot do that.
  [[nodiscard]] virtual std::unique_ptr<TokenRun> start_at(const std::vector<c10::IValue>& /*inputs*/,
                                                           const at::Tensor& /*positions*/,
                                                           const PackedLayout& /*layout*/) const {
    return nullptr;
  }
};

}  // namespace llmcache
