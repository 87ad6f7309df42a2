// One of several replicas behind a proxy: an HTTP server that computes next tokens, above a Redis server that all
// replicas share. docs/operations.md has a configuration of nginx for it.
//
//   llmcache-replica --model build/models/gpt2.pt --listen 8081 --redis 6379
//   curl -H 'X-Conversation: 7' --data '464 2068 7586 21831' http://127.0.0.1:8081/
//
// The body of a request is the token ids of a conversation so far, the answer JSON: the next token, and how many tokens
// were known. Requests are served one after the other, on the loopback only: an example, no server to put online.
#include <arpa/inet.h>
#include <llmcache/llmcache.h>
#include <llmcache/store/redis_store.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "model.h"

namespace {

using namespace llmcache::examples;
constexpr std::size_t kMostBytes = std::size_t{1} << 20;

struct Settings {
  std::string model;
  std::uint16_t listen = 8081;
  int redis = 6379;  ///< 0: none
  std::int64_t megabytes = 256;
};

/// A connection that is closed at the end.
class Connection {
 public:
  explicit Connection(int number) : number_(number) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() { ::close(number_); }

  /// The body of the request; empty: there is none that can be read.
  std::optional<std::string> read_body() {
    std::string text;
    std::size_t wanted = kMostBytes;
    for (std::size_t end = std::string::npos; text.size() < wanted;) {
      char part[4096];
      const auto got = ::recv(number_, part, sizeof(part), 0);
      if (got <= 0) return std::nullopt;
      text.append(part, static_cast<std::size_t>(got));
      if (end != std::string::npos) continue;
      end = text.find("\r\n\r\n");
      if (end == std::string::npos) continue;
      const std::size_t body = end + 4;
      wanted = body + length_of(text.substr(0, body));
      if (wanted > kMostBytes) return std::nullopt;
      if (text.size() >= wanted) break;
    }
    return text.substr(text.find("\r\n\r\n") + 4);
  }
  void answer(int status, const std::string& body) {
    std::ostringstream text;
    text << "HTTP/1.1 " << status << (status == 200 ? " OK" : " Bad Request")
         << "\r\nContent-Type: application/json\r\nContent-Length: " << body.size() << "\r\nConnection: close\r\n\r\n"
         << body;
    const std::string all = text.str();
    for (std::size_t at = 0; at < all.size();) {
      const auto sent = ::send(number_, all.data() + at, all.size() - at, MSG_NOSIGNAL);
      if (sent <= 0) return;  // it has gone
      at += static_cast<std::size_t>(sent);
    }
  }

 private:
  /// What the header says of the body.
  static std::size_t length_of(std::string header) {
    std::ranges::transform(header, header.begin(), [](unsigned char c) { return std::tolower(c); });
    const std::string name = "\r\ncontent-length:";
    const std::size_t at = header.find(name);
    if (at == std::string::npos) return 0;
    return std::min(kMostBytes, std::strtoul(header.c_str() + at + name.size(), nullptr, 10));
  }

  const int number_;
};

int listen_on(std::uint16_t port) {
  const int number = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (number < 0 || ::setsockopt(number, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) != 0 ||
      ::bind(number, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 || ::listen(number, 64) != 0) {
    throw std::system_error(errno, std::generic_category(), "port " + std::to_string(port));
  }
  return number;
}

std::string next_token(Cache& cache, const std::string& body) {
  std::istringstream text(body);
  std::vector<std::int64_t> ids;
  for (std::int64_t id = 0; text >> id;) ids.push_back(id);
  if (ids.empty() || !text.eof()) throw std::runtime_error("token ids are expected, with blanks between them");
  const auto inputs = llmcache::pad({ids}).inputs(cache.profile());
  const at::Tensor scores = first_tensor(cache.forward(inputs, {.output = llmcache::Output::kLastToken}));
  const auto report = cache.last_report().sequences.at(0);
  std::ostringstream answer;
  answer << "{\"next\": " << scores.reshape({-1}).argmax().item<std::int64_t>() << ", \"tokens\": " << report.tokens
         << ", \"known\": " << report.reused_tokens << ", \"process\": " << ::getpid() << "}\n";
  return answer.str();
}

void run(const Settings& settings) {
  llmcache::Options options;
  options.capacity_bytes = static_cast<std::size_t>(settings.megabytes) << 20;
  options.profile_path = profile_beside(settings.model);
  if (settings.redis > 0) {
    options.store.store = std::make_shared<llmcache::RedisStore>(llmcache::RedisStoreOptions{.port = settings.redis});
    options.store.deadline_ms = 200;
  }
  Cache cache = llmcache::load(settings.model, options);
  const int listening = listen_on(settings.listen);
  std::printf("port %d\n", settings.listen);
  std::fflush(stdout);
  for (;;) {
    Connection connection(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC));
    const auto body = connection.read_body();
    if (!body) continue;
    if (*body == "stats") {
      connection.answer(200, cache.stats().to_string());
      continue;
    }
    try {
      connection.answer(200, next_token(cache, *body));
    } catch (const std::exception& error) {
      connection.answer(400, one_line(error) + "\n");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Computes next tokens for a proxy, above a Redis server that all replicas share", "llmcache-replica");
  Settings settings;
  app.add_option("--model", settings.model, "causal TorchScript file, such as build/models/gpt2.pt")->required();
  app.add_option("--listen", settings.listen, "port on the loopback");
  app.add_option("--redis", settings.redis, "port of the Redis server on the loopback; 0: none");
  app.add_option("--megabytes", settings.megabytes, "capacity of the cache")->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-replica: %s\n", one_line(error).c_str());
    return 1;
  }
}
