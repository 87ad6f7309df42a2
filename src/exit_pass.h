// A pass in which sequences leave early.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "execute/observer.h"
#include "exit_rules.h"

namespace llmcache {

/// Lets sequences leave where `rules` allow it, and asks the gates what to do with them. What BudgetOptions::scores
/// throws ends the pass.
class ExitPass final : public LayerObserver {
 public:
  struct Sequence {
    std::int32_t left = -1;  ///< in front of this layer
    at::Tensor answer;       ///< [values]; of a sequence that left
    double expected = 0;     ///< its error, by the gate
    bool stays = false;      ///< it is computed in full whatever could be reused
    std::size_t tried = 0;   ///< levels that have proposed something, from the most liberal one on
    std::vector<Trial> trials;
  };

  /// `background`: audited sequences leave all the same. `rules` must outlive it.
  ExitPass(ExitRules& rules, std::size_t sequences, bool background);

  bool watches(std::int32_t l) const override;
  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override;
  /// Tells the gates of the sequences that they had no proposal for. Once, behind a pass that did not fail.
  void close();

  [[nodiscard]] const std::vector<Sequence>& sequences() const noexcept { return sequences_; }

 private:
  /// Levels whose gates are told: the one that serves, and the closed ones before it.
  [[nodiscard]] std::size_t watched() const;
  bool leaves(Sequence& sequence, std::size_t l, double expected, const at::Tensor& answer);

  ExitRules& rules_;
  const bool background_;
  const std::size_t level_;
  std::vector<Sequence> sequences_;
};

}  // namespace llmcache
