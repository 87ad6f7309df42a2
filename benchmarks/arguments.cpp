#include "arguments.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <set>
#include <sstream>
#include <system_error>

#include "failure.h"
#include "llmcache/version.h"

namespace llmcache::bench {
namespace {

constexpr std::size_t kNameColumn = 30;
constexpr const char* kShotWorkload = "openbookqa";
constexpr std::int64_t kKvcacheMib = 1024;  // a decoder has room for one request, however small the caches are

constexpr const char* kDescription =
    "llmcache-bench: runs recorded requests through a model, plain and wrapped in caches, side by side in one "
    "process,\n"
    "and reports what became of the answers, speedup, hit rate, latency, divergence from the plain model, and memory.\n"
    "\n"
    "Without options it measures in under 10 minutes what users would choose: encoders with trained weights on questions\n"
    "(the paper's mode, a semantic cache, an error budget), edited documents and choices; decoders on conversations,\n"
    "documents, choices, articles and generation against an ordinary key-value cache; models with random weights on the\n"
    "paper's workloads. Where the raw data of a workload are missing, the sample of its kind runs (sample-faq for\n"
    "banking77, ...). Calibrations are kept in MODELS/calibrations. With options, every full-size model runs on the\n"
    "workloads made for its tokenizer (clinc150, qqp and stsb only where the model embeds sentences, chat and\n"
    "generate-512 only where the weights are real).";

constexpr const char* kFooter = R"(
Modes
  nocache    the TorchScript module as loaded, on the padded batch, without gradients. All outputs are computed.
  kvcache    what an ordinary decoder does (models that llmcache can reuse prefixes of): keys and values are kept inside
             one request, whose later tokens are computed behind them, and nothing across requests, nor across the turns
             of a conversation. It is llmcache, fidelity lossless, emptied before each request and turn. Requests that
             are sent in one piece, such as the four choices of a question, are computed whole; their padding is not.
  llmcache   llmcache::LayerCache around the same module: weights are shared, not loaded twice. With --fidelity
             identical, lossless, budget or threshold. Budget: a sequence leaves the pass as soon as its answer can be
             told well enough, or takes states of its tokens or segments from earlier ones, so that the mean error stays
             at or below E; a workload with a training part, on which it is calibrated before the clock starts.
             Workloads made for it run only if they are named: agnews, clinc150-in-scope, edits, instruct, small-edits
             and sst2 (encoders), chat-edit and passages (decoders). Threshold is the LLMCache paper (arXiv
             2512.16843): whole hidden states of the most similar earlier request where its similarity is T or more.
  doccache   the paper's rival, a semantic cache of final outputs: same fingerprint, same T; a hit returns the kept
             output of the most similar earlier request, and the model's layers do not run at all.
  Every value of --threshold, --epsilon, --early-exit, --capacity-mib, --eviction and --weights is a setting with a cache
  of its own and a line of its own.
  threshold and doccache run, unless --fidelity, --threshold or --mode ask for them, only where quality can be measured
  and prefixes are not reused.

How it measures
  Each request runs in all settings, one after the other, in an order that turns from request to request. The first
  requests are run beforehand to warm up, and the caches are emptied after that. Latency is wall time per request, but
  for comparing answers with the plain model's: the first one of each size, and about 1 in 1,000 later (at most 1 % of
  the time). verification_ms in the results says how long that took in all (Options::verify_rate).
  Some workloads have a fill part (banking77 and clinc150: the training queries; qqp: the first texts of the pairs).
  It is put into the caches before, untimed, in at most 60 % of the time budget, and every request of it is computed
  and kept, none is served. 'filled' says how many requests of how many that were. Where only identical requests count,
  the fill requests that have a sequence in common with a later one are enough, and only these are run.
  kvcache and llmcache ask for the outputs that the workload needs (--output changes that): of decoders the tokens that
  are new where log-likelihoods are scored (wikitext, openbookqa), otherwise the last token of each sequence. A squad
  request is sent as a decoder would be asked to score an answer: passage and question, of which the last token's output
  is wanted ('prefill'), then the same with the gold answer behind it. llmcache with fidelity threshold or identical,
  and doccache, return all.
  Prefill is the time until the first token's output is there: of the first call of a request, of nocache the whole one.
  T is a cosine (SimHash: estimated from the Hamming distance; jaccard: the Jaccard similarity). With --centre on the
  mean state is taken off first, and cosines are much smaller than without.

Quality (models with random weights: none, only divergence)
  accuracy         banking77, clinc150: linear probe on the pooled output, fitted on uncached training outputs.
  choice_accuracy  openbookqa: the right choice has the largest sum of log-likelihoods; choice_accuracy_per_byte: the
                   largest sum divided by the choice's length in bytes.
  perplexity       wikitext: of the tokens that are new in the request.
  answer_nll       squad: negative log-likelihood of the gold answer, nats a token; 'same answer': the share of served
                   requests whose cached request has the same gold answer, or like them none.
  spearman         stsb: rank correlation of the cosine of a pair's outputs with its gold score.
  precision        qqp: served from the pair's other text and labelled a duplicate / served from it. recall: the same /
                   pairs labelled duplicate. unsafe: labelled no duplicate / all served, with Wilson's 95 % interval.
                   A text with the same tokens counts as right; one of another pair has no label and counts as served.
  Log-likelihoods are summed over the tokens whose logits came back in every setting. That is all of them, unless a
  request was known before: an output of new tokens lacks the logits that predict the first of them. (Of a growing
  document the benchmark has these from the request before.)
  The change against nocache over the same requests follows, with its 95 % interval (paired bootstrap over requests).

Columns
  hits       sequences answered from an earlier request, or before the last layer / all sequences.
  promised   fidelity budget: upper bound of the error by calibration. error: mean over all sequences against nocache,
             with its 95 % interval; audits, which count as served, are answered without error.
  requests   run, of those in the stream; fewer where the time budget ended first.
  speedup    sum of nocache latencies / sum of this setting's latencies, over the same requests.
  computed   tokens that went through the layers / real tokens; padding counts, so a plain padded batch is above 1.
  divergence relative L2 distance of a request's outputs that came back from nocache's, padding excluded: mean, largest.
  prefill ms, vs nocache, vs kvcache
             mean, and how many times as fast as these over the same requests; kvcache with the same weights.
  reused     tokens of the prompts known from earlier requests / all. shared: computed once for several rows / all.
  decode ms  mean time of a further token. tokens/s: new tokens / all time, prefill included.
  later turns
             of conversations: prefill of the second turn, which sends the whole conversation again.
  greedy     tokens that come out on top as in nocache / all that were compared; the others are listed below the table
             where the weights are as loaded ('tied': their logits lie within 1e-4 of the best in nocache).
  cache MiB  held by the cache at the end.

Text generation (generate-128, generate-512, chat)
  Each setting continues the prompt greedily, token by token. nocache runs the whole sequence for each token: it says
  as many as 40 % of the time budget allow, one more than the first at least, and the others count with the mean time
  of these. All tokens of the other settings are checked: one pass of nocache over a whole sequence has the logits that
  it would have had token by token.

The second table says what wrapping cost: time, and resident memory of the process before and after it beside the size of
the model's weights. 'runs' is what the model allows: whole layers, packed batches, or single tokens.

Files
  MODELS/NAME.pt, NAME.json                    model and its description          (tools/export_models.py)
  DATA/WORKLOAD.TOKENIZER.safetensors          tokenized requests                 (tools/prepare_data.py)
  DATA/WORKLOAD.MODEL.probe.safetensors        linear probe                       (tools/fit_probe.py)

Exit status: 0, or 2 after an error, which is one line on stderr. Results that were measured are shown all the same.

Examples
  llmcache-bench --list
  llmcache-bench --model minilm-pooled --workload banking77 --seconds 120
  llmcache-bench --model minilm-pooled --workload banking77 --mode nocache,llmcache,doccache --fidelity threshold
                 --threshold 0.80,0.85,0.90,0.95 --fingerprint raw --centre off --limit 200
  llmcache-bench --model minilm-pooled --workload clinc150 --fidelity threshold --threshold 0.9 --fingerprint raw
                 --centre off --capacity-mib 1,4,16,64
  llmcache-bench --model gpt2,smollm2 --zipf 1.0 --shuffle 7 --json results.json
  llmcache-bench --model smollm2 --workload squad,openbookqa --mode kvcache,llmcache --fidelity lossless --limit 100
  llmcache-bench --model smollm2 --workload openbookqa --shots 5 --weights as-loaded,packed-fp16
  llmcache-bench --model /models/mine.pt --tokenizer bert-base-uncased --mode nocache
)";

