#include "outputs.h"

#include <fmt/format.h>

#include <utility>

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

at::Tensor tensor_of(const c10::IValue& value, std::int64_t number) {
  const auto tensors = tensors_of(value);
  if (number >= static_cast<std::int64_t>(tensors.size())) {
    throw Failure(fmt::format("the model returned {} tensors, expected more than {}", tensors.size(), number));
  }
  return tensors[static_cast<std::size_t>(number)];
}

Returned all_of(c10::IValue output, const Rows& rows) {
  Returned all{.output = std::move(output), .tokens = {}};
  for (const auto& row : rows) all.tokens.push_back({0, static_cast<std::int64_t>(row.size())});
  return all;
}

}  // namespace llmcache::bench
