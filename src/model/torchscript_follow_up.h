// What stands right behind a linear layer in the graph and can be done in one pass over its result. Internal to
// model/torchscript*.
#pragma once

#include <vector>

#include "model/row_kernels.h"
#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// activation(product + bias) + residual, as the nodes behind a product make it.
struct FollowUp {
  Value* bias = nullptr;  ///< of an addition behind the product; null: none
  Activation activation = Activation::kNone;
  Value* residual = nullptr;     ///< null: nothing is added
  std::vector<Node*> replaced;   ///< in order; the last one's output is the result. Empty: there is no follow-up
  std::vector<Node*> reshaping;  ///< aten::view and aten::reshape between them, in order: to be done behind
};

/// `has_bias`: the product has one already. What other nodes need too, and a hidden state between layers, ends the
/// row; so does whatever stands in another layer than the product.
FollowUp follow_up_of(Value* product, bool has_bias, const Analysis& analysis);

/// A constant number, given as such or as a tensor of no dimension; none for other values.
std::optional<double> constant_number(const Value* value);

}  // namespace llmcache::ts
