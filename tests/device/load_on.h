// TorchScript files on a device.
#pragma once

#include <torch/script.h>

#include <filesystem>

namespace llmcache::test {

/// torch::jit::load() onto `device`: tensors, those of more than a number that stand in graphs, and the devices that
/// graphs name. It is as if it had been traced there. A trace names the device that it was made on, so that where only
/// its tensors are moved it runs nowhere.
torch::jit::Module load_on(const std::filesystem::path& path, at::Device device);

/// The same for a module that is there: of a script, also what it makes without naming a device.
void move_to(torch::jit::Module& model, at::Device device);

}  // namespace llmcache::test
