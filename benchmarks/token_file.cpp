#include "token_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "failure.h"
#include "files.h"
#include "store/damaged_data.h"
#include "store/safetensors.h"

namespace llmcache::bench {
namespace {

constexpr const char* kKind = "token file";

/// Offsets must start at 0, rise, and end at `total`.
void check_offsets(const std::vector<std::int64_t>& offsets, std::size_t total, const std::string& tensor,
                   const Safetensors& file) {
  if (offsets.size() < 2) file.damaged(fmt::format("{} has {} entries, expected 2 or more", tensor, offsets.size()));
  if (offsets.front() != 0) file.damaged(fmt::format("{} starts at {}, not at 0", tensor, offsets.front()));
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] <= offsets[i - 1]) {
      file.damaged(fmt::format("{}[{}] is {} after {}: they must rise", tensor, i, offsets[i], offsets[i - 1]));
    }
  }
  if (static_cast<std::uint64_t>(offsets.back()) != total) {
    file.damaged(fmt::format("{} ends at {}, expected {}", tensor, offsets.back(), total));
  }
}

/// By Task, as in the metadata.
constexpr std::array<const char*, 8> kTasks = {"",       "classification", "choice",     "perplexity",
                                               "answer", "similarity",     "duplicates", "generation"};

Task task_from(const std::string& text, const Safetensors& in) {
  const auto found = std::ranges::find(kTasks, text);
  if (found != kTasks.end()) return static_cast<Task>(found - kTasks.begin());
  in.damaged(fmt::format("its task is '{}', expected one of{}", text, fmt::join(kTasks, " ")));
}

/// Every value must lie in [low, high].
void check_range(const std::vector<std::int64_t>& values, std::int64_t low, std::int64_t high,
                 const std::string& tensor, const Safetensors& in) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < low || values[i] > high) {
      in.damaged(fmt::format("{}[{}] is {}, expected {} to {}", tensor, i, values[i], low, high));
    }
  }
}

/// An optional tensor of whole numbers: one for each of what `unit` says, from `low` to `high`.
struct NumberTensor {
  const char* tensor;
  std::vector<std::int64_t> TokenFile::*field;
  const char* unit;
  std::int64_t low = std::numeric_limits<std::int64_t>::min();
  std::int64_t high = std::int64_t{1} << 40;
  bool pairs = false;  ///< of pairs, one of which is in the fill part: -1 there, 0 or more behind it
};
constexpr NumberTensor kNumberTensors[] = {
    {"labels", &TokenFile::labels, "sequence"},
    {"group", &TokenFile::group, "request", -1},
    {"partner", &TokenFile::partner, "request", -1, -1, true},  // up to the last one of the fill part
    {"pair_label", &TokenFile::pair_label, "request", -1, 1, true},
    {"pool", &TokenFile::pool, "token", 0, 1},
    {"scored_bytes", &TokenFile::scored_bytes, "sequence", 1}};

/// Reads the optional tensors of version "2" and checks them against the sequences, which are read.
class TaskReader {
 public:
  TaskReader(const Safetensors& in, TokenFile& file) : in_(in), file_(file) {}

  void read() {
    file_.task = task_from(in_.optional_text("task").value_or(""), in_);
    number("fill_requests", file_.fill_requests);
    number("new_tokens", file_.new_tokens);
    number("stop_token", file_.stop_token);
    if (file_.fill_requests >= file_.requests()) {
      in_.damaged(fmt::format("its fill_requests is {} of {} requests: none is left to ask", file_.fill_requests,
                              file_.requests()));
    }
    if (in_.optional_text("label_names")) file_.label_names = in_.text_list("label_names");
    for (const NumberTensor& one : kNumberTensors) read_numbers(one);
    file_.scored = ranges("scored");
    file_.passage = ranges("passage");
    read_answer_texts();
    read_pair_scores();
    check_needs();
    check_task();
  }

 private:
  void number(const char* key, std::int64_t& value) const {
    if (in_.optional_text(key)) value = in_.whole_number(key);
  }

