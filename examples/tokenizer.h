// Text to token ids and back, by a helper process (tokenizer_helper.py, which says why).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmcache::examples {

/// The helper cannot be started, ended, or refused a request. One line: what happened, what to do.
class TokenizerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Message {
  std::string role;
  std::string content;
};

/// One helper process, which lives as long as the object. Not thread-safe.
class Tokenizer {
 public:
  /// Runs `python` (a path, or a name that is looked up in PATH) on `helper`, which reads `tokenizer`: a
  /// tokenizer.json or the folder that has one. No shell is involved. Throws TokenizerError.
  Tokenizer(const std::string& python, const std::filesystem::path& helper, const std::filesystem::path& tokenizer);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // All of these throw TokenizerError.

  /// With the special tokens that the tokenizer adds; at most `max_tokens`, those included (0: no limit).
  [[nodiscard]] std::vector<std::int64_t> encode(const std::string& text, std::int64_t max_tokens = 0);
  /// Through the tokenizer's chat template, up to where the answer begins.
  [[nodiscard]] std::vector<std::int64_t> chat(const std::vector<Message>& messages);
  /// Special tokens left out.
  [[nodiscard]] std::string decode(const std::vector<std::int64_t>& ids);
  /// -1 if the vocabulary has no such token.
  [[nodiscard]] std::int64_t id_of(const std::string& token);

  /// Text that grows by one token: what the token adds. A character that is not whole yet is held back.
  [[nodiscard]] std::string stream(std::int64_t id);
  /// What stream() held back. The next stream() begins a new text.
  [[nodiscard]] std::string finish();

  [[nodiscard]] std::int64_t vocabulary() const { return vocabulary_; }
  [[nodiscard]] const std::vector<std::int64_t>& end_tokens() const { return end_tokens_; }
  [[nodiscard]] bool has_chat_template() const { return chat_; }
  [[nodiscard]] pid_t process() const { return process_; }

 private:
  void start(const std::string& python, const std::filesystem::path& helper, const std::filesystem::path& tokenizer);
  nlohmann::json ask(const nlohmann::json& request);
  void send(const std::string& line);
  nlohmann::json receive();
  /// Why the helper no longer answers.
  std::string ending();
  void stop() noexcept;
  /// Status of the process once it has ended; it is killed if that takes long.
  std::optional<int> wait() noexcept;

  int socket_ = -1;
  pid_t process_ = -1;
  std::string received_;  // beyond the last whole line
  std::int64_t vocabulary_ = 0;
  std::vector<std::int64_t> end_tokens_;
  bool chat_ = false;
};

/// What --python is by default: $LLMCACHE_PYTHON, or the virtual environment beside the program's folder
/// (tools/run.sh puts it there), or python3.
std::string default_python();

/// The helper in the source tree.
std::filesystem::path default_helper();

}  // namespace llmcache::examples
