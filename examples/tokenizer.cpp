#include "tokenizer.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

extern char** environ;

namespace llmcache::examples {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kAnswerMs = 60000;               // loading a large tokenizer takes seconds
constexpr std::size_t kAnswerBytes = 1 << 28;  // more than this is no answer
constexpr auto kGoodbye = std::chrono::seconds(2);

[[noreturn]] void fail(const std::string& text) { throw TokenizerError("tokenizer: " + text); }

std::string shortened(const std::string& text) { return text.size() <= 200 ? text : text.substr(0, 200) + "..."; }

template <class T>
T field(const Json& answer, const char* name) {
  try {
    return answer.at(name).get<T>();
  } catch (const Json::exception& error) {
    fail("the helper's answer is not understood (" + std::string(error.what()) +
         "); --helper must name tokenizer_helper.py of this version");
  }
}

}  // namespace

Tokenizer::Tokenizer(const std::string& python, const fs::path& helper, const fs::path& tokenizer) {
  if (!fs::exists(helper))
    fail("the helper " + helper.string() + " is not there; name tokenizer_helper.py by --helper");
  if (!fs::exists(tokenizer)) {
    fail(tokenizer.string() +
         " is not there; give a tokenizer.json or its folder by --tokenizer "
         "(tools/models/export_models.py makes them)");
  }
  try {
    start(python, helper, tokenizer);
    const Json about = receive();
    if (!field<bool>(about, "ready")) fail("the helper is not ready");
    vocabulary_ = field<std::int64_t>(about, "vocabulary");
    end_tokens_ = field<std::vector<std::int64_t>>(about, "end");
    chat_ = field<bool>(about, "chat");
  } catch (...) {
    stop();
    throw;
  }
}

Tokenizer::~Tokenizer() { stop(); }

void Tokenizer::start(const std::string& python, const fs::path& helper, const fs::path& tokenizer) {
  // A pair of sockets, not pipes: writing to a pipe whose reader has ended raises SIGPIPE.
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    fail(std::string("no socket pair: ") + std::strerror(errno));
  }
  socket_ = ends[0];
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  std::vector<std::string> arguments = {python, helper.string(), tokenizer.string()};
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const int error = ::posix_spawnp(&process_, python.c_str(), &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  if (error != 0) {
    process_ = -1;
    fail("cannot start '" + python + "' (" + std::strerror(error) + "); name a Python by --python");
  }
}

std::vector<std::int64_t> Tokenizer::encode(const std::string& text, std::int64_t max_tokens) {
  Json request = {{"op", "encode"}, {"text", text}};
  if (max_tokens > 0) request["max_tokens"] = max_tokens;
  return field<std::vector<std::int64_t>>(ask(request), "ids");
}

std::vector<std::int64_t> Tokenizer::chat(const std::vector<Message>& messages) {
  Json list = Json::array();
  for (const Message& message : messages) list.push_back({{"role", message.role}, {"content", message.content}});
  return field<std::vector<std::int64_t>>(ask({{"op", "chat"}, {"messages", list}}), "ids");
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& ids) {
  return field<std::string>(ask({{"op", "decode"}, {"ids", ids}}), "text");
}

std::int64_t Tokenizer::id_of(const std::string& token) {
  const Json answer = ask({{"op", "id"}, {"token", token}});
  return answer.contains("id") && answer["id"].is_null() ? -1 : field<std::int64_t>(answer, "id");
}

std::string Tokenizer::stream(std::int64_t id) {
  return field<std::string>(ask({{"op", "stream"}, {"id", id}}), "text");
}

std::string Tokenizer::finish() { return field<std::string>(ask({{"op", "finish"}}), "text"); }

Json Tokenizer::ask(const Json& request) {
  std::string line;
  try {
    line = request.dump();
  } catch (const Json::exception&) {
    fail("the text is not UTF-8");
  }
  send(line + "\n");
  return receive();
}

void Tokenizer::send(const std::string& line) {
  for (std::size_t sent = 0; sent < line.size();) {
    const ssize_t count = ::send(socket_, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(ending());
    sent += static_cast<std::size_t>(count);
  }
}

Json Tokenizer::receive() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(kAnswerMs);
  std::size_t searched = 0;
  for (;;) {
    const auto end = received_.find('\n', searched);
    if (end != std::string::npos) {
      const std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      Json answer = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!answer.is_object()) fail("the helper wrote '" + shortened(line) + "' where a JSON object was expected");
      if (answer.contains("error")) fail(field<std::string>(answer, "error"));
      return answer;
    }
    searched = received_.size();
    if (searched > kAnswerBytes) fail("the helper's answer has no end");
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd ready = {socket_, POLLIN, 0};
    const int polled = left.count() <= 0 ? 0 : ::poll(&ready, 1, static_cast<int>(left.count()));
    if (polled < 0 && errno == EINTR) continue;
    if (polled == 0) fail("the helper does not answer");
    char buffer[65536];
    const ssize_t count = ::recv(socket_, buffer, sizeof(buffer), 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail(ending());
    received_.append(buffer, static_cast<std::size_t>(count));
  }
}

std::string Tokenizer::ending() {
  const auto status = wait();
  if (!status) return "the helper no longer answers";
  const std::string how = WIFSIGNALED(*status) ? "by signal " + std::to_string(WTERMSIG(*status))
                                               : "with exit status " + std::to_string(WEXITSTATUS(*status));
  return "the helper ended " + how + "; its own message, if any, is above";
}

void Tokenizer::stop() noexcept {
  if (socket_ >= 0) ::close(socket_);  // the helper ends when its input does
  socket_ = -1;
  wait();
}

std::optional<int> Tokenizer::wait() noexcept {
  if (process_ <= 0) return {};
  const pid_t process = std::exchange(process_, -1);
  const auto deadline = std::chrono::steady_clock::now() + kGoodbye;
  int status = 0;
  pid_t ended = 0;
  while ((ended = ::waitpid(process, &status, WNOHANG)) == 0) {
    if (std::chrono::steady_clock::now() > deadline) {
      ::kill(process, SIGKILL);
      ::waitpid(process, nullptr, 0);
      return {};
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return ended == process ? std::optional<int>(status) : std::nullopt;
}

std::string default_python() {
  const char* variable = std::getenv("LLMCACHE_PYTHON");
  if (variable != nullptr && *variable != '\0') return variable;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  const fs::path beside = program.parent_path().parent_path() / "venv" / "bin" / "python";
  return !error && fs::exists(beside, error) ? beside.string() : "python3";
}

fs::path default_helper() { return LLMCACHE_TOKENIZER_HELPER; }

}  // namespace llmcache::examples
