#include "model/tensors_of.h"

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/core/ivalue_inl.h>
#include <ATen/core/jit_type.h>

namespace llmcache {
namespace {

void collect(const c10::IValue& value, std::vector<at::Tensor>& found, bool& pure) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) found.push_back(value.toTensor());
  } else if (value.isTuple()) {
    for (const auto& element : value.toTupleRef().elements()) collect(element, found, pure);
  } else if (value.isTensorList() || value.isList()) {
    for (const c10::IValue& element : value.toListRef()) collect(element, found, pure);
  } else if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) collect(entry.value(), found, pure);
  } else if (!value.isNone()) {
    pure = false;
  }
}

}  // namespace

std::vector<at::Tensor> tensors_of(const c10::IValue& value, bool* pure) {
  std::vector<at::Tensor> found;
  bool only_tensors = true;
  collect(value, found, only_tensors);
  if (pure != nullptr) *pure = only_tensors;
  return found;
}

c10::IValue map_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(change(value.toTensor())) : value;
  if (value.isTuple()) {
    const auto& tuple = value.toTupleRef();
    std::vector<c10::IValue> elements;
    for (const auto& element : tuple.elements()) elements.push_back(map_tensors(element, change));
    const auto type = tuple.type();
    if (type && type->schema()) return c10::ivalue::Tuple::createNamed(std::move(elements), type);
    return c10::ivalue::Tuple::create(std::move(elements));
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(tensor.defined() ? change(tensor) : tensor);
    return list;
  }
  if (value.isList()) {
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& element : value.toListRef()) list.push_back(map_tensors(element, change));
    return list;
  }
  if (value.isGenericDict()) {
    const auto dict = value.toGenericDict();
    c10::impl::GenericDict made(dict.keyType(), dict.valueType());
    for (const auto& entry : dict) made.insert(entry.key(), map_tensors(entry.value(), change));
    return made;
  }
  return value;
}

}  // namespace llmcache
