// A redis-server of a test's own, and what stands between it and a store where the test is about the network.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <llmcache/store/redis_store.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "temporary_folder.h"

namespace llmcache::test {

/// A socket that listens on a free port of the loopback.
inline int listen_anywhere(int& port) {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  const bool listens = socket >= 0 && ::bind(socket, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                       ::listen(socket, 64) == 0 &&
                       ::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  if (!listens) throw std::runtime_error("no socket can listen on the loopback");
  port = ntohs(address.sin_port);
  return socket;
}

inline int free_port() {
  int port = 0;
  ::close(listen_anywhere(port));
  return port;
}

inline int connect_to(int port) {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  if (::connect(socket, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return socket;
  ::close(socket);
  return -1;
}

/// Started with what a test adds to its configuration, and stopped with the test. Throws where there is none: install
/// the Debian package redis-server.
class RedisServer {
 public:
  explicit RedisServer(std::vector<std::string> more = {}) : more_(std::move(more)), port_(free_port()) { start(); }
  ~RedisServer() { stop(); }
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  [[nodiscard]] int port() const { return port_; }
  [[nodiscard]] std::string socket() const { return (folder_ / "socket").string(); }
  [[nodiscard]] pid_t process() const { return process_; }
  void send(int signal) const { ::kill(process_, signal); }

  void start() {
    std::vector<std::string> words = {"redis-server",
                                      "--port",
                                      std::to_string(port_),
                                      "--bind",
                                      "127.0.0.1",
                                      "--save",
                                      "",
                                      "--appendonly",
                                      "no",
                                      "--dir",
                                      folder_.path(),
                                      "--unixsocket",
                                      socket(),
                                      "--logfile",
                                      (folder_ / "log").string()};
    words.insert(words.end(), more_.begin(), more_.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    process_ = ::fork();
    if (process_ == 0) {
      ::execvp(arguments[0], arguments.data());
      ::_exit(127);
    }
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < until) {
      int status = 0;
      if (::waitpid(process_, &status, WNOHANG) == process_) {
        process_ = -1;
        throw std::runtime_error("redis-server ends at once: is the Debian package redis-server installed?");
      }
      if (const int socket = connect_to(port_); socket >= 0) {
        ::close(socket);
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    throw std::runtime_error("redis-server does not listen");
  }

  /// As kill -9 does: without a word.
  void stop() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
    process_ = -1;
  }

 private:
  const TemporaryFolder folder_;
  const std::vector<std::string> more_;
  const int port_;
  pid_t process_ = -1;
};

/// Stands between a store and a server, and does to what passes what the test says. One thread for each connection.
class Proxy {
 public:
  enum class Manner {
    kPass,     ///< as it is
    kSlow,     ///< answers come delay_ms later
    kDrip,     ///< answers come byte by byte, delay_ms each
    kGarbage,  ///< answers are replaced by `garbage`
    kCut,      ///< the connection ends in the midst of an answer
    kClose,    ///< the connection ends instead of an answer
  };

  explicit Proxy(int server_port) : server_port_(server_port) {
    listening_ = listen_anywhere(port_);
    accepting_ = std::thread([this] { accept_all(); });
  }
  ~Proxy() {
    stopping_ = true;
    ::shutdown(listening_, SHUT_RDWR);
    accepting_.join();
    ::close(listening_);
    for (std::thread& thread : threads_) thread.join();
  }
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  [[nodiscard]] int port() const { return port_; }

  std::atomic<Manner> manner = Manner::kPass;
  std::atomic<int> delay_ms = 0;
  std::string garbage;  ///< not to be changed while anything passes

 private:
  void accept_all() {
    while (!stopping_) {
      const int client = ::accept4(listening_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;
      threads_.emplace_back([this, client] {
        const int server = connect_to(server_port_);
        if (server >= 0) pass(client, server);
        ::close(client);
        if (server >= 0) ::close(server);
      });
    }
  }

  void pass(int client, int server) {
    std::vector<char> buffer(1 << 16);
    while (!stopping_) {
      pollfd both[] = {{client, POLLIN, 0}, {server, POLLIN, 0}};
      if (::poll(both, 2, 10) <= 0) continue;
      if (both[0].revents != 0) {
        const auto got = ::recv(client, buffer.data(), buffer.size(), 0);
        if (got <= 0 || !send_all(server, buffer.data(), static_cast<std::size_t>(got))) return;
      }
      if (both[1].revents != 0) {
        const auto got = ::recv(server, buffer.data(), buffer.size(), 0);
        if (got <= 0 || !answer(client, buffer.data(), static_cast<std::size_t>(got))) return;
      }
    }
  }

  /// False: the connection is to end.
  bool answer(int client, const char* bytes, std::size_t size) {
    switch (manner.load()) {
      case Manner::kPass:
        return send_all(client, bytes, size);
      case Manner::kSlow:
        wait();
        return send_all(client, bytes, size);
      case Manner::kDrip:
        for (std::size_t i = 0; i < size && !stopping_; ++i) {
          wait();
          if (!send_all(client, bytes + i, 1)) return false;
        }
        return true;
      case Manner::kGarbage:
        return send_all(client, garbage.data(), garbage.size());
      case Manner::kCut:
        send_all(client, bytes, size / 2);
        return false;
      case Manner::kClose:
        return false;
    }
    return false;
  }

  void wait() const { std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms.load())); }

  static bool send_all(int socket, const char* bytes, std::size_t size) {
    while (size > 0) {
      const auto sent = ::send(socket, bytes, size, MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes += sent;
      size -= static_cast<std::size_t>(sent);
    }
    return true;
  }

  const int server_port_;
  int port_ = 0;
  int listening_ = -1;
  std::atomic<bool> stopping_ = false;
  std::thread accepting_;
  std::vector<std::thread> threads_;  ///< of accepting_ until that has ended
};

}  // namespace llmcache::test
