// llmcache-store-bench: at which rate stores move values, beside a plain loop over hiredis on the same server.
#include <fmt/core.h>
#include <hiredis/hiredis.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "llmcache/store/directory_store.h"
#include "llmcache/store/redis_store.h"
#include "machine.h"

namespace {

using llmcache::StateStore;
using llmcache::StoreItem;
using llmcache::StoreOutcome;
using llmcache::StoreValues;
using llmcache::bench::Clock;
using llmcache::bench::seconds_since;

struct Arguments {
  int port = 6379;
  std::string directory;
  std::size_t value_bytes = std::size_t{4} << 20;
  int values = 32;
  int rounds = 7;
};

struct Values {
  std::vector<std::string> keys;
  std::string bytes;
};

double seconds_of(const std::function<void()>& work) {
  const auto start = Clock::now();
  work();
  return seconds_since(start);
}

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

using Context = std::unique_ptr<redisContext, decltype(&redisFree)>;

/// Sends one command, and checks its reply; a value is copied into a std::string where that is asked for, as a program
/// needs it.
void plain(const Context& context, int type, const std::vector<std::string_view>& words, bool copy = false) {
  std::vector<const char*> texts;
  std::vector<std::size_t> sizes;
  for (const std::string_view word : words) {
    texts.push_back(word.data());
    sizes.push_back(word.size());
  }
  auto* reply = static_cast<redisReply*>(
      redisCommandArgv(context.get(), static_cast<int>(texts.size()), texts.data(), sizes.data()));
  expect(reply != nullptr && reply->type == type, "the server gave no answer, or another one than expected");
  std::string own;
  if (copy) own.assign(reply->str, static_cast<std::size_t>(reply->len));
  freeReplyObject(reply);
}

/// One after the other.
void plain_get(const Context& context, const Values& values, bool copy) {
  for (const std::string& key : values.keys) plain(context, REDIS_REPLY_STRING, {"GET", key}, copy);
}

void plain_set(const Context& context, const Values& values) {
  for (const std::string& key : values.keys) plain(context, REDIS_REPLY_STATUS, {"SET", key, values.bytes});
}

void store_get(StateStore& store, const Values& values, std::size_t at_once) {
  for (std::size_t i = 0; i < values.keys.size(); i += at_once) {
    const std::size_t count = std::min(at_once, values.keys.size() - i);
    const StoreValues found = store.get({values.keys.data() + i, count}, llmcache::store_deadline(60'000));
    for (const auto& value : found.values) expect(value && value->size() == values.bytes.size(), "a value is missing");
  }
}

void store_put(StateStore& store, const Values& values) {
  for (const std::string& key : values.keys) {
    const StoreItem item{key, values.bytes};
    expect(store.put({&item, 1}, llmcache::store_deadline(60'000)) == StoreOutcome::kDone, "a value was not taken");
  }
}

struct Line {
  std::string name;
  std::function<void()> work;
  std::vector<double> seconds;
};

/// The lines take turns, so that what the machine does meanwhile meets all of them.
void measure(std::vector<Line>& lines, const Arguments& chosen) {
  for (Line& line : lines) line.work();
  for (int round = 0; round < chosen.rounds; ++round) {
    for (Line& line : lines) line.seconds.push_back(seconds_of(line.work));
  }
  const double megabytes = static_cast<double>(chosen.value_bytes) * chosen.values / 1e6;
  for (Line& line : lines) {
    std::ranges::sort(line.seconds);
    const auto rate = [&](std::size_t i) { return megabytes / line.seconds[i]; };
    fmt::print("{:<40} {:8.0f} MB/s (median of {}; {:.0f} to {:.0f})\n", line.name, rate(line.seconds.size() / 2),
               chosen.rounds, rate(line.seconds.size() - 1), rate(0));
  }
}

void run(const Arguments& chosen) {
  Values values;
  std::mt19937_64 random(1);
  while (values.bytes.size() < chosen.value_bytes) {
    const std::uint64_t number = random();
    values.bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }
  values.bytes.resize(chosen.value_bytes);
  for (int i = 0; i < chosen.values; ++i) values.keys.push_back("llmcache-store-bench:" + std::to_string(i));

  const Context context(redisConnect("127.0.0.1", chosen.port), &redisFree);
  expect(context && context->err == 0, fmt::format("no server answers at port {}", chosen.port));
  llmcache::RedisStore redis({.port = chosen.port});
  std::vector<Line> lines = {
      {"write, plain hiredis", [&] { plain_set(context, values); }, {}},
      {"write, RedisStore", [&] { store_put(redis, values); }, {}},
      {"read, plain hiredis", [&] { plain_get(context, values, false); }, {}},
      {"read, plain hiredis into std::string", [&] { plain_get(context, values, true); }, {}},
      {"read, RedisStore, one at a time", [&] { store_get(redis, values, 1); }, {}},
      {"read, RedisStore, four at a time", [&] { store_get(redis, values, 4); }, {}},
  };
  std::unique_ptr<llmcache::DirectoryStore> directory;
  if (!chosen.directory.empty()) {
    directory = std::make_unique<llmcache::DirectoryStore>(llmcache::DirectoryStoreOptions{.path = chosen.directory});
    lines.push_back({"write, DirectoryStore", [&] { store_put(*directory, values); }, {}});
    lines.push_back({"read, DirectoryStore", [&] { store_get(*directory, values, 1); }, {}});
  }
  measure(lines, chosen);
  const auto deadline = llmcache::store_deadline(60'000);
  expect(redis.erase_prefix("llmcache-store-bench:", deadline) == StoreOutcome::kDone, "values were not erased");
  if (directory) directory->erase_prefix("llmcache-store-bench:", deadline);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments chosen;
  CLI::App app("Measures at which rate stores move values, beside a plain loop over hiredis on the same server");
  app.add_option("--port", chosen.port, "of a redis-server of this machine")->capture_default_str();
  app.add_option("--directory", chosen.directory, "a folder for a DirectoryStore; default: none is measured");
  app.add_option("--bytes", chosen.value_bytes, "of a value")->capture_default_str();
  app.add_option("--values", chosen.values, "moved in a round")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--rounds", chosen.rounds, "measured")->capture_default_str()->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    run(chosen);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "llmcache-store-bench: " << error.what() << "\n";
    return 1;
  }
}
