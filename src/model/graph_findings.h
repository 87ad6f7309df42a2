// What runs of a model's graph told while it was wrapped: plain numbers, which can be saved and taken up again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "store/damaged_data.h"

namespace llmcache {

/// Which layers do the same, with other weights.
struct LayerKinds {
  std::vector<std::int64_t> distinct;  ///< the first layer of each kind, and the last layer, ascending
  std::vector<std::size_t> like;       ///< by layer: which of `distinct` it is like
};

/// Filled as the graph is run; or known, from a file: then nothing is run to wrap the model. The numbers of a value are
/// those of ts::numbers_of() (model/torchscript_labels.cpp).
struct GraphFindings {
  using Numbers = std::vector<std::int64_t>;

  bool known = false;                          ///< from a file
  std::string structure;                       ///< digest of the graph and its constants
  std::string structure_identity;              ///< the same by a cryptographic hash; not saved
  std::size_t chain = 0;                       ///< which of the chains that might be layers they are
  std::vector<bool> source;                    ///< by input: it is of the source; empty: there is none
  std::int64_t max_tokens = 0;                 ///< as tables of positions have room for; 0: unknown
  std::int64_t max_source_tokens = 0;          ///< likewise
  std::vector<Numbers> values;                 ///< of each value of the graph, in its order
  std::optional<std::vector<Numbers>> result;  ///< of each tensor in the result; none: their number varies
  std::vector<bool> answers;                   ///< that ask() gave, in order
  std::size_t asked = 0;                       ///< how many of them, where they are known

  LayerKinds layers;  ///< where layers hand on nothing but the hidden state; empty: not known. Not saved

  /// What `find` says, where an exception is a no; or what it said when the model was probed. Throws DamagedData if
  /// that is not known.
  bool ask(const std::function<bool()>& find) {
    if (known) {
      if (asked++ >= answers.size()) throw DamagedData("it has fewer answers than wrapping the model asks for");
      return answers[asked - 1];
    }
    bool answer = false;
    try {
      answer = find();
    } catch (const std::exception&) {
      answer = false;
    }
    answers.push_back(answer);
    return answer;
  }
};

}  // namespace llmcache
