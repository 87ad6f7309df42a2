#include "protected_kernels.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "protected_device.h"
#include "protected_queue.h"
#include "protected_streams.h"

namespace llmcache::test {
namespace {

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Counters {
  std::atomic<std::int64_t> to_device{0}, to_host{0}, across{0}, waits{0}, kernels{0};
} counters;

c10::Stream stream_of(const at::Tensor& tensor) { return StreamOrder::instance().current(tensor.device().index()); }

const void* block_of(const at::Tensor& tensor) { return tensor.storage().data_ptr().get(); }

/// The host waits for all that is on the tensor's stream.
void wait_for(const at::Tensor& tensor) {
  count_wait();
  StreamOrder::instance().wait(stream_of(tensor));
}

at::Tensor with_storage(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

/// The tensor as the host's kernels see it.
at::Tensor host_view(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  const auto& storage = tensor.storage();
  const c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(),
                          c10::DataPtr(shadow_of(storage.data()), c10::kCPU), nullptr, false);
  auto view = with_storage(host, c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

/// One call of an operator: its tensors as the host's kernels see them, and its results as the caller does.
class KernelCall {
 public:
  KernelCall(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& schema = op_.schema();
    const std::size_t first = stack_.size() - schema.arguments().size();
    for (std::size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      writing_ = alias != nullptr && alias->isWrite();
      c10::IValue& value = stack_[first + i];
      value = on_host(value);
    }
    TORCH_CHECK(device_, name(), " came to the protected device with no tensor of it");
    const c10::DeviceGuard guard(*device_);
    touch();
    if (DelayedWork::instance().delays() && !is_view()) {
      if (put_off()) return;
      DelayedWork::instance().run({{place_, time_}});  // what stands before it
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    }
    const std::size_t results = stack_.size() - schema.returns().size();
    for (std::size_t i = 0; i < schema.returns().size(); ++i) stack_[results + i] = on_device(stack_[results + i]);
  }

 private:
  struct Pair {
    at::Tensor device, host;
    bool written = false;
  };

  [[nodiscard]] std::string name() const { return op_.schema().operator_name().name; }

  [[nodiscard]] bool is_view() const {
    const auto& returns = op_.schema().returns();
    return !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
  }

  c10::IValue on_host(const c10::IValue& value) {
    if (value.isTensor()) return host_tensor(value.toTensor());
    if (value.isList()) {
      auto all = value.toList().copy();
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (const c10::IValue one = all.get(i); one.isTensor()) all.set(i, host_tensor(one.toTensor()));
      }
      return all;
    }
    if (value.isDevice() && value.toDevice().type() == c10::kPrivateUse1) {
      expect_on(value.toDevice());
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  void expect_on(c10::Device device) {
    if (!device.has_index()) device = c10::impl::getDeviceGuardImpl(c10::kPrivateUse1)->getDevice();
    if (!device_) device_ = device;
    TORCH_CHECK(*device_ == device, name(), ": tensors on ", device_->str(), " and on ", device.str());
  }

  at::Tensor host_tensor(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      TORCH_CHECK(tensor.dim() == 0, name(), ": a tensor of sizes ", tensor.sizes(), " on ", tensor.device().str(),
                  " beside tensors on the protected device");
      return tensor;
    }
    expect_on(tensor.device());
    const auto& storage = tensor.storage();
    if (writing_ && storage.nbytes() == 0) {  // a result that gets its sizes from the kernel
      pairs_.push_back({tensor, at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)), true});
      return pairs_.back().host;
    }
    auto& host = storages_[storage.unsafeGetStorageImpl()];
    if (!host) {
      host = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                          c10::DataPtr(shadow_of(storage.data()), c10::kCPU), nullptr, false);
    }
    pairs_.push_back({tensor, with_storage(host, c10::DispatchKeySet(c10::DispatchKey::CPU), tensor), writing_});
    return pairs_.back().host;
  }

