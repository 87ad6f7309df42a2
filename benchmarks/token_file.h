// Token files: the requests of one workload, tokenized, as safetensors.
//
//   tokens            int32 [total]          ids of all sequences, one after another
//   sequence_offsets  int64 [sequences + 1]  into tokens
//   request_offsets   int64 [requests + 1]   into sequences; a request is one batch
//
// Metadata (strings): workload, tokenizer, source, description, order, max_tokens, version "1".
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache::bench {

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

  [[nodiscard]] std::int64_t sequences() const { return static_cast<std::int64_t>(sequence_offsets.size()) - 1; }
  [[nodiscard]] std::int64_t requests() const { return static_cast<std::int64_t>(request_offsets.size()) - 1; }
  /// Ids of sequence `i`, 0 <= i < sequences().
  [[nodiscard]] std::span<const std::int32_t> sequence(std::int64_t i) const;
  /// Ids of each sequence of request `i`, 0 <= i < requests(), cut to `max_tokens` ids.
  [[nodiscard]] std::vector<std::span<const std::int32_t>> request(std::int64_t i, std::int64_t max_tokens) const;
  /// True if the order of the file groups requests by label, which would flatter any cache.
  [[nodiscard]] bool grouped_by_label() const;
};

/// Reads and checks a token file. Throws Failure that names the file and what is wrong with it.
TokenFile read_token_file(const std::filesystem::path& path);

/// The same for a file that is already in memory; `name` is for messages.
TokenFile parse_token_file(std::string_view bytes, const std::string& name);

/// Throws Failure if the file has an id that a model of `vocabulary` ids does not know.
void check_vocabulary(const TokenFile& file, std::int64_t vocabulary, const std::string& name);

}  // namespace llmcache::bench
