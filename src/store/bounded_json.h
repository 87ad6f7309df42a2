// JSON from files that may be damaged or made to do harm: parsed in time that grows with their size, within limits, and
// read field by field with a range for every number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace llmcache {

/// Limits are far above what an honest file needs, and low enough that a parsed file takes some 100 MB at most.
struct JsonLimits {
  std::size_t bytes = std::size_t{16} << 20;  ///< of the text
  std::size_t depth = 8;                      ///< lists and objects in each other
  std::size_t values = std::size_t{1} << 20;  ///< lists, objects, and what is in them
};

/// Throws DamagedData if `text` is not JSON, goes beyond a limit, or has an object with one key twice. `subject` begins
/// its message ("its header is not JSON").
nlohmann::json parse_bounded_json(std::string_view text, const JsonLimits& limits = {},
                                  std::string_view subject = "it");

/// A text for messages: cut to some 60 characters.
std::string shown(std::string_view text);

/// An object whose fields are read one by one. Each reader throws DamagedData that names the field if it is missing, of
/// another type, or out of range. Refers to the value, which must live as long.
class JsonObject {
 public:
  static constexpr double kAnyNumber = std::numeric_limits<double>::max();

  /// `subject` begins the messages: "it", "its budget". Throws if `value` is no object.
  explicit JsonObject(const nlohmann::json& value, std::string subject = "it");

  [[nodiscard]] bool has(const char* key) const;
  /// Anything, and a list of anything.
  [[nodiscard]] const nlohmann::json& at(const char* key) const;
  [[nodiscard]] const nlohmann::json& list(const char* key) const;
  [[nodiscard]] JsonObject object(const char* key) const;
  [[nodiscard]] std::string text(const char* key) const;
  [[nodiscard]] bool flag(const char* key) const;
  /// A whole number, `low` to `high`.
  [[nodiscard]] std::int64_t whole(const char* key, std::int64_t low = 0,
                                   std::int64_t high = std::numeric_limits<std::int64_t>::max()) const;
  /// A finite number, `low` to `high`.
  [[nodiscard]] double number(const char* key, double low = -kAnyNumber, double high = kAnyNumber) const;
  /// A list of them.
  [[nodiscard]] std::vector<double> numbers(const char* key, double low = -kAnyNumber, double high = kAnyNumber) const;
  [[nodiscard]] std::vector<std::int64_t> wholes(const char* key, std::int64_t low = 0,
                                                 std::int64_t high = std::numeric_limits<std::int64_t>::max()) const;
  /// A list of lists of them.
  [[nodiscard]] std::vector<std::vector<double>> tables(const char* key, double low, double high) const;
  [[nodiscard]] std::vector<std::vector<std::int64_t>> whole_tables(const char* key, std::int64_t low,
                                                                    std::int64_t high) const;
  [[nodiscard]] std::vector<std::string> texts(const char* key) const;
  [[nodiscard]] std::vector<JsonObject> objects(const char* key) const;

 private:
  [[noreturn]] void refuse(const std::string& key, const nlohmann::json& found, const std::string& expected) const;
  [[nodiscard]] double number_of(const std::string& key, const nlohmann::json& value, double low, double high) const;
  [[nodiscard]] std::int64_t whole_of(const std::string& key, const nlohmann::json& value, std::int64_t low,
                                      std::int64_t high) const;

  const nlohmann::json* value_;
  std::string subject_;
};

}  // namespace llmcache
