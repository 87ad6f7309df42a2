// A store in a Redis or Valkey server, which several processes and machines can share. Needs the component `redis`
// (target llmcache::redis, hiredis).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llmcache/store/circuit_breaker.h"
#include "llmcache/store/redis_connection.h"
#include "llmcache/store/state_store.h"
#include "llmcache/store/tier_counter.h"

namespace llmcache {

struct RedisStoreOptions {
  /// Host name or address, and port. A name is looked up with no deadline: an address is safer.
  std::string host = "127.0.0.1";
  int port = 6379;
  /// A socket of this machine, in place of host and port; empty (default): those.
  std::string unix_path = {};
  /// For AUTH; an empty password (default): none is sent. An empty user name: the server's default user.
  std::string username = {};
  std::string password = {};
  /// For SELECT.
  int database = 0;
  /// Connections at most, made when they are needed: so many calls run at once, others wait for one. Default 4.
  int connections = 4;
  /// Seconds after which the server forgets a value; 0 (default): when it has to (its maxmemory-policy).
  std::int64_t expire_s = 0;
  /// A larger value is neither written nor read. Default 256 MiB; the server takes 512 at most.
  std::uint64_t max_value_bytes = std::uint64_t{256} << 20;
  /// How long the breaker's thread waits for a connection, and for an answer, milliseconds; for the latter no longer
  /// than the call waited that was not answered in time.
  double probe_ms = 100;
  CircuitBreaker::Pauses pauses = {};  ///< of the breaker
};

/// Commands are pipelined (RESP2: GET, SET, EXISTS, UNLINK, SCAN, PING, AUTH, SELECT). After a timeout, a broken
/// connection, or an answer that is none, the server is left alone until the breaker's thread gets an answer from it. A
/// connection that was idle is tried anew once: the server may have been restarted. A full server ("OOM") refuses
/// writes, and is asked on.
///
/// hiredis 0.14 (Debian 12) has no TLS: beyond a trusted network use a tunnel, whose address is given here.
class RedisStore final : public StateStore {
 public:
  /// Does not connect: a server that is not there yet is one that fails. Throws std::invalid_argument for a value out
  /// of range.
  explicit RedisStore(RedisStoreOptions options)
      : options_(checked(std::move(options))),
        patience_ms_(options_.probe_ms),
        breaker_([this] { return probe(); }, options_.pauses) {}
  ~RedisStore() override { breaker_.stop(); }

  [[nodiscard]] std::string name() const override {
    if (!options_.unix_path.empty()) return "redis " + options_.unix_path;
    return "redis " + options_.host + ":" + std::to_string(options_.port);
  }

  StoreValues get(std::span<const std::string> keys, StoreDeadline deadline) override {
    StoreValues found;
    found.values.resize(keys.size());
    for (const std::string& key : keys) check_store_key(key);
    found.outcome = run(deadline, [&](redis::Connection& connection) {
      // A server prepares all answers that it is asked for, which takes long where they are large.
      std::size_t ahead = 1;
      std::size_t asked = 0;
      StoreOutcome outcome = StoreOutcome::kDone;
      for (std::size_t i = 0; i < keys.size(); ++i) {
        std::string commands;
        for (; asked < std::min(keys.size(), i + ahead); ++asked) redis::append_command(commands, {"GET", keys[asked]});
        std::unique_ptr<redis::Reply> reply;
        outcome = connection.send({commands}, deadline);
        if (outcome == StoreOutcome::kDone) outcome = connection.read(reply, deadline);
        if (outcome != StoreOutcome::kDone) break;
        ahead = reply->text.size() > kLargeBytes ? kFewAhead : std::min(2 * ahead, kMostAhead);
        if (reply->type == REDIS_REPLY_STRING) {
          found.values[i] = std::move(reply->text);
        } else if (reply->type != REDIS_REPLY_NIL && !reply->is_error("WRONGTYPE")) {
          return Ended{StoreOutcome::kFailed, described(*reply)};
        }
      }
      return Ended{outcome, connection.why()};
    });
    // What came from a server that does not keep to the protocol is not to be believed.
    if (found.outcome == StoreOutcome::kFailed) found.values.assign(keys.size(), std::nullopt);
    counter_.looked_up(found);
    return found;
  }

