# llmcache::redis: llmcache/store/redis_store.h, headers, with the library and hiredis. Without hiredis there is no such
# target; the library is the same.
find_path(LLMCACHE_HIREDIS_INCLUDE hiredis/hiredis.h)
find_library(LLMCACHE_HIREDIS_LIBRARY hiredis)
if(NOT LLMCACHE_HIREDIS_INCLUDE OR NOT LLMCACHE_HIREDIS_LIBRARY)
  message(STATUS "llmcache: without stores in Redis, as hiredis (Debian: libhiredis-dev) is not there")
  return()
endif()
add_library(llmcache_redis INTERFACE)
add_library(llmcache::redis ALIAS llmcache_redis)
target_include_directories(llmcache_redis SYSTEM INTERFACE ${LLMCACHE_HIREDIS_INCLUDE})
target_link_libraries(llmcache_redis INTERFACE llmcache::llmcache ${LLMCACHE_HIREDIS_LIBRARY})