  void read_numbers(const NumberTensor& one) {
    if (!in_.has(one.tensor)) return;
    auto& values = file_.*one.field;
    values = in_.values<std::int64_t>(one.tensor);
    const std::string unit = one.unit;
    check_count(one.tensor, values.size(),
                unit == "token"      ? std::ssize(file_.tokens)
                : unit == "sequence" ? file_.sequences()
                                     : file_.requests(),
                unit);
    check_range(values, one.low, one.field == &TokenFile::partner ? file_.fill_requests - 1 : one.high, one.tensor,
                in_);
    for (std::size_t i = 0; one.pairs && i < values.size(); ++i) {
      const bool fill = static_cast<std::int64_t>(i) < file_.fill_requests;
      if (fill ? values[i] == -1 : values[i] >= 0) continue;
      in_.damaged(fmt::format("{}[{}] is {}, expected {}", one.tensor, i, values[i],
                              fill ? "-1 in the fill part" : "0 or more behind the fill part"));
    }
  }

  void check_count(const std::string& tensor, std::size_t found, std::int64_t expected, const std::string& unit) const {
    if (static_cast<std::int64_t>(found) != expected) {
      in_.damaged(fmt::format("{} has {} entries, expected {}, one a {}", tensor, found, expected, unit));
    }
  }

  /// One range of tokens for each sequence, behind its first token; empty without the tensor.
  [[nodiscard]] std::vector<TokenRange> ranges(const std::string& tensor) const {
    if (!in_.has(tensor)) return {};
    std::vector<std::int64_t> shape;
    const auto values = in_.values<std::int64_t>(tensor, 2, &shape);
    check_count(tensor, static_cast<std::size_t>(shape[0]), file_.sequences(), "sequence");
    if (shape[1] != 2) in_.damaged(fmt::format("{} has {} columns, expected begin and end", tensor, shape[1]));
    std::vector<TokenRange> found;
    for (auto value = values.begin(); value != values.end(); value += 2) {
      const TokenRange range{value[0], value[1]};
      const std::int64_t length = std::ssize(file_.sequence(std::ssize(found)));
      if (range.begin < 1 || range.end < range.begin || range.end > length) {
        in_.damaged(fmt::format("{}[{}] is tokens {} to {}, expected a part of 1 to {}", tensor, found.size(),
                                range.begin, range.end, length));
      }
      found.push_back(range);
    }
    return found;
  }

  void read_answer_texts() {
    if (file_.passage.empty()) return;
    read_texts("token_text", std::ssize(file_.tokens), file_.token_text, file_.token_text_offsets);
    read_texts("gold", file_.requests(), file_.gold, file_.gold_offsets);
    // Each request is one question.
    if (file_.sequences() != file_.requests()) in_.damaged("it has passages, and requests of several sequences");
    for (std::int64_t i = 0; i < file_.requests(); ++i) {
      const std::string_view gold = file_.gold_answers(i);
      if (!gold.empty() && gold.back() != '\n') {
        in_.damaged(fmt::format("gold of request {} does not end in a newline", i));
      }
    }
  }

  /// Bytes, and where each of `count` texts is in them.
  void read_texts(const std::string& tensor, std::int64_t count, std::string& bytes,
                  std::vector<std::int64_t>& offsets) const {
    bytes = in_.tensor(tensor, "U8", 1).bytes;
    offsets = in_.values<std::int64_t>(tensor + "_offsets");
    check_count(tensor + "_offsets", offsets.size(), count + 1, "text and one more");
    if (!std::ranges::is_sorted(offsets) || offsets.front() != 0 || offsets.back() != std::ssize(bytes)) {
      in_.damaged(fmt::format("{}_offsets do not rise from 0 to the {} bytes of {}", tensor, bytes.size(), tensor));
    }
  }

  void read_pair_scores() {
    if (!in_.has("pair_score")) return;
    file_.pair_score = in_.values<float>("pair_score");
    check_count("pair_score", file_.pair_score.size(), file_.requests(), "request");
    for (std::size_t i = 0; i < file_.pair_score.size(); ++i) {
      if (!std::isfinite(file_.pair_score[i])) in_.damaged(fmt::format("pair_score[{}] is not finite", i));
    }
  }

