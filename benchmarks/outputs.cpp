#include "outputs.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "failure.h"
#include "model/tensors_of.h"

namespace llmcache::bench {

std::int64_t padded_length(const Rows& rows) {
  std::int64_t longest = 0;
  for (const auto& row : rows) longest = std::max<std::int64_t>(longest, std::ssize(row));
  return longest;
}

std::int64_t tokens_of(const Rows& rows) {
  std::int64_t tokens = 0;
  for (const auto& row : rows) tokens += std::ssize(row);
  return tokens;
}

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  bool pure = true;
  auto tensors = llmcache::tensors_of(value, &pure);
  if (pure) return tensors;
  throw Failure(fmt::format("the model returns a {}, expected a tensor or a tuple of tensors", value.tagKind()));
}

at::Tensor tensor_of(const c10::IValue& value, std::int64_t number) {
  const auto tensors = tensors_of(value);
  if (number >= std::ssize(tensors)) {
    throw Failure(fmt::format("the model returned {} tensors, expected more than {}", tensors.size(), number));
  }
  return tensors[static_cast<std::size_t>(number)];
}

Returned all_of(c10::IValue output, const Rows& rows) {
  Returned all{.output = std::move(output), .tokens = {}};
  for (const auto& row : rows) all.tokens.push_back({0, std::ssize(row)});
  return all;
}

std::vector<std::int64_t> best_tokens(const at::Tensor& logits) {
  const at::Tensor best = logits.argmax(-1).to(at::kCPU, at::kLong).contiguous();
  return {best.data_ptr<std::int64_t>(), best.data_ptr<std::int64_t>() + best.numel()};
}

}  // namespace llmcache::bench