std::string command_text(int argc, const char* const* argv) {
  std::string text = std::filesystem::path(argv[0]).filename().string();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool quote = argument.empty() || argument.find_first_of(" \t\"'$*;&|<>()") != std::string::npos;
    text += quote ? fmt::format(" '{}'", argument) : " " + argument;
  }
  return text;
}

/// Breaks a description into lines that fit beside the names of the options.
std::string wrapped(const std::string& text) {
  constexpr std::size_t kWidth = 120 - kNameColumn;
  std::string lines;
  std::size_t used = 0;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    if (used > 0 && used + 1 + word.size() > kWidth) {
      lines += '\n';
      used = 0;
    } else if (used > 0) {
      lines += ' ';
      ++used;
    }
    lines += word;
    used += word.size();
  }
  return lines;
}

/// A number from `low` to `high`; unlike CLI::Range it refuses NaN.
CLI::Validator number_between(double low, double high) {
  return {[low, high](const std::string& text) {
            char* end = nullptr;
            const double value = std::strtod(text.c_str(), &end);
            const bool good = end != text.c_str() && *end == '\0' && value >= low && value <= high;
            return good ? std::string() : fmt::format("'{}' is not a number from {} to {}", text, low, high);
          },
          ""};
}

/// Digits only: a conversion to an unsigned number takes -1 for a large one.
CLI::Validator digits() {
  return {[](const std::string& text) {
            const bool good = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
            return good ? std::string() : fmt::format("'{}' is not a whole number, 0 or more", text);
          },
          ""};
}

