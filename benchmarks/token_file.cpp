#include "token_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "data_file.h"
#include "failure.h"
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

constexpr std::array kTasks = {Task::kNone,   Task::kClassification, Task::kChoice,     Task::kPerplexity,
                               Task::kAnswer, Task::kSimilarity,     Task::kDuplicates, Task::kGeneration};

Task task_from(const std::string& text, const Safetensors& in) {
  const auto found = std::ranges::find_if(kTasks, [&](Task task) { return to_string(task) == text; });
  if (found == kTasks.end()) {
    in.damaged(
        fmt::format("its task is '{}', expected classification, choice, perplexity, answer, similarity, "
                    "duplicates, generation or nothing",
                    text));
  }
  return *found;
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

/// Reads the optional tensors of version "2" and checks them against the sequences, which are read.
class TaskReader {
 public:
  TaskReader(const Safetensors& in, TokenFile& file) : in_(in), file_(file) {}

  void read() {
    file_.task = task_from(in_.optional_text("task").value_or(""), in_);
    if (in_.optional_text("fill_requests")) file_.fill_requests = in_.whole_number("fill_requests");
    if (file_.fill_requests >= file_.requests()) {
      in_.damaged(fmt::format("its fill_requests is {} of {} requests: none is left to ask", file_.fill_requests,
                              file_.requests()));
    }
    if (in_.optional_text("new_tokens")) file_.new_tokens = in_.whole_number("new_tokens");
    if (in_.optional_text("stop_token")) file_.stop_token = in_.whole_number("stop_token");
    if (in_.optional_text("label_names")) file_.label_names = in_.text_list("label_names");
    file_.labels = optional("labels", file_.sequences(), "sequence");
    file_.group = optional("group", file_.requests(), "request");
    file_.partner = optional("partner", file_.requests(), "request");
    file_.pair_label = optional("pair_label", file_.requests(), "request");
    file_.pool = optional("pool", static_cast<std::int64_t>(file_.tokens.size()), "token");
    file_.scored_bytes = optional("scored_bytes", file_.sequences(), "sequence");
    check_range(file_.scored_bytes, 1, std::int64_t{1} << 40, "scored_bytes", in_);
    for (const std::int64_t mark : file_.pool) {
      if (mark != 0 && mark != 1) in_.damaged(fmt::format("pool has the value {}, expected 0 or 1", mark));
    }
    read_scored();
    read_pair_scores();
    check_range(file_.group, -1, std::int64_t{1} << 40, "group", in_);
    check_pairs();
    check_task();
  }

 private:
  std::vector<std::int64_t> optional(const std::string& tensor, std::int64_t count, const std::string& unit) const {
    if (!in_.has(tensor)) return {};
    auto values = in_.values<std::int64_t>(tensor);
    check_count(tensor, static_cast<std::int64_t>(values.size()), count, unit);
    return values;
  }

  void check_count(const std::string& tensor, std::int64_t found, std::int64_t expected,
                   const std::string& unit) const {
    if (found != expected) {
      in_.damaged(fmt::format("{} has {} entries, expected {}, one a {}", tensor, found, expected, unit));
    }
  }

  void read_scored() {
    if (!in_.has("scored")) return;
    std::vector<std::int64_t> shape;
    const auto values = in_.values<std::int64_t>("scored", 2, &shape);
    check_count("scored", shape[0], file_.sequences(), "sequence");
    if (shape[1] != 2) in_.damaged(fmt::format("scored has {} columns, expected begin and end", shape[1]));
    for (std::int64_t i = 0; i < shape[0]; ++i) {
      const auto at = static_cast<std::size_t>(2 * i);
      const TokenRange range{values[at], values[at + 1]};
      const auto length = static_cast<std::int64_t>(file_.sequence(i).size());
      if (range.begin < 1 || range.end < range.begin || range.end > length) {
        in_.damaged(fmt::format("scored[{}] is tokens {} to {}, expected a part of 1 to {}", i, range.begin, range.end,
                                length));
      }
      file_.scored.push_back(range);
    }
  }

  void read_pair_scores() {
    if (!in_.has("pair_score")) return;
    file_.pair_score = in_.values<float>("pair_score");
    check_count("pair_score", static_cast<std::int64_t>(file_.pair_score.size()), file_.requests(), "request");
    for (std::size_t i = 0; i < file_.pair_score.size(); ++i) {
      if (!std::isfinite(file_.pair_score[i])) in_.damaged(fmt::format("pair_score[{}] is not finite", i));
    }
  }

  void check_pairs() const {
    check_range(file_.partner, -1, file_.fill_requests - 1, "partner", in_);
    check_range(file_.pair_label, -1, 1, "pair_label", in_);
    const auto fill = static_cast<std::size_t>(file_.fill_requests);
    for (const auto* values : {&file_.partner, &file_.pair_label}) {
      const char* tensor = values == &file_.partner ? "partner" : "pair_label";
      for (std::size_t i = 0; i < values->size(); ++i) {
        if (i < fill ? (*values)[i] != -1 : (*values)[i] < 0) {
          in_.damaged(fmt::format("{}[{}] is {}, expected {}", tensor, i, (*values)[i],
                                  i < fill ? "-1 in the fill part" : "0 or more behind the fill part"));
        }
      }
    }
  }

  void need(bool there, const char* what) const {
    if (!there) in_.damaged(fmt::format("its task is '{}' and it has no {}", in_.text("task"), what));
  }

  void check_task() const {
    switch (file_.task) {
      case Task::kNone:
        break;
      case Task::kClassification:
        need(!file_.labels.empty(), "labels");
        need(!file_.label_names.empty(), "label_names");
        check_range(file_.labels, 0, static_cast<std::int64_t>(file_.label_names.size()) - 1, "labels", in_);
        break;
      case Task::kChoice:
        need(!file_.labels.empty(), "labels");
        need(!file_.scored.empty(), "scored");
        check_range(file_.labels, 0, 1, "labels", in_);
        for (std::int64_t r = file_.fill_requests; r < file_.requests(); ++r) check_choices(r);
        break;
      case Task::kPerplexity:
        need(!file_.scored.empty(), "scored");
        break;
      case Task::kAnswer:
        need(!file_.group.empty(), "group");
        break;
      case Task::kSimilarity:
        need(!file_.pair_score.empty(), "pair_score");
        for (std::int64_t r = file_.fill_requests; r < file_.requests(); ++r) {
          const std::int64_t rows = file_.first_sequence(r + 1) - file_.first_sequence(r);
          if (rows != 2) in_.damaged(fmt::format("request {} has {} sequences, expected the two of a pair", r, rows));
        }
        break;
      case Task::kDuplicates:
        need(!file_.partner.empty(), "partner");
        need(!file_.pair_label.empty(), "pair_label");
        need(file_.fill_requests > 0, "fill_requests");
        for (std::int64_t r = 0; r < file_.requests(); ++r) {
          const std::int64_t rows = file_.first_sequence(r + 1) - file_.first_sequence(r);
          if (rows != 1) in_.damaged(fmt::format("request {} has {} sequences, expected one of a pair", r, rows));
        }
        break;
      case Task::kGeneration:
        need(file_.new_tokens > 0, "new_tokens");
        if (file_.fill_requests > 0) in_.damaged("its task is 'generation', and it has requests that only fill");
        break;
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
  const auto negative = std::find_if(file.tokens.begin(), file.tokens.end(), [](std::int32_t id) { return id < 0; });
  if (negative != file.tokens.end()) {
    in.damaged(fmt::format("token {} is {}, ids are 0 or more", negative - file.tokens.begin(), *negative));
  }
  if (version == "2") TaskReader(in, file).read();
  return file;
}

}  // namespace

const char* to_string(Task task) noexcept {
  switch (task) {
    case Task::kNone:
      return "";
    case Task::kClassification:
      return "classification";
    case Task::kChoice:
      return "choice";
    case Task::kPerplexity:
      return "perplexity";
    case Task::kAnswer:
      return "answer";
    case Task::kSimilarity:
      return "similarity";
    case Task::kDuplicates:
      return "duplicates";
    case Task::kGeneration:
      return "generation";
  }
  return "";
}

std::span<const std::int32_t> TokenFile::sequence(std::int64_t i) const {
  const auto index = static_cast<std::size_t>(i);
  const auto begin = static_cast<std::size_t>(sequence_offsets[index]);
  return std::span(tokens).subspan(begin, static_cast<std::size_t>(sequence_offsets[index + 1]) - begin);
}

std::vector<std::span<const std::int32_t>> TokenFile::request(std::int64_t i, std::int64_t limit) const {
  const auto index = static_cast<std::size_t>(i);
  std::vector<std::span<const std::int32_t>> rows;
  for (std::int64_t s = request_offsets[index]; s < request_offsets[index + 1]; ++s) {
    const auto whole = sequence(s);
    rows.push_back(whole.first(std::min(whole.size(), static_cast<std::size_t>(limit))));
  }
  return rows;
}

std::vector<std::span<const std::int64_t>> TokenFile::pools(std::int64_t i, std::int64_t limit) const {
  std::vector<std::span<const std::int64_t>> rows;
  if (pool.empty()) return rows;
  const auto index = static_cast<std::size_t>(i);
  for (auto s = static_cast<std::size_t>(request_offsets[index]);
       s < static_cast<std::size_t>(request_offsets[index + 1]); ++s) {
    const auto begin = static_cast<std::size_t>(sequence_offsets[s]);
    const auto tokens_of = static_cast<std::size_t>(sequence_offsets[s + 1]) - begin;
    rows.push_back(std::span(pool).subspan(begin, std::min(tokens_of, static_cast<std::size_t>(limit))));
  }
  return rows;
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
  const std::int64_t parts[] = {0, file.first_sequence(file.fill_requests), file.sequences()};
  std::vector<std::int64_t> offsets = {0};
  const auto add = [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) offsets.push_back(begin = std::min(begin + rows, end));
  };
  add(parts[0], parts[1]);
  file.fill_requests = static_cast<std::int64_t>(offsets.size()) - 1;
  add(parts[1], parts[2]);
  file.request_offsets = std::move(offsets);
  return file;
}

void check_vocabulary(const TokenFile& file, std::int64_t vocabulary, const std::string& name) {
  const std::int32_t largest = *std::max_element(file.tokens.begin(), file.tokens.end());
  if (largest >= vocabulary) {
    throw Failure(
        fmt::format("{}: it has token id {}, the model knows ids below {}; use the data of the model's own "
                    "tokenizer",
                    name, largest, vocabulary));
  }
}

}  // namespace llmcache::bench
