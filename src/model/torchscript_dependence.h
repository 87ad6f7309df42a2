// What the numbers of a model depend on beside the tokens they belong to, read from its graph. Internal to
// model/torchscript*.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llmcache::ts {

struct Analysis;

/// Dependences that tiny probes may not show, because they appear beyond some length, number of rows or with certain
/// ids only. Each text says what depends on what; empty: nothing does.
struct Dependence {
  /// A number that follows from the length of the batch, from how many tokens are real, or from all ids of a sequence,
  /// by more than sums, products and smooth functions (a comparison, a limit, a branch): rotary frequencies that change
  /// beyond some length, attention masks with a separator, positions shifted by a count.
  std::string length;
  /// The same of the length that the sources of a batch are padded to.
  std::string source_length;
  /// The same of the number of rows, of a row's place among them, or of what other rows hold.
  std::string rows;
  /// By input: where which tokens attend to which follows from it; empty: nowhere. Of the mask that is as it should be;
  /// of others it may open attention to tokens that come later.
  std::vector<std::string> pairs;
  /// By input: whole numbers that it is compared with.
  std::vector<std::vector<std::int64_t>> compared;
};

/// Follows every value of the graph from where it is made. Numbers that are used as shapes alone do not count, nor
/// which token the head chooses: that is found for each request (Model::read_positions). To be asked before sizes are
/// detached.
Dependence find_dependence(const Analysis& analysis);

}  // namespace llmcache::ts