  /// Counts the work, and tells the order of streams what it reads and writes.
  void touch() {
    if (is_view()) return;
    ++counters.kernels;
    auto& order = StreamOrder::instance();
    const auto stream = order.current(device_->index());
    place_ = {stream.device_index(), stream.id()};
    time_ = order.launch(stream);
    for (const Pair& pair : pairs_) order.access(block_of(pair.device), stream, pair.written, name());
    if (answers_the_host()) {
      count_wait();
      order.wait(stream);
    }
  }

  /// Results that the host must have before it can go on: numbers, and tensors whose size follows from numbers.
  [[nodiscard]] bool answers_the_host() const {
    static const std::set<std::string> sized{
        "aten::nonzero",  "aten::masked_select",      "aten::_unique2",         "aten::unique_dim",
        "aten::bincount", "aten::unique_consecutive", "aten::repeat_interleave"};
    for (const auto& returned : op_.schema().returns()) {
      const auto kind = returned.type()->kind();
      if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return true;
    }
    if (name().starts_with("aten::index") || name().starts_with("aten::_index_put")) {
      for (std::size_t i = 1; i < pairs_.size(); ++i) {
        const auto type = pairs_[i].device.scalar_type();
        if (!pairs_[i].written && name() != "aten::index_fill_" && type == at::kBool &&
            pairs_[0].device.scalar_type() != at::kBool) {
          return true;
        }
      }
    }
    return sized.contains(name());
  }

  c10::IValue on_device(const c10::IValue& value) {
    if (value.isTensor()) return device_tensor(value.toTensor());
    if (value.isTensorList()) {
      auto all = value.toTensorVector();
      for (at::Tensor& one : all) one = device_tensor(one);
      return all;
    }
    return value;
  }

