// Token files: the requests of one workload, tokenized, as safetensors.
//
//   tokens            int32 [total]          ids of all sequences, one after another
//   sequence_offsets  int64 [sequences + 1]  into tokens
//   request_offsets   int64 [requests + 1]   into sequences; a request is one batch
//
// Metadata (strings): workload, tokenizer, source, description, order, max_tokens, version "1" or "2".
// Version "2" may add what a task needs, all of it optional unless `task` asks for it:
//
//   metadata task           "", classification, choice, perplexity, answer, similarity, duplicates or generation
//   metadata fill_requests  that many requests, from the first on, only fill the cache
//   metadata new_tokens     generation: tokens that the model says behind each sequence, 1 or more
//   metadata stop_token     generation: it says no more once it has said this one; absent: none
//   metadata label_names    JSON list: names of the classes
//   labels      int64   [sequences]     classification: class; choice: 1 right, 0 wrong
//   scored      int64   [sequences, 2]  tokens [begin, end) whose log-likelihood is scored; begin >= 1, begin = end
//                                       where nothing is scored
//   scored_bytes int64  [sequences]     choice: length in bytes of the text that is scored
//   group       int64   [requests]      answer: equal gold answers have equal numbers, -1 unanswerable
//   partner     int64   [requests]      duplicates: the fill request of the pair; -1 in the fill part
//   pair_label  int64   [requests]      duplicates: 1 duplicate, 0 not; -1 in the fill part
//   pair_score  float32 [requests]      similarity: gold score of the request's two sequences
//   pool        int64   [total]         1 at the tokens that a model with a pooling mask is to pool, else 0
//   passage     int64   [sequences, 2]  answer: tokens [begin, end) of the passage that is asked about. From `begin` on
//                                       the token type is 1
//   token_text          uint8 [bytes]         answer, with passage: the text of each token by SQuAD's rule for equal
//                                             answers (lower case, no punctuation), with the white space before it
//   token_text_offsets  int64 [total + 1]     into token_text
//   gold                uint8 [bytes]         answer, with passage: gold answers by the same rule, each ended by a
//                                             newline
//   gold_offsets        int64 [requests + 1]  into gold; nothing for a request: it cannot be answered
//
// What is not read here: `edit_kind` (int64 [sequences], number in the metadata's list edit_kinds of how a sequence
// differs from the last one before it that is as it is, 0) and `edit_percent` (float32 [sequences], share of its words
// that were changed); the metadata recipe and content_sha256 (what the file was made from, and its content).
//
// Where text is generated, a request is a conversation: its sequences are the user's parts of it, the model's
// answers come between them.
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

struct TokenFile {
  std::string workload;
  std::string tokenizer;
  std::string source;
  std::string description;
  std::string order;
  std::int64_t max_tokens = 0;
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> sequence_offsets;
  std::vector<std::int64_t> request_offsets;

  Task task = Task::kNone;
  std::int64_t fill_requests = 0;
  std::int64_t new_tokens = 0;   ///< 0 unless text is generated
  std::int64_t stop_token = -1;  ///< -1: none
  std::vector<std::string> label_names;
  std::vector<std::int64_t> labels;        ///< empty, or one a sequence
  std::vector<TokenRange> scored;          ///< empty, or one a sequence
  std::vector<std::int64_t> scored_bytes;  ///< empty, or one a sequence: length of the scored text
  std::vector<std::int64_t> group;         ///< empty, or one a request
  std::vector<std::int64_t> partner;       ///< empty, or one a request
  std::vector<std::int64_t> pair_label;    ///< empty, or one a request
  std::vector<float> pair_score;           ///< empty, or one a request
  std::vector<std::int64_t> pool;          ///< empty, or one a token
  std::vector<TokenRange> passage;         ///< empty, or one a sequence; then the texts below are there too
  std::string token_text;
  std::vector<std::int64_t> token_text_offsets;
  std::string gold;
  std::vector<std::int64_t> gold_offsets;

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
