#include <nlohmann/json.hpp>

#include "check.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::fuzz {
namespace {

using Json = nlohmann::json;

/// Runs a reader of a field, which may refuse it.
template <class Read>
void field(const Read& read) {
  try {
    read();
  } catch (const DamagedData&) {
  }
}

void read_fields(const JsonObject& object, int depth) {
  field([&] { require(!object.text("a").empty() || object.has("a"), "text of a field that is not there"); });
  field([&] { require(object.whole("a", -5, 5) >= -5 && object.whole("a", -5, 5) <= 5, "whole number out of range"); });
  field([&] { require(object.whole("a") >= 0, "negative count"); });
  field([&] { require(object.number("a", 0, 1) <= 1, "number out of range"); });
  field([&] {
    for (const double value : object.numbers("a")) require(value - value == 0, "number that is not finite");
  });
  field([&] {
    for (const auto value : object.wholes("a", 0, 7)) require(value <= 7, "whole number out of range");
  });
  field([&] { static_cast<void>(object.tables("a", -1, 1)); });
  if (depth == 0) return;
  field([&] { read_fields(object.object("a"), depth - 1); });
  field([&] {
    for (const JsonObject& one : object.objects("a")) read_fields(one, depth - 1);
  });
}

}  // namespace

void check_json(std::string_view bytes) {
  constexpr JsonLimits kLimits = {.bytes = 1 << 16, .depth = 6, .values = 4096};
  Json parsed;
  try {
    parsed = parse_bounded_json(bytes, kLimits);
  } catch (const DamagedData&) {
    return;
  }
  require(bytes.size() <= kLimits.bytes, "more bytes than allowed");
  require(Json::parse(bytes) == parsed, "another value than the library's own parser reads");
  require(parse_bounded_json(parsed.dump(), kLimits) == parsed, "another value when written and read again");
  field([&] { read_fields(JsonObject(parsed), 2); });
}

}  // namespace llmcache::fuzz
