#include "generation.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "failure.h"
#include "greedy.h"
#include "request_stream.h"
#include "variant.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;
using Ids = std::vector<std::int32_t>;

constexpr double kPlainShare = 0.4;  // of the time budget: what nocache may decode in; --help says so
constexpr std::size_t kWarmUpPrompt = 16;
constexpr std::int64_t kWarmUpTokens = 3;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What a lane did in a turn.
struct Turn {
  Ids prompt;
  Ids said;                        // without the stop token
  std::vector<std::int64_t> best;  // the token that came out on top of each logits; the last one is the stop token, or
                                   // what was said last
  std::vector<at::Tensor> logits;  // [vocabulary] each
  double prefill_ms = 0;
  std::vector<double> decode_ms;
  double tokens_computed = 0;
  std::int64_t tokens_reused = 0;  // of the prompt
  bool cut = false;                // by the time budget
};

struct Lane {
  Setting setting;
  std::unique_ptr<Variant> variant;
  Turn turn = {};                      // the latest
  std::vector<double> latencies = {};  // ms, one a request
  std::vector<double> prefills = {};   // one a turn
  std::vector<double> later = {};      // of these, not of first turns
  std::vector<double> decodes = {};    // one a token
  double said = 0;                     // tokens, those counted that nocache was not given the time for
  double tokens = 0;                   // of all sequences of all turns
  double tokens_computed = 0;
  std::int64_t prompt_tokens = 0;
  double verify_ms = 0;            // beside the latencies
  std::int64_t tokens_reused = 0;  // of prompts
  std::int64_t later_prompt_tokens = 0;
  std::int64_t later_tokens_reused = 0;
  double difference = 0;  // sums of squares of this request, for its divergence
  double norm = 0;
  std::vector<double> divergences = {};  // one a request
  GreedyCount greedy = {};
};

class Generation {
 public:
  explicit Generation(const CellContext& context)
      : context_(context),
        model_(context.model),
        tokens_(context.tokens),
        stream_(make_stream(tokens_, {context.arguments.shuffle, context.arguments.zipf, context.arguments.limit})),
        decoder_(reuses_prefixes(context)) {}

  std::vector<Record> run() {
    const at::NoGradGuard no_grad;
    check_model();
    make_lanes();
    const auto start = Clock::now();
    warm_up();
    for (Lane& lane : lanes_) lane.variant->start();
    const auto first = Clock::now();
    for (const std::int64_t number : stream_.requests) {
      // Stops where one more request would probably end behind the budget.
      const double mean_seconds = done_ == 0 ? 0 : seconds_since(first) / static_cast<double>(done_);
      if (done_ > 0 && seconds_since(start) + mean_seconds > context_.budget_seconds) break;
      converse(number);
      context_.progress.update(std::max(seconds_since(start) / context_.budget_seconds,
                                        static_cast<double>(done_) / static_cast<double>(stream_.requests.size())));
    }
    if (shortened_ > 0) {
      context_.progress.note(fmt::format("note: {}: {} conversations ended early, at the {} tokens of {}",
                                         tokens_.workload, shortened_, context_.file.max_tokens, context_.file.name));
    }
    std::vector<Record> records;
    for (const Lane& lane : lanes_) records.push_back(record(lane));
    return records;
  }

 private:
  void check_model() const {
    const OutputShape& shape = model_.output_shape();
    const auto refuse = [&](const char* why) {
      throw Failure(
          fmt::format("{} goes on where a prompt ends: it needs a causal model that returns logits, and {} {}",
                      tokens_.workload, context_.file.name, why));
    };
    const std::int64_t ids = context_.file.vocabulary > 0
                                 ? context_.file.vocabulary
                                 : *std::max_element(tokens_.tokens.begin(), tokens_.tokens.end()) + 1;
    if (shape.logits_output < 0 || shape.logits_dims < ids) refuse("returns none");
    if (model_.wrapped() && !model_.cache().profile().causal) refuse("is not causal");
    if (context_.file.max_tokens > 0 && context_.file.max_tokens <= tokens_.new_tokens) {
      refuse("takes too few tokens");
    }
  }

