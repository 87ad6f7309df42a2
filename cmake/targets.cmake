# llmcache_own_code(TARGET): warnings, and the chosen sanitizers, for code of this repository.
function(llmcache_own_code target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # False alarms of GCC 12 about "literal" + std::string (GCC bug 105651).
    target_compile_options(${target} PRIVATE -Wno-array-bounds -Wno-restrict -Wno-stringop-overflow)
  endif()
  if(LLMCACHE_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(LLMCACHE_SANITIZE)
    # Without vptr, a part of undefined: it refers to type information that LibTorch does not export.
    target_compile_options(${target} PRIVATE -fsanitize=${LLMCACHE_SANITIZE} -fno-sanitize=vptr
                                             -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=${LLMCACHE_SANITIZE})
  endif()
endfunction()

# llmcache_program(TARGET): benchmarks and examples. They spend their time in the library and in LibTorch, whose headers
# are compiled once for all of them.
set(LLMCACHE_PROGRAM_OPTIMIZATION -O1 CACHE STRING "Optimisation of benchmarks and examples in a release build")
mark_as_advanced(LLMCACHE_PROGRAM_OPTIMIZATION)
function(llmcache_program target)
  llmcache_own_code(${target})
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:${LLMCACHE_PROGRAM_OPTIMIZATION}>)
  if(NOT TARGET llmcache_program_headers)
    add_library(llmcache_program_headers OBJECT ${PROJECT_SOURCE_DIR}/cmake/program_headers.cpp)
    target_link_libraries(llmcache_program_headers PRIVATE llmcache::llmcache)
    llmcache_own_code(llmcache_program_headers)
    target_compile_options(llmcache_program_headers PRIVATE $<$<CONFIG:Release>:${LLMCACHE_PROGRAM_OPTIMIZATION}>)
    target_precompile_headers(llmcache_program_headers PRIVATE ${PROJECT_SOURCE_DIR}/cmake/program_headers.h)
  endif()
  target_precompile_headers(${target} REUSE_FROM llmcache_program_headers)
endfunction()

# llmcache_units(TARGET PATTERN...): in a unity build, the sources of TARGET that a PATTERN is the first to match are one
# unit. Few large units compile fastest: what LibTorch's and the library's own templates need is made once in each.
function(llmcache_units target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD_MODE GROUP)
  get_target_property(sources ${target} SOURCES)
  list(FILTER sources INCLUDE REGEX "\\.cpp$")
  foreach(source ${sources})
    foreach(pattern ${ARGN})
      if(source MATCHES "^${pattern}")
        string(MAKE_C_IDENTIFIER ${pattern} unit)
        set_source_files_properties(${source} PROPERTIES UNITY_GROUP ${unit})
        break()
      endif()
    endforeach()
  endforeach()
endfunction()
