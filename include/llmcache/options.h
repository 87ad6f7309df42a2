// What the caller chooses, once per cache (Options) and per call (RequestOptions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/eviction.h"
#include "llmcache/refresh/budget.h"
#include "llmcache/refresh/options.h"
#include "llmcache/snapshot.h"
#include "llmcache/store/store_options.h"
#include "llmcache/tenants.h"
#include "llmcache/threshold.h"

namespace llmcache {

class LayerHook;

/// How much may be reused, and what is promised in return.
enum class Fidelity {
  /// Whole outputs of identical requests: all token-level inputs are compared, never a hash alone.
  /// A request that is not known runs exactly as the plain model runs it, padding included, so the
  /// result is bit-identical to what the model returned when that request was first computed.
  kIdentical,
  /// As kIdentical, and the rows of a padded batch are packed so that padding is never computed, and a
  /// causal model computes only the tokens behind the longest prefix that it has computed before
  /// (PrefixOptions). Equal to the plain model up to floating-point rounding; bit-identical where
  /// nothing is padded and nothing is known from another batch or a longer or shorter sequence.
  kLossless,
  /// As kLossless, and answers are reused that may be wrong, as often as a calibration allows
  /// (LayerCache::calibrate(), BudgetOptions): with confidence 1 - delta the mean error stays at or below epsilon, and
  /// a share of the reused answers is computed in full too to see that it does. Without a calibration as kLossless. For
  /// a cache that was made for it (Options::fidelity).
  kBudget,
  /// Whole hidden states of another request, where its fingerprint is similar enough (LLMCache, arXiv
  /// 2512.16843): the answer is then that of the other request. No promise but the threshold. For a
  /// cache that was made for it (Options::fidelity), see ThresholdOptions.
  kThreshold,
};

const char* to_string(Fidelity fidelity) noexcept;
/// The inverse of to_string ("identical", "lossless", "budget", "threshold").
/// Throws Error(kInvalidOptions) for any other text.
Fidelity fidelity_from_string(const std::string& text);

/// Which tokens' results a call returns. Outputs without a token dimension (a pooled or classified
/// sequence) are the same for all three.
enum class Output {
  /// Exactly what the module returns.
  kAll,
  /// Of each sequence the last real token: token dimensions have size 1. Rows without a real token are zero.
  kLastToken,
  /// Of each sequence the tokens that were not known before the call: the last
  /// SequenceReport::tokens - SequenceReport::reused_tokens of it. They stand at the start of the token
  /// dimension, whose size is the largest such number in the batch (0: all rows were known); behind
  /// them is zero.
  kNewTokens,
};

/// "all", "last", "new".
const char* to_string(Output output) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
Output output_from_string(const std::string& text);

/// How the weights of linear layers are held: aten::linear, aten::addmm as in GPT-2, and products with a weight. Packed
/// ones are copies in the order in which a CPU reads them. The
/// library then lets go of what it no longer needs: memory is freed as soon as the caller drops the module (or hands it
/// over: LayerCache(torch::jit::load(...), ...)).
enum class Weights {
  /// The module's own tensors. Bit-identical to the module.
  kAsLoaded,
  /// Packed for the CPU's matrix product by oneDNN. Equal up to floating-point rounding.
  kPackedFp32,
  /// Rounded to half precision: fastest for few tokens. With AVX-512 it is packed by FBGEMM, which pads rows to 512, so
  /// that it takes 0.7 to 1.0 times the memory of the weights as loaded (docs/memory.md); with AVX2 alone it takes half
  /// of it. Sums stay float32, results move by about 1e-3 of their scale. Takes float32 and float16 modules; a weight
  /// beyond the range of half precision is refused.
  kPackedFp16,
  /// Rounded to bfloat16, half the memory of float32. With AVX-512 oneDNN multiplies, and what enters a product is
  /// rounded to bfloat16 too. Elsewhere it stays float32, as does what is between the products of a float32 module
  /// everywhere. Results move by about 1e-2 of their scale, as those of a module that was converted to bfloat16. Takes
  /// float32, bfloat16 and float16 modules. Fastest where the CPU multiplies bfloat16 (AMX, AVX512-BF16), and faster
  /// than float32 with AVX2.
  kPackedBFloat16,
  /// Rounded to 8 bits, with a scale for each output channel; takes about 0.27 of the memory of float32. What enters a
  /// product is rounded to 8 bits too, with a scale of its own for each token, so that a token's product does not
  /// depend on what stands beside it, bit for bit. Results move by some hundredths of their scale: the one lossy
  /// format, whose effect on the caller's task has to be measured. Language models need Options::weights_sample. Takes
  /// float32, bfloat16 and float16 modules. Fastest where the CPU multiplies 8-bit integers (AMX, AVX512-VNNI), by
  /// oneDNN; elsewhere products are added in 32 bits, which is faster than float32 too.
  kPackedInt8,
  /// Whichever of the others is fastest on this CPU for the shapes of the model's own layers, found out while wrapping,
  /// by products of few rows (1, 4 and 16) and of many (64 and 128). Formats that are not available are left out, and
  /// kPackedInt8 too unless Options::fastest_may_be_int8 is set. ModelProfile::weights tells which it is, and
  /// ModelProfile::weights_reason why.
  kFastest,
};

/// "as-loaded", "packed-fp32", "packed-fp16", "packed-bf16", "packed-int8", "fastest".
const char* to_string(Weights weights) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
Weights weights_from_string(const std::string& text);

/// Settings of prefix reuse: for a causal model, Fidelity::kLossless keeps keys and values (the KV cache)
/// of all sequences in a prefix tree, so that a request computes only what follows the longest prefix
/// known from any earlier request of its tenant. Used where ModelProfile::prefix_reuse is true.
struct PrefixOptions {
  /// Part of Options::capacity_bytes that keys and values get, 0 to 1; the rest keeps whole outputs. For kBudget: part
  /// of what BudgetOptions::capacity_share leaves.
  /// 0 switches prefix reuse off. Default 0.9: outputs of a language model are large and cheap to make again.
  double capacity_share = 0.9;

