#include <algorithm>

#include "check.h"
#include "model/exported_guard.h"
#include "model/exported_json.h"
#include "model/exported_program.h"
#include "model/exported_scopes.h"
#include "model/exported_weights.h"
#include "store/damaged_data.h"

namespace llmcache::fuzz {
namespace {

using exported::Program;
using exported::Scope;

/// Runs a reader, which may refuse what it reads.
template <class Read>
void may_refuse(const Read& read) {
  try {
    read();
  } catch (const DamagedData&) {
  } catch (const exported::Refused&) {
  }
}

void check_result(const Program& program, const exported::Result& result) {
  require(!result.value || (!result.tuple && *result.value < program.values.size()), "the result is no value");
  for (const auto& part : result.parts) check_result(program, part);
}

void check_scope(const Program& program, const exported::ValueFlow& flow, const Scope& scope) {
  require(scope.begin <= scope.end && scope.end <= program.nodes.size(), "a call of nodes that are not there");
  for (const auto id : flow.taken(scope)) require(id < program.values.size(), "a call takes no value");
  for (const auto id : flow.given(scope)) require(id < program.values.size(), "a call gives no value");
  std::size_t last = scope.begin;
  for (const Scope& call : scope.calls) {
    require(call.begin >= last && call.begin < call.end && call.end <= scope.end, "calls overlap");
    require(call.path.size() > scope.path.size(), "a call of a module that is not below its caller");
    last = call.end;
    check_scope(program, flow, call);
  }
}

void check_program(std::string_view bytes) {
  const Program program = exported::parse_program(bytes);
  for (const auto& node : program.nodes) {
    for (const auto id : exported::values_in(node)) require(id < program.values.size(), "a node uses no value");
    for (const auto frame : node.frames) require(frame < program.frames.size(), "a node in no module");
  }
  for (const auto& range : program.tokens) {
    require(range.most >= 0, "a negative number of tokens");
    require(range.group < program.tokens.size(), "an input of no group");
  }
  check_result(program, program.result);
  check_scope(program, exported::ValueFlow(program), exported::scopes_of(program));
}

}  // namespace

void check_exported(std::string_view bytes) {
  may_refuse([&] { check_program(bytes); });
  may_refuse([&] {
    for (const auto& [name, tensor] : exported::parse_weights(bytes)) {
      require(exported::numbers_needed(tensor) >= 0, "a weight of a negative size");
      require(std::all_of(tensor.sizes.begin(), tensor.sizes.end(), [](auto size) { return size >= 0; }),
              "a weight of a negative size");
    }
  });
  if (const auto guard = exported::ShapeGuard::parse(bytes)) {
    for (const std::int64_t tokens : {2, 3, 1 << 20}) {
      require(guard->verdict(2, tokens) == guard->verdict(2, tokens), "a guard holds now and then");
    }
  }
}

}  // namespace llmcache::fuzz
