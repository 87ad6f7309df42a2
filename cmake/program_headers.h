// Precompiled: LibTorch's headers cost most of the time of a compilation.
#pragma once

#include <ATen/ATen.h>
#include <llmcache/llmcache.h>
#include <torch/script.h>

#include <string>
#include <vector>
