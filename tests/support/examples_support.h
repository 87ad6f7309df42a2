// What tests of the example programs have in common.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

extern char** environ;

namespace llmcache::examples {

namespace fs = std::filesystem;

inline fs::path folder_of(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr) throw std::runtime_error(std::string(variable) + " is not set: tools/run.sh test sets it");
  return value;
}

inline fs::path models() { return folder_of("LLMCACHE_MODELS_DIR"); }
inline std::string model(const std::string& name) { return (models() / (name + ".pt")).string(); }
inline fs::path tiny_tokenizer() { return models() / "tokenizers" / "tiny"; }

inline std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

class ExampleTest : public ::testing::Test {
 protected:
  ExampleTest() {
    std::string name = (fs::temp_directory_path() / "llmcache-examples-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    folder_ = name;
  }
  ~ExampleTest() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  fs::path write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }

  struct Result {
    int status = -1;
    std::string out;
    std::string err;
  };

  /// Runs build/bin/PROGRAM, which reads `input`.
  Result run(const std::string& program, std::vector<std::string> arguments, const std::string& input = {}) const {
    arguments.insert(arguments.begin(), (folder_of("LLMCACHE_BIN_DIR") / program).string());
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const std::string out = folder_ / "out";
    const std::string err = folder_ / "err";
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    const std::string in = write("in", input);
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, in.c_str(), O_RDONLY, 0);
    ::posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    pid_t process = -1;
    const int error = ::posix_spawn(&process, argv[0], &actions, nullptr, argv.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    if (error != 0) throw std::runtime_error(arguments[0] + " cannot be started");
    int status = 0;
    ::waitpid(process, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), text_of(out), text_of(err)};
  }

  fs::path folder_;
};

}  // namespace llmcache::examples
