#include "conversation.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "failure.h"
#include "machine.h"

namespace llmcache::bench {
namespace {

constexpr double kPlainShare = 0.25;  // of the time: what nocache may decode in; README.md says so
constexpr std::size_t kWarmUpPrompt = 16;
constexpr std::int64_t kWarmUpTokens = 3;

bool is_plain(const Run& run) { return run.config.mode == "nocache"; }

/// Which run says what nocache had no time to say: with weights as loaded, if there is one.
std::size_t stand_in(const std::vector<Run>& runs) {
  std::size_t any = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (is_plain(runs[i])) continue;
    if (runs[i].config.weights == "as-loaded") return i;
    any = i;
  }
  return any;
}

}  // namespace

Conversations::Conversations(const ExperimentContext& context) : context_(context) {
  const TokenFile& tokens = context.tokens;
  const OutputShape& shape = context.model.output_shape();
  const auto refuse = [&](const char* why) {
    throw Failure(fmt::format("{} goes on where a prompt ends: it needs a causal model that returns logits, and {} {}",
                              tokens.workload, context.file.name, why));
  };
  const std::int64_t ids =
      context.file.vocabulary > 0 ? context.file.vocabulary : *std::ranges::max_element(tokens.tokens) + 1;
  if (shape.logits_output < 0 || shape.logits_dims < ids) refuse("returns none");
  if (context.model.wrapped() && !context.model.cache().profile().causal) refuse("is not causal");
  if (context.cut() <= tokens.new_tokens) refuse("takes too few tokens");
}

bool Conversations::plain_is_done() const { return plain_seconds_ >= kPlainShare * context_.seconds; }

Call Conversations::call_of(std::int64_t sequence, const Ids& ids) const {
  Call call{.rows = {ids}, .output = Output::kLastToken, .first_sequence = sequence};
  call.inputs = context_.model.inputs(call.rows);
  return call;
}

void Conversations::warm_up(Run& run, std::int64_t request) {
  const std::int64_t sequence = context_.tokens.first_sequence(request);
  const auto whole = context_.tokens.sequence(sequence);
  const auto some = whole.first(std::min(whole.size(), kWarmUpPrompt));
  say(run, sequence, {some.begin(), some.end()}, kWarmUpTokens, {});
  plain_seconds_ = 0;
}

void Conversations::hold(std::int64_t request, std::vector<Run>& runs, std::size_t first) {
  const TokenFile& tokens = context_.tokens;
  std::vector<Ids> so_far(runs.size());
  std::vector<Distance> distances(runs.size());
  for (Run& run : runs) run.latencies.push_back(0);
  const std::int64_t begin = tokens.first_sequence(request);
  for (std::int64_t sequence = begin; sequence < tokens.first_sequence(request + 1); ++sequence) {
    const auto next = part(sequence, so_far, sequence == begin);
    if (!next) break;
    std::vector<Turn> turns(runs.size());
    for (std::size_t place = 0; place < runs.size(); ++place) {
      const std::size_t i = (first + place) % runs.size();
      std::optional<double> allowance;
      if (is_plain(runs[i]) && runs.size() > 1) allowance = kPlainShare * context_.seconds - plain_seconds_;
      so_far[i].insert(so_far[i].end(), next->begin(), next->end());
      turns[i] = say(runs[i], sequence, so_far[i], tokens.new_tokens, allowance);
    }
    const Turn& other = turns[stand_in(runs)];
    for (std::size_t i = 0; i < runs.size(); ++i) {
      count(runs[i], turns[i], other, sequence - begin);
      const Ids& said = turns[i].cut ? other.said : turns[i].said;
      so_far[i].insert(so_far[i].end(), said.begin(), said.end());
    }
    compare(sequence, turns, runs, distances);
  }
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto [difference, norm] = distances[i];
    if (is_plain(runs[i])) runs[i].divergences.push_back(0);
    if (norm > 0) runs[i].divergences.push_back(std::sqrt(difference / norm));
  }
}

