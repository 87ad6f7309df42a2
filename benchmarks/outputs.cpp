#include "outputs.h"

#include <fmt/format.h>

#include "failure.h"

namespace llmcache::bench {
namespace {

void collect(const c10::IValue& value, std::vector<at::Tensor>& tensors) {
  if (value.isTensor()) {
    tensors.push_back(value.toTensor());
  } else if (value.isTuple()) {
    for (const c10::IValue& element : value.toTupleRef().elements()) collect(element, tensors);
  } else if (!value.isNone()) {
    throw Failure(fmt::format("the model returns a {}, expected a tensor or a tuple of tensors", value.tagKind()));
  }
}

}  // namespace

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  std::vector<at::Tensor> tensors;
  collect(value, tensors);
  return tensors;
}

}  // namespace llmcache::bench
