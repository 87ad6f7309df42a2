// Precompiled: LibTorch's headers cost most of the time of a compilation.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/jit/api/module.h>

#include "llmcache/llmcache.h"
