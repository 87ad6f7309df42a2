// Reads the JSON of an exported program: what must be there is, and is of the type expected.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace llmcache::exported {

using Json = nlohmann::json;

/// A program that is whole, but that the library does not take. The text says what it has, where, and what to change
/// in the export.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Parses a file of an exported archive. Throws DamagedData that begins with `subject`.
Json parse_json(std::string_view text, std::string_view subject);

/// What a union holds, which has no key of its own; fields are read by JsonObject. Each throws DamagedData that names
/// `subject` if it is of another type.
const std::string& text_of(const Json& value, const std::string& subject);
std::int64_t whole_of(const Json& value, const std::string& subject);
/// A number; also the texts that stand for those which JSON lacks ("Infinity", "-Infinity", "NaN").
double number_of(const Json& value, const std::string& subject);
/// A size, stride or offset of a stored tensor, which is a number from 0 on: {"as_int": 3}.
std::int64_t fixed_size(const Json& value, const std::string& subject);

/// The one member of a union such as {"as_tensor": {"name": "x"}}: its kind and what is in it.
std::pair<const std::string&, const Json&> only_member(const Json& value, const std::string& subject);

}  // namespace llmcache::exported
