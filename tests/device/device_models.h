// Exported models, and requests to them, on a device.
#pragma once

#include "support.h"

namespace llmcache::test {

/// Moves a module there whole: its tensors, those that stand in its graphs, and the devices that its graphs name. A
/// trace names the device that it was made on, so that Module::to() alone gives what runs nowhere.
void move_whole(Module& module, c10::Device device);

/// load_model() on `device`.
Module load_model_on(const std::string& name, c10::Device device);

/// The request's tensors on `device`.
Request moved(Request request, c10::Device device);

/// A result's tensors on the host, one or a tuple of them.
c10::IValue on_host(const c10::IValue& result);

}  // namespace llmcache::test
