# LibTorch comes from Torch_DIR or CMAKE_PREFIX_PATH; everything else from Debian packages. GLOBAL: the targets are
# seen in a project that has this one as a subdirectory too.
find_package(Torch 2.4 QUIET GLOBAL)
if(NOT Torch_FOUND)
  message(FATAL_ERROR
    "LibTorch was not found. Say where it is: -DTorch_DIR=<libtorch>/share/cmake/Torch, or, with a pip-installed "
    "PyTorch, -DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\".")
endif()
if(NOT TARGET fmt::fmt-header-only)
  find_package(fmt 9 REQUIRED GLOBAL)
endif()
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 3.4 REQUIRED GLOBAL)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.10 REQUIRED GLOBAL)
endif()
find_path(LLMCACHE_XXHASH_INCLUDE xxhash.h REQUIRED)
add_library(llmcache_xxhash INTERFACE)
target_include_directories(llmcache_xxhash SYSTEM INTERFACE ${LLMCACHE_XXHASH_INCLUDE})
target_compile_definitions(llmcache_xxhash INTERFACE XXH_INLINE_ALL)
find_path(LLMCACHE_SODIUM_INCLUDE sodium.h REQUIRED)
find_library(LLMCACHE_SODIUM_LIBRARY sodium REQUIRED)
add_library(llmcache_sodium INTERFACE)
target_include_directories(llmcache_sodium SYSTEM INTERFACE ${LLMCACHE_SODIUM_INCLUDE})
target_link_libraries(llmcache_sodium INTERFACE ${LLMCACHE_SODIUM_LIBRARY})

# LibTorch as a system library: its headers raise no warnings in our code.
add_library(llmcache_torch INTERFACE)
target_include_directories(llmcache_torch SYSTEM INTERFACE "$<BUILD_INTERFACE:${TORCH_INCLUDE_DIRS}>")
target_link_libraries(llmcache_torch INTERFACE "$<BUILD_INTERFACE:${TORCH_LIBRARIES}>")
