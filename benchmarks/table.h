// Tables of text for people.
#pragma once

#include <string>
#include <vector>

#include "records.h"

namespace llmcache::bench {

class Table {
 public:
  /// The first `left` columns are aligned to the left, the others to the right.
  Table(std::vector<std::string> headers, std::size_t left);
  /// `cells` must have one entry a header.
  void add(std::vector<std::string> cells);
  /// Columns of which all cells are empty or "-" are left out.
  [[nodiscard]] std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::size_t left_;
};

/// The results, one line a record; models with random weights say so on every line. Columns that no record has anything
/// for are left out.
std::string results_table(const std::vector<Record>& records);

/// Tokens that come out on top otherwise than in nocache, of records with weights as loaded; empty if there are none.
std::string greedy_list(const std::vector<Record>& records);

/// What wrapping each model cost, and why it allows no more than it does.
std::string wrap_table(const std::vector<WrapCost>& costs);

}  // namespace llmcache::bench