  StoreOutcome put(std::span<const StoreItem> items, StoreDeadline deadline) override {
    for (const StoreItem& item : items) check_store_key(item.key);
    StoreOutcome last = StoreOutcome::kDone;
    for (const StoreItem& item : items) {
      const StoreOutcome outcome = put(item, deadline);
      if (outcome == StoreOutcome::kDone) {
        counter_.written(item.value.size());
      } else {
        counter_.not_written(1);
        last = outcome;
      }
    }
    return last;
  }

  std::vector<bool> exists(std::span<const std::string> keys, StoreDeadline deadline) override {
    for (const std::string& key : keys) check_store_key(key);
    std::vector<bool> known(keys.size());
    run(deadline, [&](redis::Connection& connection) {
      std::string commands;
      for (const std::string& key : keys) redis::append_command(commands, {"EXISTS", key});
      StoreOutcome outcome = connection.send({commands}, deadline);
      for (std::size_t i = 0; i < keys.size() && outcome == StoreOutcome::kDone; ++i) {
        std::unique_ptr<redis::Reply> reply;
        outcome = connection.read(reply, deadline);
        if (outcome != StoreOutcome::kDone) break;
        if (reply->type != REDIS_REPLY_INTEGER) return Ended{StoreOutcome::kFailed, described(*reply)};
        known[i] = reply->integer > 0;
      }
      return Ended{outcome, connection.why()};
    });
    return known;
  }

  StoreOutcome erase(std::span<const std::string> keys, StoreDeadline deadline) override {
    for (const std::string& key : keys) check_store_key(key);
    return run(deadline, [&](redis::Connection& connection) {
      std::string commands;
      for (const std::string& key : keys) redis::append_command(commands, {"UNLINK", key});
      StoreOutcome outcome = connection.send({commands}, deadline);
      for (std::size_t i = 0; i < keys.size() && outcome == StoreOutcome::kDone; ++i) {
        std::unique_ptr<redis::Reply> reply;
        outcome = connection.read(reply, deadline);
        if (outcome == StoreOutcome::kDone && reply->is_error()) return Ended{StoreOutcome::kFailed, reply->text};
      }
      return Ended{outcome, connection.why()};
    });
  }

  StoreOutcome erase_prefix(std::string_view prefix, StoreDeadline deadline) override {
    check_store_key(prefix);
    return run(deadline, [&](redis::Connection& connection) { return erase_all(connection, prefix, deadline); });
  }

  [[nodiscard]] std::vector<TierStats> stats() const override {
    TierStats stats = counter_.stats();
    stats.name = name();
    stats.open = breaker_.open();
    stats.openings = breaker_.openings();
    return {stats};
  }

 private:
  struct Ended {
    StoreOutcome outcome = StoreOutcome::kDone;
    std::string why;
  };
  using Connection = std::unique_ptr<redis::Connection>;
  /// Values that are asked for before the first of them has come: of large ones, and at most.
  static constexpr std::size_t kFewAhead = 1;
  static constexpr std::size_t kMostAhead = 64;
  static constexpr std::size_t kLargeBytes = std::size_t{256} << 10;
  static constexpr double kLeastPatienceMs = 10;

  static RedisStoreOptions checked(RedisStoreOptions options) {
    constexpr int kMostPort = 65'535;
    if (options.connections < 1) throw std::invalid_argument("RedisStoreOptions.connections: 1 or more is expected");
    if (options.port < 1 || options.port > kMostPort) {
      throw std::invalid_argument("RedisStoreOptions.port: 1 to 65535 is expected");
    }
    if (options.database < 0) throw std::invalid_argument("RedisStoreOptions.database: 0 or more is expected");
    if (options.expire_s < 0) throw std::invalid_argument("RedisStoreOptions.expire_s: 0 or more is expected");
    if (!(options.probe_ms > 0)) throw std::invalid_argument("RedisStoreOptions.probe_ms: more than 0 is expected");
    return options;
  }