  void make_lanes() {
    const Possible possible = {.quality = false, .prefix_reuse = decoder_, .generation = true};
    for (const Setting& setting : settings(context_.arguments, possible)) {
      auto variant = make_variant(setting, {model_, context_.arguments, tokens_, fingerprint_});
      lanes_.push_back({.setting = setting, .variant = std::move(variant)});
      const Ids prompt = warm_up_prompt();
      lanes_.back().variant->prepare(request_of(stream_.requests.front(), prompt));
    }
    if (lanes_.empty()) {
      throw Failure(
          fmt::format("nothing to run: of llmcache only fidelity lossless generates text, and {} needs "
                      "--mode nocache, kvcache or llmcache",
                      tokens_.workload));
    }
  }

  [[nodiscard]] Ids warm_up_prompt() const {
    const auto whole = tokens_.sequence(tokens_.first_sequence(stream_.requests.front()));
    const auto some = whole.first(std::min(whole.size(), kWarmUpPrompt));
    return {some.begin(), some.end()};
  }

  void warm_up() {
    for (Lane& lane : lanes_) {
      lane.variant->clear();
      say(lane, stream_.requests.front(), warm_up_prompt(), kWarmUpTokens, {});
      lane.variant->clear();
      lane.verify_ms = 0;
    }
    plain_seconds_ = 0;
  }