/// What the user says in this turn, cut to what the model takes; unset where the conversation ends before.
std::optional<Conversations::Ids> Conversations::part(std::int64_t sequence, const std::vector<Ids>& so_far,
                                                      bool first) {
  auto ids = context_.tokens.sequence(sequence);
  std::size_t longest = 0;
  for (const Ids& one : so_far) longest = std::max(longest, one.size());
  const auto room = static_cast<std::size_t>(context_.cut() - context_.tokens.new_tokens);
  if (longest + ids.size() > room) {
    ++shortened_;
    if (!first) return std::nullopt;
    ids = ids.first(room);
  }
  return Ids(ids.begin(), ids.end());
}

/// A turn of a run. `allowance`: seconds that it may decode in; it decodes one token at least.
Conversations::Turn Conversations::say(Run& run, std::int64_t sequence, const Ids& prompt, std::int64_t new_tokens,
                                       std::optional<double> allowance) {
  const auto start = Clock::now();
  Turn turn{.prompt = prompt};
  Ids ids = prompt;
  run.system->begin();
  while (true) {
    Answer answer = run.system->run(call_of(sequence, ids));
    const auto [begin, end] = answer.returned.tokens.at(0);
    const at::Tensor all = tensor_of(answer.returned.output, context_.model.output_shape().logits_output);
    turn.logits.push_back(all[0][end - 1 - begin].clone());
    answer.returned = {};  // logits are large
    turn.answers.push_back(std::move(answer));
    turn.best.push_back(best_tokens(turn.logits.back().unsqueeze(0)).front());
    const auto token = static_cast<std::int32_t>(turn.best.back());
    if (token == context_.tokens.stop_token) break;
    turn.said.push_back(token);
    if (std::ssize(turn.said) >= new_tokens) break;
    turn.cut = allowance && turn.answers.size() > 1 && seconds_since(start) > *allowance;
    if (turn.cut) break;
    ids.push_back(token);
  }
  if (is_plain(run)) plain_seconds_ += seconds_since(start);
  return turn;
}

void Conversations::count(Run& run, const Turn& turn, const Turn& stand_in, std::int64_t number) const {
  run.count(turn.answers, {.rows = {turn.prompt}}, number);
  std::vector<double> steps;
  for (std::size_t i = 1; i < turn.answers.size(); ++i) steps.push_back(turn.answers[i].ms);
  double latency = std::accumulate(steps.begin(), steps.end(), turn.answers.front().ms);
  auto said = static_cast<double>(turn.said.size());
  if (turn.cut) {
    const auto wanted = static_cast<double>(stand_in.answers.size()) - 1;
    latency += std::max(0.0, wanted - static_cast<double>(steps.size())) * mean(steps);
    said = std::max(said, static_cast<double>(stand_in.said.size()));
  }
  run.latencies.back() += latency;
  run.decodes.insert(run.decodes.end(), steps.begin(), steps.end());
  run.said += said;
  run.tokens += static_cast<std::int64_t>(turn.prompt.size() + steps.size());
}

void Conversations::compare(std::int64_t sequence, const std::vector<Turn>& turns, std::vector<Run>& runs,
                            std::vector<Distance>& distances) const {
  if (std::ranges::none_of(runs, is_plain)) return;
  Ids passed;  // what `pass` is of
  at::Tensor pass;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (is_plain(runs[i])) continue;
    const Turn& turn = turns[i];
    Ids whole = turn.prompt;
    whole.insert(whole.end(), turn.best.begin(), turn.best.end() - 1);
    if (whole != passed) {
      const c10::IValue output = context_.model.plain(call_of(sequence, whole).inputs);
      pass = tensor_of(output, context_.model.output_shape().logits_output)[0];
      passed = std::move(whole);
    }
    const std::int64_t length = std::ssize(turn.prompt);
    const at::Tensor reference = pass.slice(0, length - 1);
    const at::Tensor logits = at::stack(turn.logits);
    distances[i].difference += (logits - reference).to(at::kDouble).square().sum().item<double>();
    distances[i].norm += reference.to(at::kDouble).square().sum().item<double>();
    runs[i].greedy.compare(sequence, length, reference, logits);
  }
}

}  // namespace llmcache::bench
