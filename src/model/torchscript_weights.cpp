#include "model/torchscript_weights.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/canonicalize.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "llmcache/error.h"
#include "model/torchscript_graph.h"
#include "store/digest.h"

namespace llmcache::ts {
namespace {

[[noreturn]] void changed(const std::string& what) {
  throw Error(ErrorCode::kModelChanged,
              what +
                  " after wrapping; call weights_changed() if values were changed in place, or construct a new "
                  "LayerCache from the module as it is now");
}

/// Takes what a model holds, part after part.
class ContentSink {
 public:
  ContentSink() = default;
  ContentSink(const ContentSink&) = delete;
  ContentSink& operator=(const ContentSink&) = delete;
  virtual ~ContentSink() = default;
  virtual void add(const void* data, std::size_t bytes) = 0;
  void add(const std::string& text) {
    const std::uint64_t size = text.size();
    add(&size, sizeof(size));
    add(text.data(), text.size());
  }
};

/// Fast, for within the process.
class Hasher final : public ContentSink {
 public:
  using ContentSink::add;
  Hasher() : state_(XXH3_createState()) {
    if (state_ == nullptr) throw std::bad_alloc();
    XXH3_128bits_reset(state_);
  }
  ~Hasher() override { XXH3_freeState(state_); }
  void add(const void* data, std::size_t bytes) override { XXH3_128bits_update(state_, data, bytes); }
  [[nodiscard]] XXH128_hash_t hash() const { return XXH3_128bits_digest(state_); }
  [[nodiscard]] std::string text() const {
    const auto sum = hash();
    return fmt::format("{:016x}{:016x}", sum.high64, sum.low64);
  }

 private:
  XXH3_state_t* state_;
};

/// Cryptographic, for what leaves the process.
class IdentitySink final : public ContentSink {
 public:
  using ContentSink::add;
  void add(const void* data, std::size_t bytes) override { digest_.add(data, bytes); }
  [[nodiscard]] std::string text() const { return digest_.hex(); }

