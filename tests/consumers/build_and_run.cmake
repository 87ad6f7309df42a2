# cmake -D KIND=... -D SOURCE=... -D WORK=... -D INSTALL_FROM=... -P build_and_run.cmake -- CMAKE_ARGUMENT...
# Configures, builds and runs the consumer KIND in the folder WORK, with the arguments behind `--` for its cmake. Of
# add_subdirectory the program alone is compiled, and how the library would be is only planned: it is the same library,
# compiled by the same rules, as in the build that these tests belong to. FULL=1 in the environment builds and runs it.
# SOURCE: LLMCache's sources. INSTALL_FROM: LLMCache's build folder (but for add_subdirectory). What is built is kept, so
# that a second run is short.
cmake_minimum_required(VERSION 3.25)

set(arguments "")
set(behind_dashes FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(behind_dashes)
    string(REPLACE ";" "\\;" argument "${CMAKE_ARGV${i}}")  # a list stays one argument
    list(APPEND arguments "${argument}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(behind_dashes TRUE)
  endif()
endforeach()

set(model "$ENV{LLMCACHE_MODELS_DIR}/tiny-bert-sdpa.pt")
if(NOT EXISTS "${model}")
  message(FATAL_ERROR "no ${model}: LLMCACHE_MODELS_DIR must name the folder of exported models (tools/run.sh test "
                      "makes it)")
endif()

if(NOT KIND STREQUAL "add_subdirectory")
  # A new prefix each time: a header that is no longer installed must be missed.
  file(REMOVE_RECURSE "${WORK}/prefix")
  execute_process(COMMAND "${CMAKE_COMMAND}" --install "${INSTALL_FROM}" --prefix "${WORK}/prefix"
                  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND arguments "-Dllmcache_ROOT=${WORK}/prefix")
else()
  list(APPEND arguments "-DLLMCACHE_SOURCE_DIR=${SOURCE}")
endif()

# Only that it builds is of interest: without optimisation that takes half the time.
execute_process(COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}/tests/consumers/${KIND}" -B "${WORK}/build"
                        -DCMAKE_CXX_FLAGS=-O0 ${arguments}
                COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
if(KIND STREQUAL "add_subdirectory" AND NOT "$ENV{FULL}")
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${WORK}/build" --target program COMMAND_ERROR_IS_FATAL ANY)
  # Fails for a source, or a rule, that there is not.
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${WORK}/build" --target consumer -- -n COMMAND_ERROR_IS_FATAL ANY)
  return()
endif()
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${WORK}/build" --parallel 1
                COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${WORK}/build/consumer" "${model}" COMMAND_ERROR_IS_FATAL ANY)
