// What a TorchScript module holds: told apart from another module's, and watched. Internal to model/torchscript*.
#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

namespace llmcache::ts {

/// Of the first parameter; the CPU if there is none.
at::Device device_of(const torch::jit::Module& module);

/// The graph's structure and its constants, hashed: the same for the same model exported or loaded again, whatever
/// names its values and classes got.
struct Structure {
  std::string digest;    ///< 32 hexadecimal digits
  std::string identity;  ///< by a cryptographic hash: 64 digits
};
Structure structure_of(const torch::jit::Module& module);

/// Notices changes of what a module holds: attributes that were replaced, moved, converted or written to; tensors in
/// lists, tuples, dictionaries and objects of scripted classes among them.
///
/// What is cheap is looked at for every request: what each attribute is, where its tensor lies, its version counter,
/// and eight bytes of what it holds, others each time (16 places, spread evenly). So a write to all of a tensor is
/// noticed at the next request however it was made; one to a part of it that leaves the version counter as it was
/// (through .data(), or of a tensor made in inference mode) perhaps not before check_every(). Contents on other devices
/// than the CPU are looked at by check_every() only.
///
/// Thread-safe, but for let_go() and retake().
class WeightGuard {
 public:
  /// `exempt`: attributes (dotted paths) that do not count, as their values are never read.
  explicit WeightGuard(const torch::jit::Module& module, std::unordered_set<std::string> exempt = {});
  ~WeightGuard();
  /// Holds the module and its tensors no longer. Of what others still hold it goes on to notice conversions and writes.
  void let_go();
  /// Throws Error(kModelChanged).
  void check() const;
  /// As check(), and hashes all that the tensors hold.
  void check_every() const;
  /// Takes values as they are now. Throws Error(kModelChanged) if more than values has changed.
  void retake();
  [[nodiscard]] std::size_t bytes() const { return bytes_; }  ///< each storage once
  /// Hash of all that the module holds and of `structure`, 32 hexadecimal digits.
  [[nodiscard]] std::string digest(const std::string& structure) const;
  /// The same by a cryptographic hash, made of all that is held as it is now: 64 digits. Not once it was let go.
  [[nodiscard]] std::string identity(const std::string& structure) const;

 private:
  static constexpr std::size_t kSamples = 16;
  using WeakTensor = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;
  struct Hash {
    std::uint64_t low = 0, high = 0;
    bool operator==(const Hash&) const = default;
  };
  /// What a tensor was.
  struct State {
    explicit State(const at::Tensor& tensor);
    void check(const std::string& name, const at::Tensor& now) const;
    void check_place(const std::string& name, const at::Tensor& now) const;
    const void* data;
    at::ScalarType dtype;
    bool versioned;
    std::uint64_t version;
  };
  /// An attribute that is a tensor.
  struct Slot {
    c10::intrusive_ptr<c10::ivalue::Object> owner;
    std::size_t index;
    std::string name;
    at::Tensor tensor;
    State state;
    Hash hash;
  };
  /// An attribute that is neither tensor nor module: its parts in order.
  struct Held {
    c10::intrusive_ptr<c10::ivalue::Object> owner;
    std::size_t index;
    std::string name;
    c10::IValue value;
    std::vector<c10::IValue> parts;  ///< tensors, numbers, texts; a scalar's own value
    std::vector<State> states;       ///< of the tensors among them
    std::vector<Hash> hashes;        ///< likewise
    std::optional<Hash> saved;       ///< of an object that says what it holds by a method of its own
  };
  struct Loose {
    std::string name;
    WeakTensor tensor;
    State state;
  };
  /// Words of the tensors' contents, for quick comparison.
  struct Samples {
    std::array<std::vector<const std::uint8_t*>, kSamples> places;
    std::vector<std::uint8_t> width;  ///< bytes of a word, 1 to 8
    std::array<std::vector<std::uint64_t>, kSamples> words;
    std::vector<std::string> names;
    void add(const std::string& name, const at::Tensor& tensor);
    [[nodiscard]] std::uint64_t word(std::size_t i, std::size_t sample) const noexcept;
  };

  void check_attributes() const;
  void check_versions() const;
  /// What only some places or a hash show is remembered: later calls, which may look elsewhere, must not go on.
  [[noreturn]] void written(const std::string& name) const;
  void check_written() const;
  void sample();
  template <class Visit>
  void for_each_tensor(const Visit& visit) const;
  static Hash hash_of(const at::Tensor& tensor);
  static Hash hash_of_saved(const c10::IValue& value);

  torch::jit::Module module_;
  std::vector<Slot> slots_;
  std::vector<Held> held_;
  std::vector<Loose> loose_;  ///< instead of slots_ once the module was let go
  Samples samples_;
  mutable std::atomic<std::uint32_t> next_sample_{0};
  mutable std::atomic<bool> written_{false};
  mutable std::mutex written_mutex_;
  mutable std::string written_name_;
  std::size_t bytes_ = 0;
};

}  // namespace llmcache::ts
