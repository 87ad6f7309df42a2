# Targets of those who change the code: `format` (clang-format), `lint` (clang-tidy, ruff) and `docs` (Doxygen). A target
# whose programs are missing says which Debian packages have them.
function(llmcache_check_target name package)
  cmake_parse_arguments(check "" "" "PROGRAMS;COMMAND" ${ARGN})
  foreach(program ${check_PROGRAMS})
    string(MAKE_C_IDENTIFIER "LLMCACHE_${program}" variable)
    find_program(${variable} ${program})
    if(NOT ${variable})
      add_custom_target(${name}
        COMMAND ${CMAKE_COMMAND} -E echo "${name}: ${program} is not installed: ${package}"
        COMMAND ${CMAKE_COMMAND} -E false)
      return()
    endif()
  endforeach()
  add_custom_target(${name} ${check_COMMAND} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} VERBATIM)
endfunction()

llmcache_check_target(format "apt-get install clang-format" PROGRAMS clang-format
  COMMAND COMMAND sh -c "git ls-files '*.h' '*.cpp' | xargs clang-format -i")
llmcache_check_target(lint "apt-get install clang-tidy; pip install ruff" PROGRAMS run-clang-tidy ruff
  COMMAND COMMAND run-clang-tidy -quiet -p ${CMAKE_BINARY_DIR} ${PROJECT_SOURCE_DIR}/src/
          COMMAND ruff check --config tools/ruff.toml tools tests benchmarks examples)

set(doxygen_settings "
PROJECT_NAME=LLMCache
PROJECT_NUMBER=${PROJECT_VERSION}
INPUT=${PROJECT_SOURCE_DIR}/include ${CMAKE_CURRENT_BINARY_DIR}/include
FILE_PATTERNS=*.h
RECURSIVE=YES
OUTPUT_DIRECTORY=${CMAKE_BINARY_DIR}/doxygen
STRIP_FROM_PATH=${PROJECT_SOURCE_DIR}/include
GENERATE_LATEX=NO
EXTRACT_ALL=YES
JAVADOC_AUTOBRIEF=YES
QUIET=YES
HAVE_DOT=NO
WARNINGS=YES
WARN_IF_UNDOCUMENTED=NO
WARN_AS_ERROR=FAIL_ON_WARNINGS
MACRO_EXPANSION=YES
")
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/Doxyfile "${doxygen_settings}")
llmcache_check_target(docs "apt-get install doxygen" PROGRAMS doxygen
  COMMAND COMMAND doxygen ${CMAKE_CURRENT_BINARY_DIR}/Doxyfile)