  static std::string described(const redis::Reply& reply) {
    return reply.is_error() ? reply.text : "the server gave an answer of another kind than was asked for";
  }

  [[nodiscard]] redis::Address address() const {
    return {options_.host, options_.port, options_.unix_path, options_.username, options_.password, options_.database};
  }
  [[nodiscard]] std::uint64_t most_reply_bytes() const {
    constexpr std::uint64_t kBeside = std::uint64_t{1} << 20;
    return options_.max_value_bytes + kBeside;
  }

  StoreOutcome put(const StoreItem& item, StoreDeadline deadline) {
    if (item.value.size() > options_.max_value_bytes) {
      counter_.ended(StoreOutcome::kNoRoom, "a value is larger than the store takes");
      return StoreOutcome::kNoRoom;
    }
    bool full = false;
    const StoreOutcome outcome = run(deadline, [&](redis::Connection& connection) {
      const std::string seconds = options_.expire_s > 0 ? std::to_string(options_.expire_s) : std::string();
      std::string before = std::string("*") + (seconds.empty() ? "3" : "5") + "\r\n$3\r\nSET\r\n$" +
                           std::to_string(item.key.size()) + "\r\n";
      before += item.key;
      before += "\r\n$" + std::to_string(item.value.size()) + "\r\n";
      std::string behind = "\r\n";
      if (!seconds.empty()) behind += "$2\r\nEX\r\n$" + std::to_string(seconds.size()) + "\r\n" + seconds + "\r\n";
      StoreOutcome sent = connection.send({before, item.value, behind}, deadline);
      std::unique_ptr<redis::Reply> reply;
      if (sent == StoreOutcome::kDone) sent = connection.read(reply, deadline);
      if (sent != StoreOutcome::kDone) return Ended{sent, connection.why()};
      full = reply->is_error("OOM");
      if (full) counter_.ended(StoreOutcome::kNoRoom, reply->text);
      if (full || reply->type == REDIS_REPLY_STATUS) return Ended{};
      return Ended{StoreOutcome::kFailed, described(*reply)};
    });
    return full ? StoreOutcome::kNoRoom : outcome;
  }

  static Ended erase_all(redis::Connection& connection, std::string_view prefix, StoreDeadline deadline) {
    std::string cursor = "0";
    do {
      std::string command;
      redis::append_command(command, {"SCAN", cursor, "MATCH", std::string(prefix) + "*", "COUNT", "1000"});
      std::unique_ptr<redis::Reply> reply;
      StoreOutcome outcome = connection.send({command}, deadline);
      if (outcome == StoreOutcome::kDone) outcome = connection.read(reply, deadline);
      if (outcome != StoreOutcome::kDone) return {outcome, connection.why()};
      if (reply->elements.size() != 2 || !reply->elements[0] || !reply->elements[1]) {
        return {StoreOutcome::kFailed, described(*reply)};
      }
      cursor = reply->elements[0]->text;
      const auto& keys = reply->elements[1]->elements;
      std::string commands;
      for (const auto& key : keys) redis::append_command(commands, {"UNLINK", key->text});
      outcome = connection.send({commands}, deadline);
      for (std::size_t i = 0; i < keys.size() && outcome == StoreOutcome::kDone; ++i) {
        std::unique_ptr<redis::Reply> erased;
        outcome = connection.read(erased, deadline);
      }
      if (outcome != StoreOutcome::kDone) return {outcome, connection.why()};
    } while (cursor != "0");
    return {};
  }

  /// Does work on a connection of its own, and keeps that for the next unless it failed.
  template <class Work>
  StoreOutcome run(StoreDeadline deadline, const Work& work) {
    if (breaker_.open()) {
      counter_.ended(StoreOutcome::kRefused, {});
      return StoreOutcome::kRefused;
    }
    const double allowed_ms = ms_until(deadline);
    bool fresh = false;
    Connection connection;
    Ended ended = borrow(deadline, allowed_ms, connection, fresh);
    if (connection) {
      try {
        ended = work_on(connection, fresh, deadline, work);
      } catch (...) {  // no memory
        give_back(nullptr);
        throw;
      }
      give_back(std::move(connection));
      if (ended.outcome == StoreOutcome::kDone) {
        breaker_.succeeded();
      } else {
        failed(ended.outcome, allowed_ms);
      }
    }
    counter_.ended(ended.outcome, ended.why);
    return ended.outcome;
  }

