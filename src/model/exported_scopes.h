// The flat graph of an exported program as calls of modules again, by what each node says of the modules it ran in.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "model/exported_program.h"

namespace llmcache::exported {

/// A call of a module: a range of nodes, some of which belong to calls of modules in it.
struct Scope {
  std::string path;          ///< of the module
  std::size_t begin = 0;     ///< its first node
  std::size_t end = 0;       ///< behind its last node
  std::vector<Scope> calls;  ///< in order; what is between them is the module's own
};

/// The call of the whole program. A module's nodes need not be side by side: what stands between the first and the last
/// of a call belongs to it, unless two calls then overlap, which are dissolved into the call around them. Throws
/// Refused where too many do.
Scope scopes_of(const Program& program);

/// Which values a range of nodes takes from elsewhere, and which of its own are used behind it.
class ValueFlow {
 public:
  explicit ValueFlow(const Program& program);
  [[nodiscard]] std::vector<ValueId> taken(const Scope& scope) const;  ///< in the order of first use
  [[nodiscard]] std::vector<ValueId> given(const Scope& scope) const;

 private:
  const Program& program_;
  std::vector<std::size_t> made_;  ///< by which node, counted from 1; 0: an input
  std::vector<std::size_t> last_;  ///< place of the last use; one more than there are nodes: the result
};

/// The values that a node uses, in order.
std::vector<ValueId> values_in(const Node& node);

}  // namespace llmcache::exported