  /// What each task needs.
  void check_needs() const {
    const std::tuple<Task, const char*, bool> needs[] = {
        {Task::kClassification, "labels", !file_.labels.empty()},
        {Task::kClassification, "label_names", !file_.label_names.empty()},
        {Task::kChoice, "labels", !file_.labels.empty()},
        {Task::kChoice, "scored", !file_.scored.empty()},
        {Task::kPerplexity, "scored", !file_.scored.empty()},
        {Task::kAnswer, "group", !file_.group.empty()},
        {Task::kSimilarity, "pair_score", !file_.pair_score.empty()},
        {Task::kDuplicates, "partner", !file_.partner.empty()},
        {Task::kDuplicates, "pair_label", !file_.pair_label.empty()},
        {Task::kDuplicates, "fill_requests", file_.fill_requests > 0},
        {Task::kGeneration, "new_tokens", file_.new_tokens > 0},
    };
    for (const auto& [task, what, there] : needs) {
      if (task == file_.task && !there) {
        in_.damaged(fmt::format("its task is '{}' and it has no {}", to_string(task), what));
      }
    }
  }

  void check_task() const {
    if (file_.task == Task::kClassification) {
      check_range(file_.labels, 0, std::ssize(file_.label_names) - 1, "labels", in_);
    } else if (file_.task == Task::kChoice) {
      check_range(file_.labels, 0, 1, "labels", in_);
      for (std::int64_t r = file_.fill_requests; r < file_.requests(); ++r) check_choices(r);
    } else if (file_.task == Task::kSimilarity) {
      check_rows(file_.fill_requests, 2, "the two of a pair");
    } else if (file_.task == Task::kDuplicates) {
      check_rows(0, 1, "one of a pair");
    } else if (file_.task == Task::kGeneration && file_.fill_requests > 0) {
      in_.damaged("its task is 'generation', and it has requests that only fill");
    }
  }

  /// All requests from `begin` on must have `count` sequences.
  void check_rows(std::int64_t begin, std::int64_t count, const char* expected) const {
    for (std::int64_t r = begin; r < file_.requests(); ++r) {
      const std::int64_t rows = file_.first_sequence(r + 1) - file_.first_sequence(r);
      if (rows != count) in_.damaged(fmt::format("request {} has {} sequences, expected {}", r, rows, expected));
    }
  }

  void check_choices(std::int64_t request) const {
    std::int64_t right = 0;
    for (std::int64_t s = file_.first_sequence(request); s < file_.first_sequence(request + 1); ++s) {
      const auto i = static_cast<std::size_t>(s);
      right += file_.labels[i];
      if (file_.scored[i].begin == file_.scored[i].end) in_.damaged(fmt::format("scored[{}] is empty", s));
    }
    if (right != 1) in_.damaged(fmt::format("request {} has {} right choices, expected one", request, right));
  }

  const Safetensors& in_;
  TokenFile& file_;
};

TokenFile parse(const Safetensors& in) {
  const std::string version = in.text("version");
  if (version != "1" && version != "2") in.damaged(fmt::format("it has version '{}', expected '1' or '2'", version));
  TokenFile file;
  file.workload = in.text("workload");
  file.tokenizer = in.text("tokenizer");
  file.source = in.text("source");
  file.description = in.text("description");
  file.order = in.text("order");
  file.max_tokens = in.whole_number("max_tokens");
  file.tokens = in.values<std::int32_t>("tokens");
  file.sequence_offsets = in.values<std::int64_t>("sequence_offsets");
  file.request_offsets = in.values<std::int64_t>("request_offsets");
  check_offsets(file.sequence_offsets, file.tokens.size(), "sequence_offsets", in);
  check_offsets(file.request_offsets, file.sequence_offsets.size() - 1, "request_offsets", in);
  const auto negative = std::ranges::find_if(file.tokens, [](std::int32_t id) { return id < 0; });
  if (negative != file.tokens.end()) {
    in.damaged(fmt::format("token {} is {}, ids are 0 or more", negative - file.tokens.begin(), *negative));
  }
  if (version == "2") TaskReader(in, file).read();
  return file;
}

}  // namespace

const char* to_string(Task task) noexcept { return kTasks[static_cast<std::size_t>(task)]; }

