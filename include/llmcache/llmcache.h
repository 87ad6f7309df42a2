// LLMCache: run a transformer's layers only on the tokens that need it.
//
// Start with layer_cache.h (LayerCache, what you wrap a model with), options.h (what you choose)
// and report.h (what it did). model/torchscript.h makes LayerCache take a torch::jit::Module;
// model/layered_model.h says what a model of your own must offer.
#pragma once

#include "llmcache/error.h"
#include "llmcache/layer_cache.h"
#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"
#include "llmcache/model/profile.h"
#include "llmcache/model/torchscript.h"
#include "llmcache/options.h"
#include "llmcache/report.h"
#include "llmcache/version.h"
