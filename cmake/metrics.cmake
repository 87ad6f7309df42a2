# llmcache::metrics: llmcache/metrics/prometheus.h, a header, with the library and prometheus-cpp. Without prometheus-cpp
# there is no such target; the library is the same.
find_package(prometheus-cpp QUIET GLOBAL)
if(NOT prometheus-cpp_FOUND)
  message(STATUS "llmcache: without metrics for Prometheus, as prometheus-cpp (Debian: prometheus-cpp-dev) is not there")
  return()
endif()
add_library(llmcache_metrics INTERFACE)
add_library(llmcache::metrics ALIAS llmcache_metrics)
target_link_libraries(llmcache_metrics INTERFACE llmcache::llmcache prometheus-cpp::core)
