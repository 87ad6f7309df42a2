// Token files: the requests of one workload, tokenized. docs/benchmark-files.md says what they hold.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache::bench {

/// What can be said about the quality of a model's outputs on a workload.
enum class Task { kNone, kClassification, kChoice, kPerplexity, kAnswer, kSimilarity, kDuplicates, kGeneration };

/// As in the metadata; "" for kNone.
const char* to_string(Task task) noexcept;

/// Tokens [begin, end) of a sequence.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// What some models take of a sequence beside its ids.
struct RowMarks {
  std::span<const std::int64_t> pool;  ///< 1 at the tokens to pool, else 0; empty: all are to be
  std::int64_t second_text = -1;       ///< the first token of type 1; -1: none is
};

/// What is empty or 0 is not in the file.
struct TokenFile {
  std::string workload, tokenizer, source, description, order;
  std::int64_t max_tokens = 0;
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> sequence_offsets, request_offsets;

  Task task = Task::kNone;
  std::int64_t fill_requests = 0;
  std::int64_t new_tokens = 0;
  std::int64_t stop_token = -1;  ///< -1: none
  std::vector<std::string> label_names;
  std::vector<std::int64_t> labels, scored_bytes;        // of sequences
  std::vector<TokenRange> scored, passage;               // the same
  std::vector<std::int64_t> group, partner, pair_label;  // of requests
  std::vector<float> pair_score;                         // the same
  std::vector<std::int64_t> pool;                        // of tokens
  std::string token_text, gold;
  std::vector<std::int64_t> token_text_offsets, gold_offsets;

  [[nodiscard]] std::int64_t sequences() const { return static_cast<std::int64_t>(sequence_offsets.size()) - 1; }
  [[nodiscard]] std::int64_t requests() const { return static_cast<std::int64_t>(request_offsets.size()) - 1; }
  /// Ids of sequence `i`, 0 <= i < sequences().
  [[nodiscard]] std::span<const std::int32_t> sequence(std::int64_t i) const;
  /// Ids of each sequence of request `i`, 0 <= i < requests(), cut to `max_tokens` ids.
  [[nodiscard]] std::vector<std::span<const std::int32_t>> request(std::int64_t i, std::int64_t max_tokens) const;
  /// What stands beside these ids; empty where nothing does.
  [[nodiscard]] std::vector<RowMarks> marks(std::int64_t i, std::int64_t max_tokens) const;
  /// Text of tokens [range.begin, range.end) of sequence `i`; `passage` must be there.
  [[nodiscard]] std::string_view text(std::int64_t i, TokenRange range) const;
  /// Gold answers of request `i`, each ended by a newline; `passage` must be there.
  [[nodiscard]] std::string_view gold_answers(std::int64_t i) const;
  /// Number of the first sequence of request `i`; the others follow it.
  [[nodiscard]] std::int64_t first_sequence(std::int64_t i) const {
    return request_offsets[static_cast<std::size_t>(i)];
  }
  /// Number of the first request whose sequences all come from `sequence` on; requests() if there is none.
  [[nodiscard]] std::int64_t first_request_from(std::int64_t sequence) const;
  /// True if the order of the file groups requests by label, which would flatter any cache.
  [[nodiscard]] bool grouped_by_label() const;
};

/// Reads and checks a token file. Throws Failure that names the file and what is wrong with it.
TokenFile read_token_file(const std::filesystem::path& path);

/// The same for a file that is already in memory; `name` is for messages.
TokenFile parse_token_file(std::string_view bytes, const std::string& name);

/// The same sequences in the same order, `rows` a request; the last request of each part may have fewer. Throws Failure
/// where requests are more than independent sequences: pairs, choices, conversations and the like.
TokenFile in_batches_of(TokenFile file, std::int64_t rows);

/// Throws Failure if the file has an id that a model of `vocabulary` ids does not know.
void check_vocabulary(const TokenFile& file, std::int64_t vocabulary, const std::string& name);

}  // namespace llmcache::bench