  /// Layers whose keys and values are kept, counted from 0, ascending. A known prefix runs again through all
  /// layers up to the highest that is not kept. Empty (default): all of them.
  std::vector<std::int64_t> layers = {};

  /// Which part of the tree goes when room is needed; of a branch the end goes first.
  EvictionOptions eviction = {};

  /// Throws Error(kInvalidOptions) that names the field at fault. `layers`: of the model, 0 if not known.
  void validate(std::int64_t model_layers = 0) const;
};

/// How far wrapping or a calibration has come.
struct Progress {
  std::string step;        ///< what is being done, such as "checking prefix reuse"; at the end of all "done"
  std::int64_t done = 0;   ///< of this step: requests
  std::int64_t total = 0;  ///< of this step; 0: not known
};
using ProgressFunction = std::function<void(const Progress& progress)>;

/// Settings of a LayerCache. A plain struct: set what differs from the default.
struct Options {
  /// What a request gets that does not name its own. Default: the strongest promise that still
  /// saves work on every padded batch.
  Fidelity fidelity = Fidelity::kLossless;

  /// Upper bound in bytes for everything the cache keeps: tensors, keys and index together. The
  /// bound is enforced before anything is taken over, so it holds at every moment. 0 keeps nothing.
  /// An entry that is larger than this is not kept (counted in Stats::rejected).
  /// What a running request computes is its own until it returns: only then is anything evicted for it,
  /// known or counted, and a request that fails leaves the cache as it was. Until then it is working
  /// memory beside the capacity: of prefixes, token states and segments at most as much again, of all
  /// running requests together.
  /// On other devices than CPUs a tensor counts in whole steps of 512 bytes, as allocators of devices hand memory out;
  /// docs/devices.md has what they take beside that.
  /// Default 256 MiB: about 680 outputs of BERT-base at 128 tokens.
  std::size_t capacity_bytes = std::size_t{256} << 20;

  /// Dotted path of the module that contains the chain of layers, as in named_modules(), e.g.
  /// "model.bert.encoder.layer". Empty (default): found by data flow.
  std::string layers = {};

  /// Position of the attention mask among the model's inputs (0 is input_ids). Unset (default):
  /// found by probing. -1: the model takes no mask, every token is real.
  std::optional<int> mask_argument = {};

  /// How weights are held. Packing takes a TorchScript module, a CPU and float32 weights (kPackedBFloat16 and
  /// kPackedInt8 take bfloat16 too); elsewhere wrapping throws Error(kNotAvailable), and kFastest leaves them as they
  /// are. Packed, the model no longer depends on the module: what is put in an attribute's place or
  /// its training mode has no effect; writing to or converting a tensor that it held is noticed (kModelChanged) for as
  /// long as somebody holds that tensor. Kept outputs never mix: the digest tells the formats apart. Default: as they
  /// are.
  Weights weights = Weights::kAsLoaded;

  /// True: Weights::kFastest may choose kPackedInt8, whose results differ most from the module's. Default: it chooses
  /// among formats whose error is at most that of bfloat16.
  bool fastest_may_be_int8 = false;

  /// Token ids of a few texts that are typical of what the model will get; some hundred tokens in all are enough.
  /// kPackedInt8 takes from them which inputs of each layer are the largest. These (32 of a layer) are multiplied in
  /// float32, and the others scaled so that rounding costs less (LLM.int8(), arXiv 2208.07339; SmoothQuant, arXiv
  /// 2211.10438). Language models need it (docs/performance.md). The texts run once while the model is wrapped, one by
  /// one; what was found is a part of the digest. Empty texts and ids that the model does not know are
  /// Error(kInvalidInput). Other formats do not use them. Default: none, all inputs are rounded alike.
  std::vector<std::vector<std::int64_t>> weights_sample = {};

