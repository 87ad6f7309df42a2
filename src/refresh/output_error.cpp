#include "refresh/output_error.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "refresh/exit_model.h"

namespace llmcache {
namespace {

/// `[tokens or 1, values]` in float32.
at::Tensor flat(const at::Tensor& output, bool per_token) {
  const auto own = output[0].to(at::kFloat);
  if (per_token) return own.reshape({own.size(0), -1});
  return own.reshape({1, -1});
}

}  // namespace

at::Tensor OutputError::rows_of(const at::Tensor& output) const {
  const auto rows = flat(output, per_token_);
  return metric_ == BudgetMetric::kTokenAgreement ? rows.narrow(0, rows.size(0) - 1, 1) : rows;
}

double OutputError::operator()(const at::Tensor& answer, const at::Tensor& full) const {
  const auto got = rows_of(answer);
  const auto want = rows_of(full);
  if (!got.isfinite().all().item<bool>() && want.isfinite().all().item<bool>()) return 1;
  if (metric_ == BudgetMetric::kRelativeError) {
    const double error = (got - want).norm(2, 1).mean().item<double>() / typical_distance_;
    return std::isfinite(error) ? std::min(error, 1.0) : 1;
  }
  static const ScoreFunction none;
  const ScoreFunction& scores = metric_ == BudgetMetric::kDecision ? scores_ : none;
  return decisions_of(got, scores).ne(decisions_of(want, scores)).to(at::kDouble).mean().item<double>();
}

double OutputError::typical_distance(const std::vector<at::Tensor>& outputs, bool per_token) {
  const std::size_t n = outputs.size();
  if (n < 2) return 0;
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto one = flat(outputs[i], per_token);
    const auto other = flat(outputs[(i + n / 2) % n], per_token);
    const auto rows = std::min(one.size(0), other.size(0));
    sum += (one.narrow(0, 0, rows) - other.narrow(0, 0, rows)).norm(2, 1).mean().item<double>();
  }
  return sum / static_cast<double>(n);
}

}  // namespace llmcache
