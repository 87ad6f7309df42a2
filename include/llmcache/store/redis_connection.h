// One connection to a Redis or Valkey server, over hiredis, whose calls are back by a deadline. For RedisStore.
#pragma once

#include <hiredis/hiredis.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llmcache/store/state_store.h"

namespace llmcache::redis {

/// A reply of the server (RESP2).
struct Reply {
  int type = REDIS_REPLY_NIL;
  long long integer = 0;
  std::string text;  ///< of strings, states and errors
  std::vector<std::unique_ptr<Reply>> elements;

  [[nodiscard]] bool is_error(std::string_view code = {}) const {
    return type == REDIS_REPLY_ERROR && std::string_view(text).starts_with(code);
  }
};

/// Appends a command to what is to be sent.
inline void append_command(std::string& to, std::initializer_list<std::string_view> parts) {
  to += "*" + std::to_string(parts.size()) + "\r\n";
  for (const std::string_view part : parts) {
    to += "$" + std::to_string(part.size()) + "\r\n";
    to += part;
    to += "\r\n";
  }
}

/// Where the server is, and as whom to ask it.
struct Address {
  std::string host = "127.0.0.1";
  int port = 6379;
  std::string unix_path = {};
  std::string username = {};
  std::string password = {};
  int database = 0;
};

/// Throws nothing but std::bad_alloc. After anything but kDone it is of no use any more. One thread at a time.
class Connection {
 public:
  /// Null, and why, if it cannot be had.
  static std::unique_ptr<Connection> open(const Address& address, std::uint64_t most_bytes, StoreDeadline deadline,
                                          StoreOutcome& outcome, std::string& why) {
    auto connection = std::unique_ptr<Connection>(new Connection(most_bytes));
    outcome = connection->connect(address, deadline);
    if (outcome == StoreOutcome::kDone) return connection;
    why = connection->why_;
    return nullptr;
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() {
    if (context_ != nullptr) redisFree(context_);
    if (reader_ != nullptr) redisReaderFree(reader_);
  }

  /// Sends these, one after the other.
  StoreOutcome send(const std::vector<std::string_view>& parts, StoreDeadline deadline) {
    std::vector<iovec> left;
    for (const std::string_view part : parts) {
      if (!part.empty()) left.push_back({const_cast<char*>(part.data()), part.size()});
    }
    std::size_t at = 0;
    while (at < left.size()) {
      msghdr message{};
      message.msg_iov = left.data() + at;
      message.msg_iovlen = std::min<std::size_t>(left.size() - at, kMostParts);
      const auto sent = ::sendmsg(context_->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0) {
        if (const StoreOutcome waited = wait(POLLOUT, deadline); waited != StoreOutcome::kDone) return waited;
        continue;
      }
      for (auto bytes = static_cast<std::size_t>(sent); bytes > 0;) {
        const std::size_t some = std::min(bytes, left[at].iov_len);
        left[at].iov_base = static_cast<char*>(left[at].iov_base) + some;
        left[at].iov_len -= some;
        bytes -= some;
        if (left[at].iov_len == 0) ++at;
      }
    }
    return StoreOutcome::kDone;
  }

  /// The next reply.
  StoreOutcome read(std::unique_ptr<Reply>& reply, StoreDeadline deadline) {
    for (std::uint64_t fed = 0;;) {
      void* got = nullptr;
      if (redisReaderGetReply(reader_, &got) != REDIS_OK) return broken(reader_->errstr);
      reply.reset(static_cast<Reply*>(got));
      if (reply) return StoreOutcome::kDone;
      if (fed > most_bytes_) return broken("a reply is larger than a value may be");
      const auto bytes = ::recv(context_->fd, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
      if (bytes == 0) return broken("the server has closed the connection");
      if (bytes < 0) {
        if (const StoreOutcome waited = wait(POLLIN, deadline); waited != StoreOutcome::kDone) return waited;
        continue;
      }
      fed += static_cast<std::uint64_t>(bytes);
      answered_ = true;
      if (redisReaderFeed(reader_, buffer_.data(), static_cast<std::size_t>(bytes)) != REDIS_OK) {
        return broken(reader_->errstr);
      }
    }
  }

  /// False if the server has ended the connection, or has sent what nothing was asked for with: replies would be taken
  /// for those of other commands then.
  [[nodiscard]] bool in_step() const noexcept {
    char byte = 0;
    const bool silent = ::recv(context_->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno != ECONNRESET;
    return silent && reader_->pos == reader_->len;
  }

  [[nodiscard]] const std::string& why() const noexcept { return why_; }
  /// True if anything has come since forget_answers().
  [[nodiscard]] bool answered() const noexcept { return answered_; }
  void forget_answers() noexcept { answered_ = false; }

 private:
  static constexpr std::size_t kMostParts = 256;
  static constexpr std::size_t kBufferBytes = std::size_t{256} << 10;
  static constexpr std::size_t kMostElements = 100'000;

  explicit Connection(std::uint64_t most_bytes) : most_bytes_(most_bytes), buffer_(kBufferBytes) {
    functions_.createString = [](const redisReadTask* task, char* text, std::size_t size) -> void* {
      return made(task, [&](Reply& reply) { reply.text.assign(text, size); });
    };
    functions_.createInteger = [](const redisReadTask* task, long long number) -> void* {
      return made(task, [&](Reply& reply) { reply.integer = number; });
    };
    functions_.createNil = [](const redisReadTask* task) -> void* {
      return made(task, [](Reply& reply) { reply.type = REDIS_REPLY_NIL; });
    };
    // The type of the number differs between versions of hiredis.
    functions_.createArray = [](const redisReadTask* task, auto elements) -> void* {
      const auto count = static_cast<std::size_t>(elements);
      if (count > kMostElements) return nullptr;
      return made(task, [&](Reply& reply) { reply.elements.resize(count); });
    };
    functions_.freeObject = [](void* reply) { delete static_cast<Reply*>(reply); };
  }

  /// A reply, which the one around it owns if there is one. Null, for hiredis, if there is no memory.
  template <class Fill>
  static void* made(const redisReadTask* task, const Fill& fill) {
    try {
      auto reply = std::make_unique<Reply>();
      reply->type = task->type;
      fill(*reply);
      Reply* const plain = reply.get();
      if (task->parent == nullptr) return reply.release();
      auto& around = *static_cast<Reply*>(task->parent->obj);
      around.elements.at(static_cast<std::size_t>(task->idx)) = std::move(reply);
      return plain;
    } catch (const std::exception&) {
      return nullptr;
    }
  }

  StoreOutcome connect(const Address& address, StoreDeadline deadline) {
    using std::chrono::microseconds;
    const auto left = std::chrono::duration_cast<microseconds>(deadline - std::chrono::steady_clock::now()).count();
    if (left <= 0) return late();
    constexpr long kPerSecond = 1'000'000;
    const timeval limit{left / kPerSecond, left % kPerSecond};
    context_ = address.unix_path.empty() ? redisConnectWithTimeout(address.host.c_str(), address.port, limit)
                                         : redisConnectUnixWithTimeout(address.unix_path.c_str(), limit);
    if (context_ == nullptr) return broken("there is no memory for a connection");
    if (context_->err != 0) {
      return std::chrono::steady_clock::now() >= deadline ? late() : broken(context_->errstr);
    }
    reader_ = redisReaderCreateWithFunctions(&functions_);
    if (reader_ == nullptr) return broken("there is no memory for a connection");
    reader_->maxbuf = 0;  // its buffer stays as large as the largest value
    return greet(address, deadline);
  }

  /// Says who is asking, and for which database.
  StoreOutcome greet(const Address& address, StoreDeadline deadline) {
    std::string commands;
    int replies = 0;
    if (!address.password.empty()) {
      ++replies;
      if (address.username.empty()) {
        append_command(commands, {"AUTH", address.password});
      } else {
        append_command(commands, {"AUTH", address.username, address.password});
      }
    }
    if (address.database != 0) {
      ++replies;
      append_command(commands, {"SELECT", std::to_string(address.database)});
    }
    if (replies == 0) return StoreOutcome::kDone;
    StoreOutcome outcome = send({commands}, deadline);
    for (; replies > 0 && outcome == StoreOutcome::kDone; --replies) {
      std::unique_ptr<Reply> reply;
      outcome = read(reply, deadline);
      if (outcome == StoreOutcome::kDone && reply->is_error()) outcome = broken(reply->text);
    }
    return outcome;
  }

  /// Waits until the socket can be written or read. errno is that of the call that could not.
  StoreOutcome wait(short events, StoreDeadline deadline) {
    if (errno == EINTR) return StoreOutcome::kDone;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return broken(std::strerror(errno));
    using std::chrono::nanoseconds;
    const auto left = std::chrono::duration_cast<nanoseconds>(deadline - std::chrono::steady_clock::now()).count();
    if (left <= 0) return late();
    constexpr long kPerSecond = 1'000'000'000;
    const timespec limit{left / kPerSecond, left % kPerSecond};
    pollfd one{context_->fd, events, 0};
    const int ready = ::ppoll(&one, 1, &limit, nullptr);
    if (ready == 0) return late();
    if (ready < 0 && errno != EINTR) return broken(std::strerror(errno));
    return StoreOutcome::kDone;
  }

  StoreOutcome late() {
    why_ = "the server did not answer by the deadline";
    return StoreOutcome::kTimeout;
  }
  StoreOutcome broken(const std::string& why) {
    why_ = why;
    return StoreOutcome::kFailed;
  }

  const std::uint64_t most_bytes_;
  redisReplyObjectFunctions functions_{};
  redisContext* context_ = nullptr;  ///< its socket; replies are read by the reader below
  redisReader* reader_ = nullptr;
  std::vector<char> buffer_;
  std::string why_;
  bool answered_ = false;
};

}  // namespace llmcache::redis