  /// A file that keeps what probing found, so that wrapping the same model again probes nothing: seconds become tenths
  /// of one. It holds for one module (structure, weights and their format), `layers`, `mask_argument`, device, version
  /// of library and LibTorch, and kind of CPU; beside a model, "gpt2.pt.profile" is a good name. When it is
  /// read, one small packed pass is compared with the plain module. A file that is missing, damaged or of something
  /// else is ignored: the model is probed, and the file written anew, first beside it and then put in its place.
  /// ModelProfile::from_file and file_note tell what happened; where it cannot be written the note says so, and nothing
  /// else changes. It is as trusted as the model file: keep it where nobody else can write. Default: none.
  std::filesystem::path profile_path = {};

  /// A padded batch is run without its padding where that spares at least this many tokens and a twentieth of all;
  /// else as the module runs it, padding included, which is then the faster of the two: attention goes row by row where
  /// rows are packed. In tokens, measured on MiniLM; larger models lose less by packing. 0: all padded batches are
  /// packed. Prefix reuse always packs.
  std::int64_t packing_cost_tokens = 6;

  /// For Fidelity::kLossless and causal models.
  PrefixOptions prefix = {};

  /// For encoder-decoders, with kLossless and kBudget: part of `capacity_bytes`, 0 to 1, that what follows from sources
  /// alone gets (keys and values of all layers: for T5-small 24 KiB a source token); the rest is for targets and whole
  /// outputs. 0 keeps none of it. Default 0.5.
  double source_capacity_share = 0.5;

  /// Share of the answers made with reuse that are computed plainly too and compared, 0 to 1, for as long as the cache
  /// lives. The first answer of a new size (VerifiedEnvelope) is compared whatever this is. An answer that differs
  /// closes the reuse it came from for good, drops what was kept, and is replaced by the plain one (Stats::verification
  /// tells). What Fidelity::kThreshold answers, and what kBudget approximates, is not compared: RefreshOptions and
  /// BudgetOptions have checks of their own. 0 switches both off. Default: one in 1,000.
  double verify_rate = 0.001;

  /// True: comparing is done behind the answer, by a thread of the cache, on copies of inputs and answer: calls do not
  /// wait for it, and an answer that turns out wrong has been returned. Default: within the call.
  bool verify_in_background = false;

  /// All weights are hashed again, and compared, once in this many requests; 0: never. Each request looks at a few
  /// bytes of every tensor only (LayerCacheBase::weights_changed()). Hashing takes about 0.1 ms a MB. Default 10,000.
  std::uint64_t weight_check_requests = 10'000;

  /// For Fidelity::kBudget.
  BudgetOptions budget = {};

  /// For Fidelity::kThreshold.
  ThresholdOptions threshold = {};

  /// Checking of what kThreshold serves, and ageing of its entries.
  RefreshOptions refresh = {};

  /// What each tenant may hold, and for how long. Default: tenants share the capacity without limits.
  TenantOptions tenants = {};

  /// Keeping the cache over restarts. Default: it is not.
  SnapshotOptions snapshot = {};

  /// Stores below the memory: a directory, a server that several processes share. Default: none.
  StoreOptions store = {};

  /// Told how far wrapping (some seconds for a large model) and calibrate() have come: once for each step, and within
  /// the long ones of a calibration once for each request. It is called by the thread that constructs or calibrates,
  /// and so from several at once where several calibrate; it must not calibrate itself. The cache keeps it, and gives
  /// it to those made by with_options(cache.options()): what it refers to must live as long. What it throws passes
  /// through and ends either. Default: nobody is told.
  ProgressFunction progress = {};

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// Throws Error(kInvalidOptions) for a value that is no Fidelity.
void check_fidelity(Fidelity fidelity);

/// Throws Error(kInvalidOptions) for a value that is no Output.
void check_output(Output output);

/// Throws Error(kNotAvailable) if `options` ask for packed weights: for models whose weights the library does not see.
void check_weights_as_loaded(const Options& options);

/// Settings of one call.
struct RequestOptions {
  /// Overrides Options::fidelity for this call.
  std::optional<Fidelity> fidelity = {};

  /// Which tokens' results are wanted. Work behind the last layer (final norm, lm_head) is done for these
  /// only, where ModelProfile::head_tokenwise. Default: all, as the module returns them.
  Output output = Output::kAll;

  /// Requests of different tenants never see each other's entries. Any bytes; default: one tenant
  /// for all who name none.
  std::string tenant = {};

  /// For kThreshold. False: nothing is looked up, so that every sequence is computed, and kept. It
  /// fills a cache with requests that may be similar to one another. Default: look up.
  bool look_up = true;

  /// Called between the layers of this call, which then looks nothing up and keeps nothing (LayerHook tells). Default:
  /// none.
  std::shared_ptr<LayerHook> hook = {};
};

}  // namespace llmcache
