// Text generation: each run continues prompts and conversations greedily, token by token.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "experiment.h"
#include "run.h"

namespace llmcache::bench {

/// Sums of squares, for a relative L2 distance.
struct Distance {
  double difference = 0, norm = 0;
};

/// Requests of a workload of task generation: conversations of one turn or more. In each turn the model gets everything
/// said so far (prefill) and says tokens until it has said `new_tokens`, or the file's stop token, which is not part of
/// what was said. All runs make a turn one after the other, then the next turn; each goes on with what it said itself.
/// nocache, whose every token takes a pass over the whole sequence, stops within a turn once it has had its share of
/// the time: the steps it lacks count with the mean time of those it made, and it goes on with what another run said.
///
/// What the others say is compared, token by token, with what comes out on top in a pass of the plain model over the
/// whole sequence: in a causal model a token's logits do not depend on what is behind it.
class Conversations {
 public:
  /// Throws Failure where the model cannot go on where a prompt ends.
  explicit Conversations(const ExperimentContext& context);

  /// A few tokens of it.
  void warm_up(Run& run, std::int64_t request);

  /// One conversation in all runs, turn by turn; run `first` begins each turn.
  void hold(std::int64_t request, std::vector<Run>& runs, std::size_t first);

  /// Seconds that nocache has had; true once that is its share.
  [[nodiscard]] double plain_seconds() const { return plain_seconds_; }
  [[nodiscard]] bool plain_is_done() const;
  /// Conversations that ended at the longest sequence that the model takes.
  [[nodiscard]] std::int64_t shortened() const { return shortened_; }

 private:
  using Ids = std::vector<std::int32_t>;

  /// What a run did in a turn.
  struct Turn {
    Ids prompt;
    Ids said = {};                        // without the stop token
    std::vector<std::int64_t> best = {};  // of each logits; the last one is the stop token, or what was said last
    std::vector<at::Tensor> logits = {};  // [vocabulary] each
    std::vector<Answer> answers = {};     // of the prompt, and of each step
    bool cut = false;                     // by the time
  };

  [[nodiscard]] Call call_of(std::int64_t sequence, const Ids& ids) const;
  Turn say(Run& run, std::int64_t sequence, const Ids& prompt, std::int64_t new_tokens,
           std::optional<double> allowance);
  [[nodiscard]] std::optional<Ids> part(std::int64_t sequence, const std::vector<Ids>& so_far, bool first);
  void count(Run& run, const Turn& turn, const Turn& stand_in, std::int64_t number) const;
  void compare(std::int64_t sequence, const std::vector<Turn>& turns, std::vector<Run>& runs,
               std::vector<Distance>& distances) const;

  const ExperimentContext& context_;
  double plain_seconds_ = 0;
  std::int64_t shortened_ = 0;
};

}  // namespace llmcache::bench
