// An answer beside the plain model's: at which sizes it was made, and whether it is the same.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "execute/batch.h"
#include "known_outputs.h"
#include "llmcache/options.h"
#include "llmcache/report.h"
#include "model/probe.h"
#include "prefix_reuse.h"
#include "refresh/verification.h"

namespace llmcache {

/// Sizes that an answer has, for each mechanism that had a part in it.
struct AnswerSizes {
  std::vector<SizeCode> codes;
  bool reused = false;     ///< something was not computed by the model as it is, for this batch
  bool checkable = false;  ///< some row is to be what the plain model gives
  std::int64_t longest = 0, padding = 0;  ///< tokens of a row
};

/// `report`: its sequences are those of the batch. `uses`: rows are those of the batch.
AnswerSizes sizes_of(const Batch& batch, const KnownRows& known, const std::vector<PrefixUse>& uses,
                     const ForwardReport& report);

/// Where an answer differs from the plain one.
struct Difference {
  Mechanism mechanism = Mechanism::kDense;  ///< that it came from
  std::string what;
};

/// Compares the rows that are to be what the plain model gives, up to rounding. Both results are those of the tokens that
/// `output` names. One difference for each mechanism at most.
std::vector<Difference> differences(const c10::IValue& answer, const c10::IValue& plain, const OutputSpec& spec,
                                    const Batch& batch, Output output, const ForwardReport& report);

/// How far an answer may be off the plain one, of the largest magnitude in a row: sums in another order, over many
/// layers and tokens. Above what probes of tiny sequences allow.
double answer_tolerance(at::ScalarType dtype);

}  // namespace llmcache
