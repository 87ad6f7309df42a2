#include "model/exported_scopes.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <unordered_set>

#include "model/exported_json.h"

namespace llmcache::exported {
namespace {

bool is_below(const std::string& path, const std::string& owner) {
  if (path.empty()) return false;
  return owner.empty() ||
         (path.size() > owner.size() && path.compare(0, owner.size(), owner) == 0 && path[owner.size()] == '.');
}

class ScopeBuilder {
 public:
  explicit ScopeBuilder(const Program& program)
      : program_(program), looks_(kRounds * (program.nodes.size() + program.frames.size())) {}

  Scope build() {
    Scope root{"", 0, program_.nodes.size(), {}};
    fill(root, {});
    return root;
  }

 private:
  struct Span {
    std::size_t frame;
    std::size_t begin;
    std::size_t end;
  };

  /// The call that a node is in, one level below `around`; none if it is the own work of the last of these.
  [[nodiscard]] std::optional<std::size_t> next_frame(const Node& node, const std::vector<std::size_t>& around,
                                                      const std::string& path) const {
    auto from = node.frames.begin();
    for (const std::size_t frame : around) {
      from = std::find(from, node.frames.end(), frame);
      if (from == node.frames.end()) return std::nullopt;  // a stranger between the nodes of the call
      ++from;
    }
    for (; from != node.frames.end(); ++from) {
      if (is_below(program_.frames[*from].path, path) && dissolved_.count(*from) == 0) return *from;
    }
    return std::nullopt;
  }

  [[nodiscard]] std::vector<Span> spans(const Scope& scope, const std::vector<std::size_t>& around) {
    const std::size_t nodes = scope.end - scope.begin;
    if (nodes > looks_) {
      throw Refused("the calls of its modules overlap each other in too many ways: call each module as a whole");
    }
    looks_ -= nodes;
    std::map<std::size_t, Span> found;
    for (std::size_t i = scope.begin; i < scope.end; ++i) {
      const auto frame = next_frame(program_.nodes[i], around, scope.path);
      if (!frame) continue;
      const auto [span, added] = found.try_emplace(*frame, Span{*frame, i, i + 1});
      span->second.end = i + 1;
    }
    std::vector<Span> ordered;
    for (const auto& [frame, span] : found) ordered.push_back(span);
    std::sort(ordered.begin(), ordered.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    return ordered;
  }

  void fill(Scope& scope, const std::vector<std::size_t>& around) {
    std::vector<Span> ordered = spans(scope, around);
    for (bool overlap = true; overlap;) {
      overlap = false;
      std::size_t last = 0;  // which of those before reaches farthest
      for (std::size_t i = 1; i < ordered.size(); ++i) {
        if (ordered[i].begin < ordered[last].end) {
          dissolved_.insert({ordered[i].frame, ordered[last].frame});
          overlap = true;
        }
        if (ordered[i].end > ordered[last].end) last = i;
      }
      if (overlap) ordered = spans(scope, around);
    }
    for (const Span& span : ordered) {
      Scope& call = scope.calls.emplace_back(Scope{program_.frames[span.frame].path, span.begin, span.end, {}});
      auto deeper = around;
      deeper.push_back(span.frame);
      fill(call, deeper);
    }
  }

  /// Each level of calls looks at all of its nodes, again whenever calls were dissolved: some ten times in all.
  static constexpr std::size_t kRounds = 100;

  const Program& program_;
  std::size_t looks_;  ///< at nodes that are left, so that no file keeps the reader busy
  std::unordered_set<std::size_t> dissolved_;
};

}  // namespace

Scope scopes_of(const Program& program) { return ScopeBuilder(program).build(); }

std::vector<ValueId> values_in(const Node& node) {
  std::vector<ValueId> values;
  for (const auto& [name, argument] : node.inputs) {
    for (const Item& item : argument.items) {
      if (const auto* value = std::get_if<ValueRef>(&item)) values.push_back(value->id);
    }
  }
  return values;
}

ValueFlow::ValueFlow(const Program& program)
    : program_(program), made_(program.values.size(), 0), last_(program.values.size(), 0) {
  for (std::size_t i = 0; i < program.nodes.size(); ++i) {
    for (const ValueId value : values_in(program.nodes[i])) last_[value] = i;
    for (const Output& output : program.nodes[i].outputs) {
      for (const ValueId value : output.values) made_[value] = i + 1;
    }
  }
  const std::function<void(const Result&)> keep = [&](const Result& result) {
    if (result.value) last_[*result.value] = program.nodes.size() + 1;
    for (const Result& part : result.parts) keep(part);
  };
  keep(program.result);
}

std::vector<ValueId> ValueFlow::taken(const Scope& scope) const {
  std::vector<ValueId> values;
  std::unordered_set<ValueId> seen;
  for (std::size_t i = scope.begin; i < scope.end; ++i) {
    for (const ValueId value : values_in(program_.nodes[i])) {
      if (made_[value] <= scope.begin && seen.insert(value).second) values.push_back(value);
    }
  }
  return values;
}

std::vector<ValueId> ValueFlow::given(const Scope& scope) const {
  std::vector<ValueId> values;
  for (std::size_t i = scope.begin; i < scope.end; ++i) {
    for (const Output& output : program_.nodes[i].outputs) {
      for (const ValueId value : output.values) {
        if (last_[value] >= scope.end) values.push_back(value);
      }
    }
  }
  return values;
}

}  // namespace llmcache::exported