/// "all", "last", or layers with commas.
CLI::Validator layer_list() {
  return {[](const std::string& text) {
            bool good = text == "all" || text == "last";
            if (!good) {
              good = !text.empty() && text.front() != ',' && text.back() != ',' &&
                     text.find_first_not_of("0123456789,") == std::string::npos && text.find(",,") == std::string::npos;
            }
            return good ? std::string() : fmt::format("'{}' is not all, last, or layers like 0,3,5", text);
          },
          ""};
}

/// Sorted without doubles, so that no setting runs twice.
template <class T>
void make_unique(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

}  // namespace

bool Arguments::has_mode(const std::string& mode) const {
  return std::find(modes.begin(), modes.end(), mode) != modes.end();
}

std::filesystem::path program_folder() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::filesystem::current_path() : program.parent_path();
}

Arguments parse_arguments(int argc, const char* const* argv) {
  Arguments arguments;
  arguments.command = command_text(argc, argv);
  arguments.models_folder = (program_folder() / ".." / "models").lexically_normal();
  arguments.data_folder = (program_folder() / ".." / "data").lexically_normal();

  CLI::App app(kDescription, "llmcache-bench");
  app.footer(kFooter);
  app.get_formatter()->column_width(kNameColumn);
  app.set_version_flag("--version", "llmcache-bench " LLMCACHE_VERSION);
  const auto list = [&](const char* name, std::vector<std::string>& target, const char* type, const char* help) {
    return app.add_option(name, target, help)->delimiter(',')->type_name(type);
  };
  list("--model", arguments.models, "NAME|PATH", "models by name, or paths of .pt files [all full-size models]");
  list("--workload", arguments.workloads, "NAME",
       "workloads by name [those made for the model's tokenizer, see above]");
  const auto* mode = list("--mode", arguments.modes, "MODE",
                          "nocache, kvcache, llmcache, doccache [all; kvcache only for decoders, doccache only for "
                          "others and where quality can be measured]")
                         ->check(CLI::IsMember({"nocache", "kvcache", "llmcache", "doccache"}));
  const auto* fidelity =
      list(
          "--fidelity", arguments.fidelities, "LEVEL",
          "what llmcache may reuse: identical (whole outputs of identical requests, bit-identical), lossless (and "
          "padding is not computed; equal up to rounding), budget (answers whose mean error stays below --epsilon), "
          "threshold (whole hidden states of similar requests: no promise) [lossless,threshold; threshold as doccache]")
          ->check(CLI::IsMember({"identical", "lossless", "budget", "threshold"}));
  app.add_option(
         "--metric", arguments.metric,
         "what the error of fidelity budget is: decision (another class than without cache; by the workload's "
         "probe where it has one), relative (distance to the output without cache / mean distance between "
         "outputs), token (decoders: another token comes out on top behind the last one) [decision; decoders: token]")
      ->check(CLI::IsMember({"decision", "relative", "token"}))
      ->type_name("METRIC");
  app.add_option("--epsilon", arguments.epsilons,
                 "error budgets of fidelity budget: largest mean error among all sequences [0.005,0.01,0.02]")
      ->delimiter(',')
      ->check(number_between(1e-6, 0.5))
      ->type_name("E");
  app.add_option("--delta", arguments.delta, "fidelity budget may fail with this probability over calibrations [0.1]")
      ->check(number_between(1e-6, 1 - 1e-6))
      ->type_name("D");
  app.add_option(
         "--calibration", arguments.calibration,
         "of fidelity budget: auto (on the workload's training part, before the clock starts), or the file of a "
         "profile: used if it is there, else calibrated and written; for one --epsilon and one --early-exit "
         "[auto]")
      ->type_name("auto|FILE");
  list("--early-exit", arguments.early_exits, "HOW",
       "of fidelity budget: neighbour (answers of similar sequences, corrected), cache-free (regressed from the state "
       "alone) [neighbour,cache-free]")
      ->check(CLI::IsMember({"neighbour", "cache-free"}));
  app.add_option("--bank-format", arguments.bank_format,
                 "how fidelity budget holds states of tokens: as-computed, bfloat16, float16, int8 [as-computed]")
      ->check(CLI::IsMember({"as-computed", "bfloat16", "float16", "int8"}))
      ->type_name("FORMAT");
  list("--weights", arguments.weights, "HOW",
       "how kvcache and llmcache hold the weights of linear layers: as-loaded, packed-fp32, packed-fp16 (half the "
       "memory; the quality columns say what it costs) [as-loaded]")
      ->check(CLI::IsMember({"as-loaded", "packed-fp32", "packed-fp16"}));
  app.add_option(
         "--output", arguments.output,
         "what kvcache and llmcache (fidelity lossless) ask for: all, last (token of each sequence), new (tokens "
         "that were not known before) [what the workload needs]")
      ->check(CLI::IsMember({"all", "last", "new"}))
      ->type_name("WHICH");
  app.add_option(
         "--shots", arguments.shots,
         "openbookqa with N solved examples in front of each question, the same for all; prepare_data.py --shots "
         "N makes the file [0]")
      ->check(number_between(0, 99))
      ->type_name("N");
  const auto* threshold =
      app.add_option("--threshold", arguments.thresholds,
                     "similarity from which on an earlier request counts, -1 to 1, for fidelity threshold and doccache "
                     "[0.85,0.9,0.95]")
          ->delimiter(',')
          ->check(number_between(-1, 1))
          ->type_name("T");
  app.add_flag("--equal-error", arguments.equal_error,
               "beside budgets of encoders: fidelity threshold too, for each --epsilon from the similarity on at which "
               "its error on the training part is as large");
  app.add_option("--fingerprint", arguments.fingerprint,
                 "what similarity is measured on: raw (mean state), pca, simhash64, simhash128, simhash256, jaccard "
                 "(token shingles) [simhash128]")
      ->check(CLI::IsMember({"raw", "pca", "simhash64", "simhash128", "simhash256", "jaccard"}))
      ->type_name("KIND");
  app.add_option("--fingerprint-layer", arguments.fingerprint_layer,
                 "whose state: 0 the embedding output, K the state after K layers [0]")
      ->check(digits())
      ->type_name("K");
  std::string centre = "on";
  app.add_option("--centre", centre, "on: take the running mean state off first; off [on]; pca has its own mean")
      ->check(CLI::IsMember({"on", "off"}))
      ->type_name("on|off");
  app.add_option(
         "--pca", arguments.pca,
         "file of a fitted PCA, for --fingerprint pca [fitted on the fill part of the workload, or on its first "
         "requests where it has none]")
      ->type_name("FILE");
  app.add_option("--cache-layers", arguments.cache_layers,
                 "layers whose output fidelity threshold keeps: all, last, or numbers from 0 on like 0,3,5 [last: with "
                 "one fingerprint a hit always goes on from the deepest]")
      ->check(layer_list())
      ->type_name("LAYERS");
  list("--eviction", arguments.evictions, "POLICY",
       "what fidelity threshold drops for room: lru, decay, s3fifo, gdsf [lru]; doccache: always lru")
      ->check(CLI::IsMember({"lru", "decay", "s3fifo", "gdsf"}));
  app.add_option("--ttl", arguments.ttl_seconds, "seconds after which fidelity threshold drops an entry [never]")
      ->check(number_between(1e-3, 1e9))
      ->type_name("S");
  app.add_option("--shadow-rate", arguments.shadow_rate,
                 "share of hits of fidelity threshold that are also computed in full, to watch the drift [0]")
      ->check(number_between(0, 1))
      ->type_name("P");
  app.add_option("--threads", arguments.threads, "threads within an operator [1]; between operators always 1")
      ->check(number_between(1, 1024))
      ->type_name("N");
  app.add_option("--batch", arguments.batch,
                 "sequences a request, for workloads of independent sequences [as in the file: its description says]")
      ->check(number_between(1, 4096))
      ->type_name("N");
  app.add_option("--limit", arguments.limit,
                 "requests of each workload, the first of the file [all that the time budget allows]")
      ->check(number_between(1, 1e12))
      ->type_name("N");
  app.add_option("--seconds", arguments.seconds,
                 "time budget of each model on each workload, warm-up included, wrapping not; one request always runs "
                 "[with --limit: "
                 "none; otherwise a share of 6 minutes, most where quality can be measured, at most 30 for a workload "
                 "with a task]")
      ->check(number_between(1e-3, 1e6))
      ->type_name("S");
  app.add_option("--shuffle", arguments.shuffle,
                 "send requests (with --limit: the first ones) in an order drawn with this seed [the file's order; "
                 "workloads whose file is grouped by label are always shuffled, all of them, with seed 0]")
      ->check(digits())
      ->type_name("SEED");
  app.add_option("--zipf", arguments.zipf,
                 "draw requests, with repeats, by a Zipf law with this exponent: the k-th request of the stream with "
                 "probability ~ 1/k^S, with the seed of --shuffle or 0 [each request once]")
      ->check(number_between(0, 10))
      ->type_name("S");
  app.add_option("--capacity-mib", arguments.capacities_mib, "capacity of each cache in MiB [1024]")
      ->delimiter(',')
      ->check(number_between(0, 1 << 20))
      ->type_name("N");
  app.add_option("--models", arguments.models_folder, "folder of the models [../models beside the program's folder]")
      ->type_name("DIR");
  app.add_option("--data", arguments.data_folder, "folder of the token files [../data beside the program's folder]")
      ->type_name("DIR");
  app.add_option("--tokenizer", arguments.tokenizer,
                 "tokenizer of models that have no sidecar: bert-base-uncased, gpt2, smollm2, ...")
      ->type_name("NAME");
  app.add_option("--json", arguments.json, "write the results to this file, see benchmarks/results.schema.json")
      ->type_name("FILE");
  app.add_flag("--list", arguments.list, "print the models and workloads found, and stop");

  for (CLI::Option* option : app.get_options()) option->description(wrapped(option->get_description()));

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForVersion&) {
    throw HelpAsked{app.version() + "\n"};
  } catch (const CLI::CallForHelp&) {
    throw HelpAsked{app.help()};
  } catch (const CLI::ParseError& error) {
    throw Failure(fmt::format("{}; llmcache-bench --help lists the options", error.what()));
  }
  static const std::set<std::string> kAnywhere = {"--models", "--data", "--json", "--threads", "--list"};
  const auto options = app.get_options();
  arguments.first_run = std::none_of(options.begin(), options.end(), [](const CLI::Option* one) {
    return one->count() > 0 && kAnywhere.count(one->get_name()) == 0;
  });
  arguments.kvcache_asked = mode->count() > 0 && arguments.has_mode("kvcache");
  arguments.doccache_asked = mode->count() > 0;
  arguments.budget_asked =
      std::find(arguments.fidelities.begin(), arguments.fidelities.end(), "budget") != arguments.fidelities.end();
  arguments.threshold_asked = fidelity->count() > 0 || threshold->count() > 0;
  arguments.centre = centre == "on";
  make_unique(arguments.modes);
  make_unique(arguments.fidelities);
  make_unique(arguments.weights);
  make_unique(arguments.thresholds);
  make_unique(arguments.epsilons);
  std::sort(arguments.early_exits.begin(), arguments.early_exits.end(), std::greater<>());
  arguments.early_exits.erase(std::unique(arguments.early_exits.begin(), arguments.early_exits.end()),
                              arguments.early_exits.end());
  if (arguments.calibration != "auto" && (arguments.epsilons.size() > 1 || arguments.early_exits.size() > 1)) {
    throw Failure("--calibration FILE holds one profile: name one --epsilon and one --early-exit beside it");
  }
  if (!arguments.budget_asked && (arguments.equal_error || arguments.bank_format != "as-computed")) {
    throw Failure("--equal-error and --bank-format are for budgets: name budget in --fidelity");
  }
  make_unique(arguments.evictions);
  make_unique(arguments.capacities_mib);
  if (arguments.pca && arguments.fingerprint != "pca") {
    throw Failure(
        fmt::format("--pca {} is only for --fingerprint pca, not {}", arguments.pca->string(), arguments.fingerprint));
  }
  if (arguments.shots > 0) {
    const std::string with_shots = fmt::format("{}-{}shot", kShotWorkload, arguments.shots);
    std::replace(arguments.workloads.begin(), arguments.workloads.end(), std::string(kShotWorkload), with_shots);
    const auto& all = arguments.workloads;
    if (!all.empty() && std::find(all.begin(), all.end(), with_shots) == all.end()) {
      throw Failure(fmt::format("--shots {} is for the workload {}, which --workload does not name", arguments.shots,
                                kShotWorkload));
    }
  }
  return arguments;
}

