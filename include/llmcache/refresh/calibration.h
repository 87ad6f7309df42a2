// The result of a calibration: what a cache needs to reuse answers within its error budget.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/model/verified_envelope.h"
#include "llmcache/refresh/budget.h"

namespace llmcache {

struct Batch;
struct ExitModel;
struct ExitSample;

/// Requests to be calibrated on: for several budgets, or several caches around one model. Immutable; cheap to copy.
class CalibrationSample {
 public:
  std::string model_digest;                     ///< of the model that computed them
  std::int64_t sequences = 0;                   ///< different ones
  std::shared_ptr<const ExitSample> exit = {};  ///< what early exits are fitted on; null: this model has none
  std::shared_ptr<const std::vector<Batch>> requests = {};  ///< the first 1,000, in their order
  /// What it holds: the inputs of these requests, and where the model has early exits, of each different sequence the
  /// mean state in front of each layer and its output: 4 * (layers * hidden + values) bytes.
  std::size_t bytes = 0;
};

/// Reuse of token states (encoders) or of segments (decoders), as a calibration chose it.
///
/// The first half of the sample, of which the first 1,000 requests count, runs with each setting and in full, and puts
/// the settings in order of their error. The second half is then served with up to three of them, as a cache would
/// serve it, and certifies them as below.
struct ReuseChoice {
  std::string mechanism;                        ///< "token reuse" or "segment reuse"
  BankFormat format = BankFormat::kAsComputed;  ///< in which states were held
  std::string setting;         ///< how much of a matched sequence is computed, and how the rest is corrected
  double match_threshold = 0;  ///< largest distance of a match: edit fraction of a sequence, computed part of a prompt
  double epsilon = 0;          ///< the part of the budget's epsilon that it was certified for; 0: all of it
  /// It was certified for sequences of at least this many tokens; shorter ones are not its own.
  std::int64_t least_tokens = 0;
  std::int64_t fitted = 0;      ///< sequences that ordered the settings
  std::int64_t certified = 0;   ///< sequences that certified them
  double error = 0;             ///< mean error among these
  double bound = 0;             ///< its upper bound with confidence 1 - delta
  double computed = 1;          ///< token-layers computed / all, of these
  double typical_distance = 0;  ///< between outputs of different requests (kRelativeError)
};

/// What calibrate() fitted, and the evidence for its promise. Immutable; cheap to copy.
///
/// The sample is taken in the order of the traffic, and so should it be given: banks, translators and gates are fitted
/// on its first half, the shape of the thresholds is chosen on a fifth behind it, and the rest, which had no say in any
/// of that and came later, certifies them: from the safest setting on, each is tested for an error of epsilon or more,
/// up to the first that cannot be rejected at level delta (fixed-sequence testing, Learn then Test, arXiv 2110.01052).
/// Decisions are tested by the exact binomial tail (Clopper and Pearson, 1934), other errors by betting (Waudby-Smith
/// and Ramdas, arXiv 2010.09686).
///
/// Where early exit and reuse of states both look worth a test, by the parts of the sample that certify nothing, each
/// is tested at delta / 2. If they save most side by side, the shorter sequences leave early and the longer ones reuse
/// states, and each is certified for an error of epsilon / 2 of all traffic, counting what it serves: together they
/// keep to epsilon with confidence 1 - delta. If only one of them is certified, it serves the sequences that it was
/// certified for, and no others. Otherwise each is tested for epsilon, and the one that computes less is used.
class CalibrationProfile {
 public:
  Budget budget;
  EarlyExit early_exit = EarlyExit::kOff;
  std::string model_digest;            ///< of the model it was made with
  std::int64_t fitted = 0;             ///< sequences that were fitted on, and are in the banks
  std::int64_t certified = 0;          ///< sequences that the promise was tested on
  double certified_error = 0;          ///< mean error among these at the chosen thresholds
  double error_bound = 0;              ///< upper bound of the error, with confidence 1 - delta; 0 if nothing is reused
  double expected_share = 0;           ///< of the certifying sequences, those that were reused
  std::vector<double> expected_exits;  ///< early exit: share of sequences that leave in front of each layer
  std::int64_t exit_below = 0;  ///< early exit was certified for sequences of fewer tokens, and no other leaves; 0: all
  std::size_t bytes = 0;        ///< of its banks
  double typical_distance = 0;  ///< mean distance between outputs of different sequences (kRelativeError)
  std::shared_ptr<const ExitModel> exit;  ///< null: early exit is not used
  /// Unset: states of tokens are not reused. Beside `exit` it serves only where `exit_below` shares the sequences out.
  std::optional<ReuseChoice> reuse;
  std::string reason;         ///< where nothing is reused: why, and what it would take; else empty
  VerifiedEnvelope verified;  ///< sizes whose answers were compared when it was made: use_calibration() takes them over

  /// False: no setting could be certified, and nothing is reused beyond kLossless.
  [[nodiscard]] bool reuses() const noexcept { return exit != nullptr || reuse; }
  /// True if `reuse` serves.
  [[nodiscard]] bool reuses_states() const noexcept { return reuse && (exit == nullptr || exit_below > 0); }
  /// The part of the budget's epsilon that early exits were certified for.
  [[nodiscard]] double exit_epsilon() const noexcept {
    return exit && reuses_states() ? budget.epsilon - reuse->epsilon : budget.epsilon;
  }
  /// What it promises and why, for people.
  [[nodiscard]] std::string to_string() const;

  /// Writes PATH, which is JSON, and with early exits PATH with ".safetensors" appended. Each is replaced as a whole.
  /// Throws Error(kInvalidFile) if they cannot be written.
  void save(const std::filesystem::path& path) const;
  /// Throws Error(kInvalidFile) that says what is wrong with a file that is missing, damaged or of another format.
  static CalibrationProfile load(const std::filesystem::path& path);
};

}  // namespace llmcache
