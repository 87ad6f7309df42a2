#include "budget_audits.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "execute/engine.h"

namespace llmcache {

std::size_t BudgetRules::level() const {
  const auto open = std::find_if(gates.begin(), gates.end(), [](const auto& gate) { return gate->open(); });
  return static_cast<std::size_t>(open - gates.begin());
}

double record(BudgetRules& rules, const std::vector<Trial>& trials, const at::Tensor& full) {
  double worst = 0;
  const auto expected = full.to(at::kFloat).reshape({1, -1});
  for (const Trial& trial : trials) {
    const double error = rules.exit.errors(trial.answer.reshape({1, -1}), expected, rules.scores).front();
    rules.gates[trial.level]->record(trial.decision, error);
    worst = std::max(worst, error);
  }
  return worst;
}

BudgetAudits::BudgetAudits(const Model& model, const OutputSpec& output) : model_(model), output_(output) {
  thread_ = std::thread([this] { work(); });
}

BudgetAudits::~BudgetAudits() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void BudgetAudits::add(std::shared_ptr<BudgetRules> rules, Batch sequence, std::vector<Trial> trials) {
  {
    const std::lock_guard lock(mutex_);
    if (jobs_.size() >= kMostWaiting) {
      ++dropped_;
      return;
    }
    jobs_.push_back({std::move(rules), std::move(sequence), std::move(trials)});
  }
  changed_.notify_all();
}

std::uint64_t BudgetAudits::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

std::uint64_t BudgetAudits::waiting() const {
  const std::lock_guard lock(mutex_);
  return jobs_.size();
}

void BudgetAudits::work() {
  const c10::NoGradGuard no_grad;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job& job = jobs_.front();  // a deque's elements stay where they are while others are added
    lock.unlock();
    try {
      audit(job);
    } catch (const std::exception&) {
      // Not known then, as if it had not been chosen. The request itself has been answered.
    }
    lock.lock();
    jobs_.pop_front();
  }
}

void BudgetAudits::audit(const Job& job) const {
  model_.check_unchanged();
  ForwardReport report;
  const auto plan = job.sequence.full_plan(static_cast<std::int32_t>(model_.layers()));
  const auto result = execute_packed(model_, job.sequence.inputs, plan, {}, nullptr, report);
  const RowSpan& span = job.sequence.spans[0];
  record(*job.rules, job.trials,
         row_of(result, output_, 0, span.first, span.tokens, job.sequence.width)[0].reshape({-1}));
}

}  // namespace llmcache