  /// The connection is null behind it unless it can be used again.
  template <class Work>
  Ended work_on(Connection& connection, bool fresh, StoreDeadline deadline, const Work& work) {
    Ended ended;
    connection->forget_answers();
    const bool usable = fresh || connection->in_step();
    if (usable) ended = work(*connection);
    const bool broken = ended.outcome == StoreOutcome::kFailed && !connection->answered();
    if (!usable || (broken && !fresh)) {
      ended = connect(deadline, connection);
      if (connection) ended = work(*connection);
    }
    if (ended.outcome == StoreOutcome::kDone && !connection->in_step()) {
      ended = {StoreOutcome::kFailed, "the server has sent more than it was asked for"};
    }
    if (ended.outcome != StoreOutcome::kDone) connection = nullptr;
    return ended;
  }

  static double ms_until(StoreDeadline deadline) {
    return std::chrono::duration<double, std::milli>(deadline - std::chrono::steady_clock::now()).count();
  }

  /// `allowed_ms`: that the call had.
  void failed(StoreOutcome outcome, double allowed_ms) {
    // A server that answers too late for requests is not back: else each time that it is taken for that, one waits in
    // vain. What had little of its deadline left says nothing about the server.
    const bool late = outcome == StoreOutcome::kTimeout && allowed_ms >= kLeastPatienceMs;
    if (!breaker_.open()) patience_ms_ = late ? std::min(allowed_ms, options_.probe_ms) : options_.probe_ms;
    breaker_.trip();
    const std::lock_guard lock(mutex_);
    idle_.clear();
  }

  Ended connect(StoreDeadline deadline, Connection& connection) const {
    Ended ended;
    connection = redis::Connection::open(address(), most_reply_bytes(), deadline, ended.outcome, ended.why);
    return ended;
  }

  /// A connection that nobody uses: an idle one, or one more, as long as there are few enough. Null, and why.
  Ended borrow(StoreDeadline deadline, double allowed_ms, Connection& connection, bool& fresh) {
    {
      std::unique_lock lock(mutex_);
      const auto free = [this] { return !idle_.empty() || in_use_ < options_.connections; };
      if (!returned_.wait_until(lock, deadline, free)) {
        return {StoreOutcome::kTimeout, "all connections were in use up to the deadline"};
      }
      ++in_use_;
      if (!idle_.empty()) {
        connection = std::move(idle_.back());
        idle_.pop_back();
        return {};
      }
    }
    fresh = true;
    Ended ended = connect(deadline, connection);
    if (!connection) {
      give_back(nullptr);
      failed(ended.outcome, allowed_ms);
    }
    return ended;
  }

  void give_back(Connection connection) {
    {
      const std::lock_guard lock(mutex_);
      --in_use_;
      if (connection && !breaker_.open()) idle_.push_back(std::move(connection));
    }
    returned_.notify_one();
  }

  /// By the breaker's thread: does the server answer in time?
  bool probe() {
    try {
      Connection connection;
      if (connect(store_deadline(options_.probe_ms), connection).outcome != StoreOutcome::kDone) return false;
      const StoreDeadline deadline = store_deadline(patience_ms_);
      std::string command;
      redis::append_command(command, {"PING"});
      std::unique_ptr<redis::Reply> reply;
      if (connection->send({command}, deadline) != StoreOutcome::kDone) return false;
      return connection->read(reply, deadline) == StoreOutcome::kDone && reply->type == REDIS_REPLY_STATUS &&
             reply->text == "PONG";
    } catch (const std::exception&) {
      return false;
    }
  }

  const RedisStoreOptions options_;
  TierCounter counter_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<Connection> idle_;     ///< guarded by mutex_
  int in_use_ = 0;                   ///< likewise
  std::atomic<double> patience_ms_;  ///< how soon a server must answer that is taken for back
  CircuitBreaker breaker_;           ///< last: its thread uses the above
};

}  // namespace llmcache
