# llmcache::header_only: the library as headers. A program includes llmcache/implementation.h in exactly one of its
# source files; the file is put together here, from all sources and internal headers.
set(implementation ${CMAKE_CURRENT_BINARY_DIR}/include/llmcache/implementation.h)
file(GLOB_RECURSE internal_headers CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/src/*.h)
string(JOIN "," sources ${core_sources} ${torch_sources})
add_custom_command(
  OUTPUT ${implementation}
  COMMAND ${CMAKE_COMMAND} -D "SOURCES=${sources}" -D "OUTPUT=${implementation}" -P cmake/implementation.cmake
  DEPENDS cmake/implementation.cmake ${core_sources} ${torch_sources} ${internal_headers}
  WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
  COMMENT "Putting llmcache/implementation.h together"
  VERBATIM)
add_custom_target(llmcache_implementation ALL DEPENDS ${implementation})

add_library(llmcache_header_only INTERFACE)
add_library(llmcache::header_only ALIAS llmcache_header_only)
add_dependencies(llmcache_header_only llmcache_implementation)
target_compile_features(llmcache_header_only INTERFACE cxx_std_20)
target_include_directories(llmcache_header_only INTERFACE ${CMAKE_CURRENT_SOURCE_DIR}/include
                                                          ${CMAKE_CURRENT_BINARY_DIR}/include)
target_link_libraries(llmcache_header_only INTERFACE llmcache_torch fmt::fmt-header-only llmcache_xxhash llmcache_sodium
                                                     Eigen3::Eigen nlohmann_json::nlohmann_json)
