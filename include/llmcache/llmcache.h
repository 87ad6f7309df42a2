// LLMCache: run a transformer's layers only on the tokens that need it. This header is enough for a program:
//
//     llmcache::TorchScriptCache cache = llmcache::load("bert.pt", {.capacity_bytes = std::size_t{512} << 20});
//     torch::IValue out = cache.forward({input_ids, attention_mask});
//
// model/torchscript.h loads and wraps a module, model/exported.h a program of torch.export; layer_cache.h is what it
// can do then; options.h is what you choose; report.h is what it did; snapshot.h keeps a cache over restarts; padding.h
// makes batches of token ids; generate.h generates text; layer_hook.h sees and changes states between layers;
// store/directory_store.h and store/tiered_store.h keep states below the memory. Beyond the first page: tenants.h
// (limits of tenants, pinned prefixes), threshold.h (the mode of the LLMCache paper), refresh/budget.h and
// refresh/calibration.h (error budgets), model/layered_model.h (models that are no TorchScript), match/plan.h (forced
// plans).
#pragma once

#include <torch/script.h>

#include "llmcache/error.h"
#include "llmcache/generate.h"
#include "llmcache/layer_cache.h"
#include "llmcache/layer_hook.h"
#include "llmcache/model/exported.h"
#include "llmcache/model/torchscript.h"
#include "llmcache/options.h"
#include "llmcache/padding.h"
#include "llmcache/report.h"
#include "llmcache/snapshot.h"
#include "llmcache/store/directory_store.h"
#include "llmcache/store/tiered_store.h"
#include "llmcache/tenants.h"
#include "llmcache/version.h"
