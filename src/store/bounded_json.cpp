#include "store/bounded_json.h"

#include <fmt/core.h>

#include "store/damaged_data.h"

namespace llmcache {
namespace {

using Json = nlohmann::json;

/// Builds the value as the parser meets its parts. The library's own parser with a callback would do, but looks through
/// all of an object's or list's earlier members at the end of each one.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Builder(const JsonLimits& limits, std::string_view subject) : limits_(limits), subject_(subject) {}

  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t& /*digits*/) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t& /*value*/) override { refuse("has binary data"); }
  bool start_object(std::size_t /*size*/) override { return open(Json::object()); }
  bool end_object() override { return close(); }
  bool start_array(std::size_t /*size*/) override { return open(Json::array()); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    const auto [place, added] = open_.back()->get_ref<Json::object_t&>().emplace(name, nullptr);
    if (!added) refuse(fmt::format("has '{}' twice", shown(name)));
    member_ = &place->second;
    return true;
  }

  bool parse_error(std::size_t /*position*/, const std::string& /*last*/,
                   const nlohmann::detail::exception& error) override {
    refuse(fmt::format("is not JSON ({})", shown(error.what())));
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const { throw DamagedData(fmt::format("{} {}", subject_, what)); }

  /// Puts a value where it belongs. Its place stays: a list grows only while all that is in it is closed.
  Json* put(Json&& value) {
    if (++values_ > limits_.values) refuse(fmt::format("has more than {} values", limits_.values));
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_object()) {
      *member_ = std::move(value);
      return member_;
    }
    auto& list = open_.back()->get_ref<Json::array_t&>();
    list.push_back(std::move(value));
    return &list.back();
  }

  bool add(Json&& value) {
    put(std::move(value));
    return true;
  }

  bool open(Json&& value) {
    if (open_.size() == limits_.depth)
      refuse(fmt::format("is nested too deeply: {} levels are allowed", limits_.depth));
    open_.push_back(put(std::move(value)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  const JsonLimits& limits_;
  const std::string_view subject_;
  Json root_;
  std::vector<Json*> open_;  ///< lists and objects that have not ended, the innermost one last
  Json* member_ = nullptr;   ///< of the innermost object, whose value comes next
  std::size_t values_ = 0;
};

}  // namespace

std::string shown(std::string_view text) {
  constexpr std::size_t kMost = 60;
  return text.size() <= kMost ? std::string(text) : fmt::format("{}...", text.substr(0, kMost));
}

Json parse_bounded_json(std::string_view text, const JsonLimits& limits, std::string_view subject) {
  if (text.size() > limits.bytes) {
    throw DamagedData(fmt::format("{} has {} bytes, at most {} are expected", subject, text.size(), limits.bytes));
  }
  // To the parser it is the end of the text, whatever follows.
  if (text.find('\0') != std::string_view::npos)
    throw DamagedData(fmt::format("{} is not JSON (a byte of 0)", subject));
  Builder builder(limits, subject);
  Json::sax_parse(text, &builder);
  return builder.take();
}

JsonObject::JsonObject(const Json& value, std::string subject) : value_(&value), subject_(std::move(subject)) {
  if (!value.is_object()) throw DamagedData(fmt::format("{} is not a JSON object", subject_));
}

bool JsonObject::has(const char* key) const { return value_->contains(key); }

const Json& JsonObject::at(const char* key) const {
  const auto found = value_->find(key);
  if (found == value_->end()) throw DamagedData(fmt::format("{} has no '{}'", subject_, key));
  return *found;
}

const Json& JsonObject::list(const char* key) const {
  const Json& value = at(key);
  if (!value.is_array()) refuse(key, value, "a list");
  return value;
}

void JsonObject::refuse(const std::string& key, const Json& found, const std::string& expected) const {
  throw DamagedData(fmt::format("{} has '{}' {}; {} is expected", subject_, key,
                                found.is_structured() ? std::string(found.type_name()) : shown(found.dump()),
                                expected));
}

JsonObject JsonObject::object(const char* key) const { return JsonObject(at(key), fmt::format("its '{}'", key)); }

std::string JsonObject::text(const char* key) const {
  const Json& value = at(key);
  if (!value.is_string()) refuse(key, value, "text");
  return value.get<std::string>();
}

bool JsonObject::flag(const char* key) const {
  const Json& value = at(key);
  if (!value.is_boolean()) refuse(key, value, "true or false");
  return value.get<bool>();
}

std::int64_t JsonObject::whole_of(const std::string& key, const Json& value, std::int64_t low,
                                  std::int64_t high) const {
  const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(high)
                                               : value.is_number_integer();
  const auto found = fits ? value.get<std::int64_t>() : 0;
  if (!fits || found < low || found > high) refuse(key, value, fmt::format("a whole number from {} to {}", low, high));
  return found;
}

double JsonObject::number_of(const std::string& key, const Json& value, double low, double high) const {
  const double found = value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
  if (!(found >= low && found <= high)) {
    refuse(key, value, high == kAnyNumber ? "a finite number" : fmt::format("a number from {} to {}", low, high));
  }
  return found;
}

std::int64_t JsonObject::whole(const char* key, std::int64_t low, std::int64_t high) const {
  return whole_of(key, at(key), low, high);
}

double JsonObject::number(const char* key, double low, double high) const { return number_of(key, at(key), low, high); }

std::vector<double> JsonObject::numbers(const char* key, double low, double high) const {
  std::vector<double> numbers;
  for (const Json& value : list(key)) numbers.push_back(number_of(key, value, low, high));
  return numbers;
}

std::vector<std::int64_t> JsonObject::wholes(const char* key, std::int64_t low, std::int64_t high) const {
  std::vector<std::int64_t> wholes;
  for (const Json& value : list(key)) wholes.push_back(whole_of(key, value, low, high));
  return wholes;
}

std::vector<std::vector<double>> JsonObject::tables(const char* key, double low, double high) const {
  std::vector<std::vector<double>> tables;
  for (const Json& row : list(key)) {
    if (!row.is_array()) refuse(key, row, "a list of lists");
    auto& numbers = tables.emplace_back();
    for (const Json& value : row) numbers.push_back(number_of(key, value, low, high));
  }
  return tables;
}

std::vector<std::vector<std::int64_t>> JsonObject::whole_tables(const char* key, std::int64_t low,
                                                                std::int64_t high) const {
  std::vector<std::vector<std::int64_t>> tables;
  for (const Json& row : list(key)) {
    if (!row.is_array()) refuse(key, row, "a list of lists");
    auto& wholes = tables.emplace_back();
    for (const Json& value : row) wholes.push_back(whole_of(key, value, low, high));
  }
  return tables;
}

std::vector<std::string> JsonObject::texts(const char* key) const {
  std::vector<std::string> texts;
  for (const Json& value : list(key)) {
    if (!value.is_string()) refuse(key, value, "a list of texts");
    texts.push_back(value.get<std::string>());
  }
  return texts;
}

std::vector<JsonObject> JsonObject::objects(const char* key) const {
  std::vector<JsonObject> objects;
  for (const Json& value : list(key)) objects.emplace_back(value, fmt::format("its '{}'", key));
  return objects;
}

}  // namespace llmcache
