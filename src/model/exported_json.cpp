#include "model/exported_json.h"

#include <fmt/core.h>

#include <limits>

#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

[[noreturn]] void expected(const std::string& subject, const std::string& what) {
  throw DamagedData(fmt::format("{} is not {}", subject, what));
}

}  // namespace

Json parse_json(std::string_view text, std::string_view subject) {
  // A graph of a hundred layers has some 10 MB. Graphs of higher-order operators nest deeply, and are refused by name.
  constexpr JsonLimits kLimits{.bytes = std::size_t{512} << 20, .depth = 128, .values = std::size_t{32} << 20};
  return parse_bounded_json(text, kLimits, subject);
}

const std::string& text_of(const Json& value, const std::string& subject) {
  if (!value.is_string()) expected(fmt::format("what {} holds", subject), "text");
  return value.get_ref<const std::string&>();
}

std::int64_t whole_of(const Json& value, const std::string& subject) {
  const bool too_large =
      value.is_number_unsigned() &&
      value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (!value.is_number_integer() || too_large) expected(fmt::format("what {} holds", subject), "a whole number");
  return value.get<std::int64_t>();
}

double number_of(const Json& value, const std::string& subject) {
  if (value.is_number()) return value.get<double>();
  const std::string& text = text_of(value, subject);
  if (text == "Infinity") return std::numeric_limits<double>::infinity();
  if (text == "-Infinity") return -std::numeric_limits<double>::infinity();
  if (text == "NaN") return std::numeric_limits<double>::quiet_NaN();
  expected(fmt::format("what {} holds", subject), "a number");
}

std::int64_t fixed_size(const Json& value, const std::string& subject) {
  return JsonObject(value, subject).whole("as_int");
}

std::pair<const std::string&, const Json&> only_member(const Json& value, const std::string& subject) {
  if (!value.is_object() || value.size() != 1) expected(subject, "an object with one member");
  return {value.begin().key(), value.begin().value()};
}

}  // namespace llmcache::exported