std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers) {
  std::vector<std::int64_t> chosen;
  if (cache_layers == "all") {
    for (std::int64_t layer = 0; layer < layers; ++layer) chosen.push_back(layer);
  } else if (cache_layers == "last") {
    chosen.push_back(layers - 1);
  } else {
    std::istringstream numbers(cache_layers);
    for (std::string number; std::getline(numbers, number, ',');) {
      const std::int64_t layer = number.size() > 9 ? layers : std::stoll(number);
      if (layer >= layers) {
        throw Failure(fmt::format("--cache-layers {}: the model has no layer {}, its layers are 0 to {}", cache_layers,
                                  number, layers - 1));
      }
      chosen.push_back(layer);
    }
    make_unique(chosen);
  }
  return chosen;
}

std::vector<Setting> settings(const Arguments& arguments, const Possible& possible) {
  std::vector<Setting> all;
  if (arguments.has_mode("nocache")) all.push_back({.mode = "nocache"});
  if (arguments.has_mode("kvcache") && possible.prefix_reuse) {
    for (const std::string& weights : arguments.weights) {
      all.push_back({.mode = "kvcache",
                     .fidelity = "lossless",
                     .capacity_mib = std::max(kKvcacheMib, arguments.capacities_mib.back()),
                     .weights = weights});
    }
  }
  const bool similar = possible.quality && !possible.prefix_reuse;  // what nobody asked for by name
  const auto at_thresholds = [&](const Setting& setting) {
    for (const double threshold : arguments.thresholds) {
      all.push_back(setting);
      all.back().threshold = threshold;
    }
  };
  for (const std::int64_t capacity : arguments.capacities_mib) {
    if (!arguments.has_mode("llmcache")) break;
    for (const std::string& fidelity : arguments.fidelities) {
      if (possible.generation && fidelity != "lossless") continue;
      for (const std::string& weights : arguments.weights) {
        const Setting setting = {
            .mode = "llmcache", .fidelity = fidelity, .capacity_mib = capacity, .weights = weights};
        if (fidelity == "budget") {
          for (const double epsilon : arguments.epsilons) {
            for (const std::string& early_exit : arguments.early_exits) {
              if (!possible.budget) break;
              all.push_back(setting);
              all.back().epsilon = epsilon;
              all.back().early_exit = possible.prefix_reuse ? "off" : early_exit;
              if (possible.prefix_reuse) break;  // nothing leaves a decoder early
            }
          }
        } else if (fidelity != "threshold") {
          all.push_back(setting);
        } else if (similar || arguments.threshold_asked) {
          for (const std::string& eviction : arguments.evictions) {
            Setting one = setting;
            one.eviction = eviction;
            at_thresholds(one);
          }
        }
      }
    }
  }
  // Behind the budgets, whose calibration tells what an error is.
  const std::vector<Setting> before = all;
  std::vector<std::pair<double, std::string>> errors;
  for (const Setting& setting : before) {
    const std::pair error(setting.epsilon.value_or(0), setting.weights);
    if (!arguments.equal_error || !setting.epsilon || possible.prefix_reuse) continue;
    if (std::find(errors.begin(), errors.end(), error) != errors.end()) continue;
    errors.push_back(error);
    all.push_back({.mode = "llmcache",
                   .fidelity = "threshold",
                   .eviction = arguments.evictions.front(),
                   .capacity_mib = setting.capacity_mib,
                   .weights = setting.weights,
                   .equal_error = setting.epsilon});
  }
  if (!arguments.has_mode("doccache") || possible.generation) return all;
  if (!similar && !arguments.doccache_asked) return all;
  for (const std::int64_t capacity : arguments.capacities_mib) {
    at_thresholds({.mode = "doccache", .eviction = "lru", .capacity_mib = capacity});
  }
  return all;
}

}  // namespace llmcache::bench