 private:
  Digest digest_;
};

/// Both at once.
class BothSinks final : public ContentSink {
 public:
  using ContentSink::add;
  void add(const void* data, std::size_t bytes) override {
    hasher.add(data, bytes);
    identity.add(data, bytes);
  }
  Hasher hasher;
  IdentitySink identity;
};

/// Contents in logical order, whatever the strides: copies of a part at a time where they are not in memory like that.
void add_contents(ContentSink& sink, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  if (tensor.is_contiguous()) {
    sink.add(tensor.const_data_ptr(), tensor.nbytes());
    return;
  }
  constexpr std::size_t kCopied = std::size_t{8} << 20;
  if (tensor.dim() == 0 || static_cast<std::size_t>(tensor.numel()) * tensor.element_size() <= kCopied) {
    const auto copy = tensor.contiguous();
    sink.add(copy.const_data_ptr(), copy.nbytes());
    return;
  }
  for (std::int64_t i = 0; i < tensor.size(0); ++i) add_contents(sink, tensor.select(0, i));
}

void add_tensor(ContentSink& sink, const at::Tensor& given) {
  sink.add(fmt::format("{} {} {}", c10::toString(given.scalar_type()), fmt::join(given.sizes().vec(), "x"),
                       c10::str(given.layout())));
  const at::NoGradGuard no_grad;
  at::Tensor tensor = given.detach();
  if (tensor.is_quantized()) {
    sink.add(tensor.toString());
    add_tensor(sink, tensor.int_repr());
    add_tensor(sink, tensor.dequantize());
    return;
  }
  if (tensor.layout() == at::kSparse) {
    const auto summed = tensor.coalesce();
    add_tensor(sink, summed.indices());
    add_tensor(sink, summed.values());
    return;
  }
  if (tensor.layout() != at::kStrided) tensor = tensor.to_dense();
  if (tensor.is_meta()) return;
  if (tensor.is_conj()) tensor = tensor.resolve_conj();
  if (tensor.is_neg()) tensor = tensor.resolve_neg();
  add_contents(sink, tensor.is_cpu() ? tensor : tensor.cpu());
}

bool is_scalar(const c10::IValue& value) {
  return value.isBool() || value.isInt() || value.isDouble() || value.isString() || value.isNone() ||
         value.isDevice() || value.isComplexDouble();
}

constexpr int kMostLevels = 32;  // of values that hold each other

/// Tensors, numbers and texts in a value, in order; what is of another kind stays one part. So do objects that say what
/// they hold by a method of their own, such as the packed parameters of a quantized layer.
void flatten_into(const c10::IValue& value, std::vector<c10::IValue>& parts, int depth = 0) {
  const auto count = [&](std::size_t n) { parts.emplace_back(static_cast<std::int64_t>(n)); };
  if (depth > kMostLevels) {
    parts.emplace_back("too deep");
  } else if (value.isObject() && value.toObjectRef().type()->findMethod("__getstate__") == nullptr) {
    const auto& object = value.toObjectRef();
    for (std::size_t i = 0; i < object.slots().size(); ++i) {
      parts.emplace_back(object.type()->getAttributeName(i));
      flatten_into(object.slots()[i], parts, depth + 1);
    }
  } else if (value.isTensorList() || value.isList()) {
    const auto list = value.toListRef();
    count(list.size());
    for (const c10::IValue& part : list) flatten_into(part, parts, depth + 1);
  } else if (value.isTuple()) {
    for (const c10::IValue& part : value.toTupleRef().elements()) flatten_into(part, parts, depth + 1);
  } else if (value.isGenericDict()) {
    count(value.toGenericDict().size());
    for (const auto& entry : value.toGenericDict()) {
      flatten_into(entry.key(), parts, depth + 1);
      flatten_into(entry.value(), parts, depth + 1);
    }
  } else {
    parts.push_back(value);
  }
}

/// Custom classes, such as the packed parameters of a quantized layer, are hashed by the state that they save.
void add_object(ContentSink& sink, const c10::IValue& value);

void add_part(ContentSink& sink, const c10::IValue& part) {
  if (part.isTensor()) {
    sink.add(part.toTensor().defined() ? "tensor" : "no tensor");
    if (part.toTensor().defined()) add_tensor(sink, part.toTensor());
  } else if (part.isObject()) {
    add_object(sink, part);
  } else if (part.isDouble()) {
    const double number = part.toDouble();
    sink.add("number");
    sink.add(&number, sizeof(number));
  } else if (part.isString()) {
    sink.add(part.toStringRef());
  } else if (is_scalar(part)) {
    std::ostringstream text;
    text << part.tagKind() << ' ' << part;
    sink.add(text.str());
  } else {
    sink.add(part.tagKind());
  }
}

void add_value(ContentSink& sink, const c10::IValue& value) {
  std::vector<c10::IValue> parts;
  flatten_into(value, parts);
  for (const c10::IValue& part : parts) add_part(sink, part);
}

void add_object(ContentSink& sink, const c10::IValue& value) {
  const auto type = value.toObjectRef().type();
  sink.add(type->name() ? type->name()->name() : "object");
  if (auto* save = type->findMethod("__getstate__")) add_value(sink, (*save)({value}));
}

/// Says what it holds by a method of its own, as the packed parameters of a quantized layer do.
bool saves_itself(const c10::IValue& value) {
  return value.isObject() && value.toObjectRef().type()->findMethod("__getstate__") != nullptr;
}

/// Without the numbers that tell classes of one name apart within a process.
std::string without_mangling(const std::string& text) {
  static const std::string kMark = "___torch_mangle_";
  std::string plain;
  plain.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const auto next = text.find(kMark, at);
    plain.append(text, at, next == std::string::npos ? std::string::npos : next - at);
    if (next == std::string::npos) break;
    at = next + kMark.size();
    while (at < text.size() && std::isdigit(static_cast<unsigned char>(text[at]))) ++at;
    if (at < text.size() && text[at] == '.') ++at;
  }
  return plain;
}

void add_constants(ContentSink& sink, const torch::jit::Block* block) {
  for (const torch::jit::Node* node : block->nodes()) {
    if (node->kind() == c10::prim::Constant && !node->outputs().empty()) {
      const auto value = torch::jit::toIValue(node->output());
      if (value && !value->isNone()) add_value(sink, *value);
    }
    for (const torch::jit::Block* inner : node->blocks()) add_constants(sink, inner);
  }
}

/// Numbers that TorchScript counts up with every module that a process loads.
void drop_numbers_of_warnings(torch::jit::Block* block) {
  static const auto kNumber = c10::Symbol::attr("warn_id");
  for (torch::jit::Node* node : block->nodes()) {
    if (node->hasAttribute(kNumber)) node->removeAttribute(kNumber);
    for (torch::jit::Block* inner : node->blocks()) drop_numbers_of_warnings(inner);
  }
}

void add_structure(ContentSink& sink, const torch::jit::Module& module) {
  auto graph = torch::jit::toGraphFunction(module.get_method("forward").function()).graph()->copy();
  inline_calls(*graph);
  drop_numbers_of_warnings(graph->block());
  graph = torch::jit::Canonicalize(graph, /*keep_unique_names=*/false);
  sink.add(without_mangling(graph->toString(/*print_source_locations=*/false)));
  add_constants(sink, graph->block());
}

}  // namespace

