// A chat loop with tenants: each line of the standard input is "NAME: text", and is answered within NAME's
// conversation. Only what is new of a conversation is computed, and no tenant is answered from what another one sent.
//
//   llmcache-chat build/models/smollm2.pt [packed-fp16]
#include <llmcache/llmcache.h>

#include <cstdio>
#include <exception>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;

/// The conversations of all tenants, on one cache.
class Chat {
 public:
  Chat(llmcache::TorchScriptCache cache, Tokenizer& tokenizer) : cache_(std::move(cache)), tokenizer_(tokenizer) {}

  void say(const std::string& tenant, const std::string& text) {
    std::vector<Message>& conversation = conversations_[tenant];
    conversation.push_back({"user", text});
    llmcache::GenerateOptions options;
    options.max_new_tokens = 64;
    options.stop_tokens = tokenizer_.end_tokens();
    options.tenant = tenant;
    try {
      const auto answer = llmcache::generate(cache_, tokenizer_.chat(conversation), options, [&](std::int64_t token) {
        std::cout << tokenizer_.stream(token) << std::flush;  // as it is generated
        return true;
      });
      std::cout << tokenizer_.finish() << "\n";
      conversation.push_back({"assistant", tokenizer_.decode(answer.tokens)});
      std::printf(
          "  [%s: prompt of %lld tokens, %lld known; first token after %.0f ms, %.1f ms a token; %s]\n", tenant.c_str(),
          static_cast<long long>(answer.prompt_tokens), static_cast<long long>(answer.prompt_reused), answer.prefill_ms,
          answer.steps > 0 ? answer.decode_ms / static_cast<double>(answer.steps) : 0.0, to_string(answer.stopped));
    } catch (const llmcache::Error& error) {
      std::cout << tokenizer_.finish();
      conversation.pop_back();  // the next text of this tenant begins where this one did
      if (error.code() != llmcache::ErrorCode::kInvalidInput) throw;
      std::cout << "  [" << tenant << ": " << error.what() << "]\n";
    }
  }

  void print_stats() const { std::cout << cache_.stats().to_string(); }

 private:
  llmcache::TorchScriptCache cache_;
  Tokenizer& tokenizer_;
  std::map<std::string, std::vector<Message>> conversations_;
};

void run(const std::string& model, const std::string& weights) {
  Tokenizer tokenizer(default_python(), default_helper(), tokenizer_beside(model));
  if (!tokenizer.has_chat_template()) throw std::runtime_error("the tokenizer of this model has no chat template");
  llmcache::Options options;
  options.capacity_bytes = std::size_t{512} << 20;
  options.weights = llmcache::weights_from_string(weights);
  options.profile_path = profile_beside(model, options.weights);
  options.progress = progress_on_terminal();
  Chat chat(llmcache::load(model, options), tokenizer);
  for (std::string line; std::getline(std::cin, line);) {
    const auto colon = line.find(": ");
    if (colon == std::string::npos) {
      std::cout << "  [expected NAME: text]\n";
      continue;
    }
    chat.say(line.substr(0, colon), line.substr(colon + 2));
  }
  chat.print_stats();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::cerr << "usage: llmcache-chat MODEL.pt [WEIGHTS]\n";
    return 2;
  }
  try {
    run(argv[1], argc == 3 ? argv[2] : "as-loaded");
  } catch (const std::exception& error) {
    std::cerr << "llmcache-chat: " << one_line(error) << "\n";
    return 1;
  }
  return 0;
}
