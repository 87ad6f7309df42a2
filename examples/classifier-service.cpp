// A classifier service: worker threads answer the lines of the standard input, each with the label whose description is
// most similar, within an error budget that is calibrated on a file of texts. Nothing is trained, and no text has to
// be labelled.
//
//   llmcache-classifier-service build/models/minilm-pooled.pt LABELS SAMPLE < TEXTS
//
// LABELS: one "NAME: description" per line. SAMPLE: some thousand texts like those that will come, one per line.
#include <ATen/Parallel.h>
#include <llmcache/llmcache.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <future>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;
constexpr std::size_t kBatch = 8;
constexpr std::int64_t kMostTokens = 256;

std::vector<std::string> lines_of(std::istream& in) {
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) {
    if (!line.empty()) lines.push_back(line);
  }
  return lines;
}

std::vector<std::string> lines_of(const std::string& path) {
  if (std::ifstream file(path); file) return lines_of(file);
  throw std::runtime_error("there is no file " + path);
}

/// Texts as batches of the model's inputs.
std::vector<llmcache::Inputs> batches_of(const std::vector<std::string>& texts, Tokenizer& tokenizer,
                                         const llmcache::ModelProfile& profile) {
  std::vector<llmcache::Inputs> batches;
  for (std::size_t first = 0; first < texts.size(); first += kBatch) {
    std::vector<std::vector<std::int64_t>> rows;
    for (std::size_t i = first; i < std::min(texts.size(), first + kBatch); ++i) {
      rows.push_back(tokenizer.encode(texts[i], kMostTokens));
    }
    batches.push_back(llmcache::pad(rows).inputs(profile));
  }
  return batches;
}

void run(const std::string& model, const std::string& labels_path, const std::string& sample_path) {
  at::set_num_threads(1);  // the workers are the parallelism
  Tokenizer tokenizer(default_python(), default_helper(), tokenizer_beside(model));
  llmcache::Options options;
  options.profile_path = profile_beside(model);
  options.progress = progress_on_terminal();
  llmcache::TorchScriptCache plain = llmcache::load(model, options);

  // The embeddings of the labels are the classifier.
  std::vector<std::string> names, descriptions;
  for (const std::string& line : lines_of(labels_path)) {
    const auto colon = std::min(line.find(": "), line.size());
    names.push_back(line.substr(0, colon));
    descriptions.push_back(line.substr(std::min(line.size(), colon + 2)));
  }
  std::vector<at::Tensor> embedded;
  for (const auto& batch : batches_of(descriptions, tokenizer, plain.profile())) {
    embedded.push_back(plain.forward(batch).toTensor());
  }
  const auto scores = llmcache::linear_scores(at::cat(embedded));

  // At most 2 % of the answers may differ from the full model's, with confidence 0.9.
  options.fidelity = llmcache::Fidelity::kBudget;
  options.budget.budget = {.metric = llmcache::BudgetMetric::kDecision, .epsilon = 0.02, .delta = 0.1};
  options.budget.scores = scores;
  llmcache::TorchScriptCache cache = plain.with_options(options);
  std::cout << cache.calibrate(batches_of(lines_of(sample_path), tokenizer, cache.profile())).to_string() << "\n";

  const auto texts = lines_of(std::cin);
  const auto batches = batches_of(texts, tokenizer, cache.profile());
  std::vector<std::string> answers(texts.size());
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t b = next++; b < batches.size(); b = next++) {
      const at::Tensor best = scores(cache.forward(batches[b]).toTensor()).argmax(1);
      const auto* label = best.const_data_ptr<std::int64_t>();
      for (std::size_t row = 0; row < static_cast<std::size_t>(best.size(0)); ++row) {
        answers[b * kBatch + row] = names[static_cast<std::size_t>(label[row])];
      }
    }
  };
  std::vector<std::future<void>> workers(std::max(1U, std::thread::hardware_concurrency()));
  for (auto& worker : workers) worker = std::async(std::launch::async, work);
  for (auto& worker : workers) worker.get();  // what a call throws comes out here
  for (std::size_t i = 0; i < texts.size(); ++i) std::cout << answers[i] << "\t" << texts[i] << "\n";
  std::cout << cache.stats().to_string();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: llmcache-classifier-service MODEL.pt LABELS SAMPLE < TEXTS\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << "llmcache-classifier-service: " << one_line(error) << "\n";
    return 1;
  }
  return 0;
}