at::Device device_of(const torch::jit::Module& module) {
  const auto parameters = module.parameters();
  return parameters.begin() != parameters.end() ? (*parameters.begin()).device() : at::Device(at::kCPU);
}

Structure structure_of(const torch::jit::Module& module) {
  BothSinks sinks;
  add_structure(sinks, module);
  return {sinks.hasher.text(), sinks.identity.text()};
}

WeightGuard::State::State(const at::Tensor& tensor)
    : data(tensor.has_storage() && tensor.layout() == at::kStrided ? tensor.const_data_ptr() : nullptr),
      dtype(tensor.scalar_type()),
      versioned(!tensor.is_inference()),
      version(versioned ? static_cast<std::uint64_t>(tensor._version()) : 0) {}

void WeightGuard::State::check_place(const std::string& name, const at::Tensor& now) const {
  if (now.scalar_type() != dtype) {
    changed(
        fmt::format("'{}' was converted from {} to {}", name, c10::toString(dtype), c10::toString(now.scalar_type())));
  }
  if (data != nullptr && now.const_data_ptr() != data) changed("'" + name + "' was moved");
}

void WeightGuard::State::check(const std::string& name, const at::Tensor& now) const {
  check_place(name, now);
  if (versioned && static_cast<std::uint64_t>(now._version()) != version) changed("'" + name + "' was written to");
}

WeightGuard::Hash WeightGuard::hash_of(const at::Tensor& tensor) {
  Hasher hasher;
  add_tensor(hasher, tensor);
  const auto sum = hasher.hash();
  return {sum.low64, sum.high64};
}

namespace {

/// Element `index` in logical order, whatever the strides.
const std::uint8_t* element(const at::Tensor& tensor, std::int64_t index) {
  std::int64_t offset = 0;
  for (std::int64_t d = tensor.dim() - 1; d >= 0; --d) {
    offset += index % tensor.size(d) * tensor.stride(d);
    index /= tensor.size(d);
  }
  return static_cast<const std::uint8_t*>(tensor.const_data_ptr()) +
         offset * static_cast<std::int64_t>(tensor.element_size());
}

}  // namespace

WeightGuard::Hash WeightGuard::hash_of_saved(const c10::IValue& value) {
  Hasher hasher;
  add_object(hasher, value);
  const auto sum = hasher.hash();
  return {sum.low64, sum.high64};
}

void WeightGuard::Samples::add(const std::string& name, const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !tensor.has_storage() || tensor.layout() != at::kStrided || tensor.numel() == 0) return;
  // Between the elements of a strided tensor lies what belongs to others.
  const bool dense = tensor.is_non_overlapping_and_dense();
  const std::size_t bytes = dense ? tensor.nbytes() : tensor.element_size();
  const auto word_bytes = std::min<std::size_t>(bytes, 8);
  width.push_back(static_cast<std::uint8_t>(word_bytes));
  names.push_back(name);
  const auto* data = static_cast<const std::uint8_t*>(tensor.const_data_ptr());
  for (std::size_t sample = 0; sample < kSamples; ++sample) {
    const auto last = static_cast<std::int64_t>(sample);
    places[sample].push_back(
        dense ? data + (bytes - word_bytes) * sample / (kSamples - 1)
              : element(tensor, (tensor.numel() - 1) * last / static_cast<std::int64_t>(kSamples - 1)));
    words[sample].push_back(word(width.size() - 1, sample));
  }
}