  at::Tensor device_tensor(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (const Pair& pair : pairs_) {
      if (!pair.host.is_same(result)) continue;
      if (pair.written && pair.device.storage().nbytes() == 0 && result.numel() > 0) {
        pair.device.resize_(result.sizes());
        std::memcpy(shadow_of(pair.device.const_data_ptr()), result.const_data_ptr(), result.nbytes());
        StreamOrder::instance().access(block_of(pair.device), stream_of(pair.device), true, name());
      }
      pair.device.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(),
                                                               result.storage_offset());
      return pair.device;
    }
    for (const Pair& pair : pairs_) {  // a view of an argument
      if (!result.storage().is_alias_of(pair.host.storage())) continue;
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(pair.device.storage()),
                                                           pair.device.key_set(), result.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
      return view;
    }
    const auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
    auto made = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(*device_));
    if (dense.numel() > 0) {
      std::memcpy(shadow_of(made.const_data_ptr()), dense.const_data_ptr(), dense.nbytes());
      StreamOrder::instance().access(block_of(made), stream_of(made), true, name());
    }
    return made;
  }

  /// Leaves the work for later, and returns results that hold nonsense until then. False: it cannot be put off, as what
  /// they are like follows from numbers.
  bool put_off() {
    const auto arguments = static_cast<std::ptrdiff_t>(op_.schema().arguments().size());
    torch::jit::Stack own(stack_.end() - arguments, stack_.end());
    std::vector<at::Tensor> written;
    for (const Pair& pair : pairs_) {
      if (pair.written) written.push_back(pair.device);
    }
    const bool fresh = written.empty();
    if (answers_the_host() || (!fresh && written.size() != op_.schema().returns().size())) return false;
    const auto results = fresh ? nonsense_results(own) : written;
    // What is written and has no memory yet gets its sizes from the kernel.
    const auto unsized = [](const at::Tensor& one) { return one.storage().nbytes() == 0; };
    if (results.empty() || std::any_of(written.begin(), written.end(), unsized)) return false;
    torch::jit::drop(stack_, static_cast<std::size_t>(arguments));
    for (const at::Tensor& result : results) stack_.emplace_back(result);
    // What it uses is not freed before.
    DelayedWork::instance().add(place_, time_, [op = op_, own, pairs = pairs_, fresh, results]() mutable {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &own);
      for (std::size_t i = 0; fresh && i < results.size(); ++i) {
        const at::Tensor& got = own[i].toTensor();
        TORCH_CHECK(got.sizes() == results[i].sizes() && got.scalar_type() == results[i].scalar_type(),
                    op.schema().operator_name().name, " does not do as it does on the meta device");
        host_view(results[i]).copy_(got);
      }
    });
    return true;
  }

  /// Results as the meta device says they will be; none where it cannot say.
  std::vector<at::Tensor> nonsense_results(const torch::jit::Stack& own) {
    torch::jit::Stack stack;
    if (name() == "aten::scaled_dot_product_attention") {  // the meta device has none
      auto sizes = own[0].toTensor().sizes().vec();
      sizes.back() = own[2].toTensor().size(-1);
      stack = {at::empty(sizes, own[0].toTensor().options().device(c10::kMeta))};
    } else {
      for (const c10::IValue& value : own) stack.push_back(on_meta(value));
      try {
        const at::AutoDispatchBelowADInplaceOrView below;
        op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
      } catch (const std::exception&) {
        return {};
      }
    }
    std::vector<at::Tensor> results;
    for (const c10::IValue& value : stack) {
      if (!value.isTensor() || !value.toTensor().defined()) return {};
      const at::Tensor& like = value.toTensor();
      results.push_back(at::empty_strided(like.sizes(), like.strides(), like.options().device(*device_)));
      StreamOrder::instance().access(block_of(results.back()), stream_of(results.back()), true, name());
    }
    return results;
  }

  static c10::IValue on_meta(const c10::IValue& value) {
    if (value.isTensor()) return meta_tensor(value.toTensor());
    if (value.isDevice()) return c10::Device(c10::kMeta);
    if (!value.isList()) return value;
    auto all = value.toList().copy();
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (const c10::IValue one = all.get(i); one.isTensor()) all.set(i, meta_tensor(one.toTensor()));
    }
    return all;
  }

  static at::Tensor meta_tensor(const at::Tensor& host) {
    if (!host.defined()) return host;
    const auto meta = at::empty_strided(host.sizes(), host.strides(), host.options().device(c10::kMeta));
    if (host.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
    return meta;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;
  std::vector<Pair> pairs_;
  std::optional<c10::Device> device_;
  StreamOrder::Place place_;
  std::int64_t time_ = 0;
  bool writing_ = false;
};

void run_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) { KernelCall(op, *stack).run(); }

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout> /*layout*/,
                 std::optional<at::Device> device, std::optional<bool> /*pinned*/,
                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(c10::kPrivateUse1)));
  return at::detail::empty_generic(sizes, c10::GetAllocator(c10::kPrivateUse1), kKeys,
                                   type.value_or(c10::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> type,
                         std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                         std::optional<bool> /*pinned*/) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(c10::kPrivateUse1)));
  return at::detail::empty_strided_generic(sizes, strides, c10::GetAllocator(c10::kPrivateUse1), kKeys,
                                           type.value_or(c10::get_default_dtype_as_scalartype()));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.numel() == 0) return to;
  const at::AutoDispatchBelowADInplaceOrView below;
  auto& order = StreamOrder::instance();
  const auto stream = stream_of(from.is_privateuseone() ? from : to);
  const bool across = from.is_privateuseone() && to.is_privateuseone() && from.device() != to.device();
  if (across) order.block(order.record(stream_of(to)), stream);
  const std::int64_t time = order.launch(stream);
  if (from.is_privateuseone()) order.access(block_of(from), stream, false, "a copy");
  if (to.is_privateuseone()) order.access(block_of(to), stream, true, "a copy");
  auto& work = DelayedWork::instance();
  const StreamOrder::Place place{stream.device_index(), stream.id()};
  if (!from.is_privateuseone()) {
    ++counters.to_device;
  } else if (!to.is_privateuseone()) {
    ++counters.to_host;
    if (non_blocking) {
      const auto value = at::empty_like(to);
      const auto copy = [value, from] { value.copy_(host_view(from)); };
      if (work.delays()) {
        work.add(place, time, copy);
      } else {
        copy();
      }
      order.copy_later(to, value, stream);
      return to;
    }
    wait_for(from);
  } else {
    ++(across ? counters.across : counters.kernels);
  }
  if (across) order.block(order.record(stream), stream_of(to));
  if (work.delays() && !across && to.is_privateuseone()) {
    // The host may change its own at once.
    work.add(place, time,
             [to, own = from.is_privateuseone() ? from : from.clone()] { host_view(to).copy_(host_view(own)); });
    return to;
  }
  work.run({{place, time}});
  host_view(to).copy_(host_view(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  auto& order = StreamOrder::instance();
  order.launch(stream_of(tensor));
  order.access(block_of(tensor), stream_of(tensor), false, "reading a number");
  wait_for(tensor);
  return host_view(tensor).item();
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, std::int64_t offset, at::IntArrayRef sizes,
                        at::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& other) {
  return set_storage(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat> /*format*/) {
  const std::size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, self.element_size(),
                                                                       static_cast<std::size_t>(self.storage_offset()));
  TORCH_CHECK(self.numel() == 0 || bytes <= self.storage().nbytes(), "growing a filled tensor is not supported");
  if (bytes > self.storage().nbytes()) {
    const c10::DeviceGuard guard(self.device());
    self.storage().set_data_ptr_noswap(c10::GetAllocator(c10::kPrivateUse1)->allocate(bytes));
    self.storage().set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

void record_stream(at::Tensor& self, at::Stream stream) { StreamOrder::instance().recorded(block_of(self), stream); }

}  // namespace

void count_wait() { ++counters.waits; }

DeviceCounts device_counts() {
  return {counters.to_device, counters.to_host, counters.across, counters.waits, counters.kernels};
}

DeviceCounts operator-(const DeviceCounts& now, const DeviceCounts& then) {
  return {now.to_device - then.to_device, now.to_host - then.to_host, now.across - then.across, now.waits - then.waits,
          now.kernels - then.kernels};
}

std::string DeviceCounts::to_string() const {
  return std::to_string(to_device) + " copies to the device, " + std::to_string(to_host) + " to the host, " +
         std::to_string(across) + " between devices, " + std::to_string(waits) + " waits, " + std::to_string(kernels) +
         " kernels";
}

void register_protected_kernels() {
  using torch::CppFunction;
  using torch::Library;
  static auto* const all = new Library(Library::IMPL, "_", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  all->fallback(CppFunction::makeFromBoxedFunction<&run_kernel>());
  static auto* const aten = new Library(Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  aten->impl("empty.memory_format", &empty);
  aten->impl("empty_strided", &empty_strided);
  aten->impl("_copy_from", &copy_from);
  aten->impl("_copy_from_and_resize", &copy_from_and_resize);
  aten->impl("_local_scalar_dense", &local_scalar);
  aten->impl("set_.source_Storage_storage_offset", &set_storage);
  aten->impl("set_.source_Tensor", &set_tensor);
  aten->impl("resize_", &resize);
  aten->impl("record_stream", &record_stream);
  // Bits of a tensor, which are otherwise resolved by a copy.
  for (const auto key : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative}) {
    auto* const bit = new Library(Library::IMPL, "aten", key, __FILE__, __LINE__);  // for good
    bit->impl("_copy_from", CppFunction::makeFallthrough());
  }
  // Otherwise made of smaller operators, through tables that have no line for this device.
  for (const char* name : {"scaled_dot_product_attention", "convolution", "_convolution"}) {
    aten->impl(name, CppFunction::makeFromBoxedFunction<&run_kernel>());
  }
}

}  // namespace llmcache::test