  /// One conversation, in all lanes turn by turn; the first lane is a place further on from request to request.
  void converse(std::int64_t number) {
    std::vector<Ids> conversations(lanes_.size());
    for (Lane& lane : lanes_) lane.latencies.push_back(0);
    std::int64_t turn = 0;
    for (std::int64_t s = tokens_.first_sequence(number); s < tokens_.first_sequence(number + 1); ++s, ++turn) {
      auto part = tokens_.sequence(s);
      if (context_.file.max_tokens > 0) {
        std::size_t longest = 0;
        for (const Ids& ids : conversations) longest = std::max(longest, ids.size());
        const auto room = static_cast<std::size_t>(context_.file.max_tokens - tokens_.new_tokens);
        if (longest + part.size() > room) {
          ++shortened_;
          if (turn > 0) break;
          part = part.first(room);
        }
      }
      for (std::size_t place = 0; place < lanes_.size(); ++place) {
        const std::size_t i = (place + static_cast<std::size_t>(done_)) % lanes_.size();
        Ids prompt = conversations[i];
        prompt.insert(prompt.end(), part.begin(), part.end());
        std::optional<double> allowance;
        if (lanes_[i].setting.mode == "nocache" && lanes_.size() > 1) {
          allowance = kPlainShare * context_.budget_seconds - plain_seconds_;
        }
        say(lanes_[i], number, std::move(prompt), tokens_.new_tokens, allowance);
      }
      finish_turn(s, turn);
      for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const Turn& said = lanes_[i].turn.cut ? stand_in().turn : lanes_[i].turn;
        conversations[i] = lanes_[i].turn.prompt;
        conversations[i].insert(conversations[i].end(), said.said.begin(), said.said.end());
      }
      ++turns_;
    }
    for (Lane& lane : lanes_) {
      if (lane.norm > 0) lane.divergences.push_back(std::sqrt(lane.difference / lane.norm));
      lane.difference = 0;
      lane.norm = 0;
    }
    ++done_;
  }

  /// The lane whose answer nocache goes on with where it had no time for one: with weights as loaded, if there is one.
  [[nodiscard]] const Lane& stand_in() const {
    const Lane* any = nullptr;
    for (const Lane& lane : lanes_) {
      if (lane.setting.mode == "nocache") continue;
      if (lane.setting.weights == "as-loaded") return lane;
      any = &lane;
    }
    return *any;
  }

  [[nodiscard]] Request request_of(std::int64_t number, const Ids& ids) const {
    Request request{.number = number, .first_sequence = tokens_.first_sequence(number), .rows = {ids}, .inputs = {}};
    request.tokens = static_cast<std::int64_t>(ids.size());
    request.padded = request.tokens;
    request.inputs = model_.inputs(request.rows);
    request.calls.push_back({request.rows, request.inputs, Output::kLastToken});
    return request;
  }

  /// A turn of a lane. `allowance`: seconds that it may decode in; it decodes one token at least.
  void say(Lane& lane, std::int64_t number, Ids prompt, std::int64_t new_tokens, std::optional<double> allowance) {
    const auto start = Clock::now();
    Turn& turn = lane.turn;
    turn = {};
    turn.prompt = prompt;
    lane.variant->begin();
    Ids ids = std::move(prompt);
    const auto run = [&] {
      Run done = lane.variant->run(request_of(number, ids));
      const Returned& call = done.returned.back();
      const auto [begin, end] = call.tokens.at(0);
      turn.logits.push_back(tensor_of(call.output, model_.output_shape().logits_output)[0][end - 1 - begin].clone());
      turn.tokens_computed += done.tokens_computed;
      lane.verify_ms += done.verify_ms;
      return done;
    };
    const Run prefill = run();
    turn.prefill_ms = prefill.total_ms();
    turn.tokens_reused = prefill.tokens_reused;
    while (true) {
      turn.best.push_back(best_tokens(turn.logits.back().unsqueeze(0)).front());
      const auto token = static_cast<std::int32_t>(turn.best.back());
      if (token == tokens_.stop_token) break;
      turn.said.push_back(token);
      if (static_cast<std::int64_t>(turn.said.size()) >= new_tokens) break;
      if (allowance && !turn.decode_ms.empty() && seconds_since(start) > *allowance) {
        turn.cut = true;
        break;
      }
      ids.push_back(token);
      turn.decode_ms.push_back(run().total_ms());
    }
    if (lane.setting.mode == "nocache") plain_seconds_ += seconds_since(start);
  }

  /// Counts what the lanes did in the turn that sequence `sequence` of the file opened.
  void finish_turn(std::int64_t sequence, std::int64_t turn_number) {
    for (Lane& lane : lanes_) {
      const Turn& turn = lane.turn;
      double latency = turn.prefill_ms + std::accumulate(turn.decode_ms.begin(), turn.decode_ms.end(), 0.0);
      auto said = static_cast<double>(turn.said.size());
      if (turn.cut) {
        const auto steps = static_cast<double>(stand_in().turn.decode_ms.size());
        const double lacking = std::max(0.0, steps - static_cast<double>(turn.decode_ms.size()));
        latency += lacking * mean(turn.decode_ms);
        said = std::max(said, static_cast<double>(stand_in().turn.said.size()));
      }
      lane.latencies.back() += latency;
      lane.prefills.push_back(turn.prefill_ms);
      lane.decodes.insert(lane.decodes.end(), turn.decode_ms.begin(), turn.decode_ms.end());
      lane.said += said;
      lane.tokens += static_cast<double>(turn.prompt.size() + turn.decode_ms.size());
      lane.tokens_computed += turn.tokens_computed;
      lane.prompt_tokens += static_cast<std::int64_t>(turn.prompt.size());
      lane.tokens_reused += turn.tokens_reused;
      if (turn_number == 0) continue;
      lane.later.push_back(turn.prefill_ms);
      lane.later_prompt_tokens += static_cast<std::int64_t>(turn.prompt.size());
      lane.later_tokens_reused += turn.tokens_reused;
    }
    compare_with_plain(sequence);
  }

  void compare_with_plain(std::int64_t sequence) {
    const auto plain = std::ranges::find_if(lanes_, [](const Lane& lane) { return lane.setting.mode == "nocache"; });
    if (plain == lanes_.end()) return;
    Ids passed;  // what `pass` is of
    at::Tensor pass;
    for (Lane& lane : lanes_) {
      if (&lane == &*plain) continue;
      const Turn& turn = lane.turn;
      const auto prompt = static_cast<std::int64_t>(turn.prompt.size());
      bool same = turn.prompt == plain->turn.prompt;  // as what nocache itself has gone on from
      for (std::size_t i = 0; i < turn.best.size(); ++i) {
        at::Tensor reference;
        if (same && i < plain->turn.logits.size()) {
          reference = plain->turn.logits[i];
          same = plain->turn.best[i] == turn.best[i];
        } else {
          Ids whole = turn.prompt;
          whole.insert(whole.end(), turn.best.begin(), turn.best.end() - 1);
          if (whole != passed) {
            const Rows rows = {whole};
            pass = tensor_of(model_.plain(model_.inputs(rows)), model_.output_shape().logits_output)[0];
            passed = std::move(whole);
          }
          reference = pass[prompt - 1 + static_cast<std::int64_t>(i)];
        }
        lane.difference += (turn.logits[i] - reference).to(at::kDouble).square().sum().item<double>();
        lane.norm += reference.to(at::kDouble).square().sum().item<double>();
        if (!lane.greedy.compare(sequence, prompt + static_cast<std::int64_t>(i), reference, turn.best[i])) break;
      }
    }
  }

  [[nodiscard]] Record record(const Lane& lane) const {
    Record r = record_of(context_, stream_, lane.setting);
    const bool plain_itself = lane.setting.mode == "nocache";
    if (!plain_itself) r.output = "last";
    r.requests = done_;
    r.verification_ms = lane.verify_ms;
    r.sequences = turns_;
    r.tokens = static_cast<std::int64_t>(lane.tokens);
    r.tokens_computed_fraction = lane.tokens_computed / lane.tokens;
    r.latency_ms = summarize(lane.latencies);
    r.prefill_ms = summarize(lane.prefills);
    if (!lane.decodes.empty()) r.decode_ms = summarize(lane.decodes);
    const double seconds = std::accumulate(lane.latencies.begin(), lane.latencies.end(), 0.0) / 1000;
    r.tokens_per_second = lane.said / seconds;
    if (!plain_itself) {
      r.tokens_reused_fraction = static_cast<double>(lane.tokens_reused) / static_cast<double>(lane.prompt_tokens);
      r.tokens_shared_fraction = 0;
    }
    LaterTurns later = {.turns = static_cast<std::int64_t>(lane.later.size()), .prefill_ms = summarize(lane.later)};
    if (!plain_itself && lane.later_prompt_tokens > 0) {
      later.tokens_reused_fraction =
          static_cast<double>(lane.later_tokens_reused) / static_cast<double>(lane.later_prompt_tokens);
    }
    for (const Lane& other : lanes_) {
      if (other.setting.mode == "nocache") {
        r.speedup_vs_nocache = ratio_of_sums(other.latencies, lane.latencies);
        r.prefill_speedup_vs_nocache = ratio_of_sums(other.prefills, lane.prefills);
        later.speedup_vs_nocache = ratio_of_sums(other.later, lane.later);
        std::vector<double> ratios;
        for (std::size_t i = 0; i < lane.latencies.size(); ++i) {
          ratios.push_back(other.latencies[i] / lane.latencies[i]);
        }
        r.speedup_median = median(std::move(ratios));
        if (plain_itself) {
          r.divergence = {0, 0, 0, 0, 0};
        } else {
          r.divergence = summarize(lane.divergences);
          r.greedy = lane.greedy.result();
        }
      } else if (other.setting.mode == "kvcache" && other.setting.weights == lane.setting.weights) {
        r.speedup_vs_kvcache = ratio_of_sums(other.latencies, lane.latencies);
        r.prefill_speedup_vs_kvcache = ratio_of_sums(other.prefills, lane.prefills);
        later.speedup_vs_kvcache = ratio_of_sums(other.later, lane.later);
      }
    }
    if (later.turns > 0) r.later_turns = later;
    lane.variant->describe(r);
    return r;
  }

  const CellContext& context_;
  LoadedModel& model_;
  const TokenFile& tokens_;
  const Stream stream_;
  const bool decoder_;
  const FingerprintOptions fingerprint_;  // no lane that uses it runs
  std::vector<Lane> lanes_;
  double plain_seconds_ = 0;  // that nocache has had
  std::int64_t done_ = 0;
  std::int64_t turns_ = 0;
  std::int64_t shortened_ = 0;
};

}  // namespace

std::vector<Record> run_generation(const CellContext& context) { return Generation(context).run(); }

}  // namespace llmcache::bench