std::uint64_t WeightGuard::Samples::word(std::size_t i, std::size_t sample) const noexcept {
  std::uint64_t value = 0;
  const std::uint8_t* from = places[sample][i];
  if (width[i] == 8) {
    std::memcpy(&value, from, 8);
  } else {
    std::memcpy(&value, from, width[i]);
  }
  return value;
}

WeightGuard::WeightGuard(const torch::jit::Module& module, std::unordered_set<std::string> exempt) : module_(module) {
  std::unordered_set<const void*> seen;
  const auto count = [&](const at::Tensor& tensor) {
    if (tensor.has_storage() && seen.insert(tensor.storage().data()).second) bytes_ += tensor.storage().nbytes();
  };
  const auto add = [&](const torch::jit::Module& owner, const std::string& prefix) {
    const auto object = owner._ivalue();
    const auto type = owner.type();
    for (std::size_t i = 0; i < type->numAttributes(); ++i) {
      const auto& value = object->getSlot(i);
      const auto name = prefix + type->getAttributeName(i);
      if (value.isModule() || exempt.count(name)) continue;
      if (value.isTensor()) {
        if (!value.toTensor().defined()) continue;
        slots_.push_back({object, i, name, value.toTensor(), State(value.toTensor()), hash_of(value.toTensor())});
        count(value.toTensor());
        continue;
      }
      Held held{object, i, name, value, {}, {}, {}, {}};
      if (saves_itself(value)) held.saved = hash_of_saved(value);
      flatten_into(value, held.parts);
      for (const c10::IValue& part : held.parts) {
        if (!part.isTensor() || !part.toTensor().defined()) continue;
        held.states.emplace_back(part.toTensor());
        held.hashes.push_back(hash_of(part.toTensor()));
        count(part.toTensor());
      }
      held_.push_back(std::move(held));
    }
  };
  for (const auto& item : module.named_modules()) add(item.value, item.name.empty() ? "" : item.name + ".");
  sample();
}

WeightGuard::~WeightGuard() = default;

/// Tensors with their states and hashes; `visit(name, tensor, state, hash)`.
template <class Visit>
void WeightGuard::for_each_tensor(const Visit& visit) const {
  for (const Slot& slot : slots_) visit(slot.name, slot.tensor, slot.state, slot.hash);
  for (const Held& held : held_) {
    std::size_t next = 0;
    for (const c10::IValue& part : held.parts) {
      if (!part.isTensor() || !part.toTensor().defined()) continue;
      visit(held.name, part.toTensor(), held.states[next], held.hashes[next]);
      ++next;
    }
  }
}

void WeightGuard::sample() {
  samples_ = {};
  for_each_tensor([&](const std::string& name, const at::Tensor& tensor, const State&, const Hash&) {
    samples_.add(name, tensor);
  });
}

void WeightGuard::let_go() {
  for (const Slot& slot : slots_) loose_.push_back({slot.name, WeakTensor(slot.tensor.getIntrusivePtr()), slot.state});
  slots_.clear();
  held_.clear();
  samples_ = {};
  module_ = torch::jit::Module();
}