std::span<const std::int32_t> TokenFile::sequence(std::int64_t i) const {
  const auto index = static_cast<std::size_t>(i);
  const auto begin = static_cast<std::size_t>(sequence_offsets[index]);
  return std::span(tokens).subspan(begin, static_cast<std::size_t>(sequence_offsets[index + 1]) - begin);
}

std::vector<std::span<const std::int32_t>> TokenFile::request(std::int64_t i, std::int64_t limit) const {
  std::vector<std::span<const std::int32_t>> rows;
  for (std::int64_t s = first_sequence(i); s < first_sequence(i + 1); ++s) {
    const auto whole = sequence(s);
    rows.push_back(whole.first(std::min(whole.size(), static_cast<std::size_t>(limit))));
  }
  return rows;
}

std::vector<RowMarks> TokenFile::marks(std::int64_t i, std::int64_t limit) const {
  if (pool.empty() && passage.empty()) return {};
  std::vector<RowMarks> rows;
  for (const auto& ids : request(i, limit)) {
    const auto s = static_cast<std::size_t>(first_sequence(i)) + rows.size();
    RowMarks& row = rows.emplace_back();
    if (!pool.empty()) row.pool = std::span(pool).subspan(static_cast<std::size_t>(sequence_offsets[s]), ids.size());
    if (!passage.empty()) row.second_text = passage[s].begin;
  }
  return rows;
}

std::string_view TokenFile::text(std::int64_t i, TokenRange range) const {
  const std::int64_t first = sequence_offsets[static_cast<std::size_t>(i)];
  const auto begin = token_text_offsets[static_cast<std::size_t>(first + range.begin)];
  const auto end = token_text_offsets[static_cast<std::size_t>(first + range.end)];
  return std::string_view(token_text).substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
}

std::string_view TokenFile::gold_answers(std::int64_t i) const {
  const auto begin = static_cast<std::size_t>(gold_offsets[static_cast<std::size_t>(i)]);
  const auto end = static_cast<std::size_t>(gold_offsets[static_cast<std::size_t>(i) + 1]);
  return std::string_view(gold).substr(begin, end - begin);
}

std::int64_t TokenFile::first_request_from(std::int64_t sequence) const {
  const auto found = std::lower_bound(request_offsets.begin(), request_offsets.end(), sequence);
  return std::min<std::int64_t>(found - request_offsets.begin(), requests());
}

bool TokenFile::grouped_by_label() const { return order.find("grouped by label") != std::string::npos; }

TokenFile parse_token_file(std::string_view bytes, const std::string& name) {
  try {
    return parse(Safetensors(bytes));
  } catch (const DamagedData& error) {
    refuse_data(name, kKind, error.what());
  }
}

TokenFile read_token_file(const std::filesystem::path& path) {
  const std::string bytes = read_file(path, kKind);
  return parse_token_file(bytes, path.string());
}

TokenFile in_batches_of(TokenFile file, std::int64_t rows) {
  const bool independent = (file.task == Task::kNone || file.task == Task::kClassification) && file.scored.empty() &&
                           file.group.empty() && file.partner.empty() && file.pair_score.empty();
  if (!independent) {
    throw Failure(
        fmt::format("--batch {}: the requests of {} are more than independent sequences, and stay as they are", rows,
                    file.workload));
  }
  const std::int64_t asked_from = file.first_sequence(file.fill_requests);
  std::vector<std::int64_t> offsets = {0};
  while (offsets.back() < asked_from) offsets.push_back(std::min(offsets.back() + rows, asked_from));
  file.fill_requests = std::ssize(offsets) - 1;
  while (offsets.back() < file.sequences()) offsets.push_back(std::min(offsets.back() + rows, file.sequences()));
  file.request_offsets = std::move(offsets);
  return file;
}

void check_vocabulary(const TokenFile& file, std::int64_t vocabulary, const std::string& name) {
  const std::int32_t largest = *std::ranges::max_element(file.tokens);
  if (largest >= vocabulary) {
    throw Failure(
        fmt::format("{}: it has token id {}, the model knows ids below {}; use the data of the model's own "
                    "tokenizer",
                    name, largest, vocabulary));
  }
}

}  // namespace llmcache::bench