/// Is each attribute still what it was, its values aside?
void WeightGuard::check_attributes() const {
  for (const Held& held : held_) {
    const c10::IValue& now = held.owner->slots()[held.index];
    const c10::IValue& then = held.value;
    const bool same = then.isBool()     ? now.isBool() && now.toBool() == then.toBool()
                      : then.isInt()    ? now.isInt() && now.toInt() == then.toInt()
                      : then.isDouble() ? now.isDouble() && now.toDouble() == then.toDouble()
                      : then.isNone()   ? now.isNone()
                      : then.isString() ? now.isString() && now.toStringRef() == then.toStringRef()
                                        : now.is(then);
    if (!same) {
      changed(held.name == "training" || held.name.ends_with(".training") ? "the module was put into training mode"
                                                                          : "'" + held.name + "' was changed");
    }
    if (is_scalar(then)) continue;  // compared
    std::vector<c10::IValue> parts;
    flatten_into(now, parts);
    bool whole = parts.size() == held.parts.size();
    for (std::size_t i = 0; whole && i < parts.size(); ++i) {
      whole = parts[i].isTensor() ? parts[i].is(held.parts[i]) : is_scalar(parts[i]) ? parts[i] == held.parts[i] : true;
    }
    if (!whole) changed("'" + held.name + "' was changed");
  }
  for (const Slot& slot : slots_) {
    const auto& value = slot.owner->slots()[slot.index];
    if (!value.isTensor() || value.unsafeToTensorImpl() != slot.tensor.unsafeGetTensorImpl()) {
      changed("'" + slot.name + "' was replaced");
    }
  }
}

void WeightGuard::check_versions() const {
  for_each_tensor([](const std::string& name, const at::Tensor& tensor, const State& state, const Hash&) {
    state.check(name, tensor);
  });
  for (const Loose& loose : loose_) {
    if (auto held = loose.tensor.lock()) loose.state.check(loose.name, at::Tensor(std::move(held)));
  }
}

void WeightGuard::written(const std::string& name) const {
  {
    const std::lock_guard lock(written_mutex_);
    written_name_ = name;
  }
  written_.store(true, std::memory_order_release);
  changed("'" + name + "' was written to");
}

void WeightGuard::check_written() const {
  if (!written_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(written_mutex_);
  changed("'" + written_name_ + "' was written to");
}

void WeightGuard::check() const {
  check_written();
  check_attributes();
  check_versions();
  const std::size_t sample = next_sample_.fetch_add(1, std::memory_order_relaxed) % kSamples;
  const auto& words = samples_.words[sample];
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (samples_.word(i, sample) != words[i]) written(samples_.names[i]);
  }
}

void WeightGuard::check_every() const {
  check_written();
  check_attributes();
  check_versions();
  for_each_tensor([this](const std::string& name, const at::Tensor& tensor, const State&, const Hash& hash) {
    if (!(hash_of(tensor) == hash)) written(name);
  });
  for (const Held& held : held_) {
    if (held.saved && !(hash_of_saved(held.value) == *held.saved)) written(held.name);
  }
}

void WeightGuard::retake() {
  check_attributes();
  for_each_tensor([](const std::string& name, const at::Tensor& tensor, const State& state, const Hash&) {
    state.check_place(name, tensor);
  });
  for (Slot& slot : slots_) {
    slot.state = State(slot.tensor);
    slot.hash = hash_of(slot.tensor);
  }
  for (Held& held : held_) {
    held.states.clear();
    held.hashes.clear();
    if (held.saved) held.saved = hash_of_saved(held.value);
    for (const c10::IValue& part : held.parts) {
      if (!part.isTensor() || !part.toTensor().defined()) continue;
      held.states.emplace_back(part.toTensor());
      held.hashes.push_back(hash_of(part.toTensor()));
    }
  }
  sample();
  written_.store(false, std::memory_order_release);
}

std::string WeightGuard::digest(const std::string& structure) const {
  Hasher hasher;
  hasher.add(structure);
  for_each_tensor([&](const std::string& name, const at::Tensor&, const State&, const Hash& hash) {
    hasher.add(name);
    hasher.add(&hash, sizeof(hash));
  });
  for (const Held& held : held_) {
    hasher.add(held.name);
    for (const c10::IValue& part : held.parts) {
      if (!part.isTensor()) add_part(hasher, part);
    }
  }
  return hasher.text();
}

std::string WeightGuard::identity(const std::string& structure) const {
  IdentitySink sink;
  sink.add(structure);
  for (const Slot& slot : slots_) {
    sink.add(slot.name);
    add_tensor(sink, slot.tensor);
  }
  for (const Held& held : held_) {
    sink.add(held.name);
    for (const c10::IValue& part : held.parts) add_part(sink, part);
  }
  return sink.text();
}

}  // namespace llmcache::ts
