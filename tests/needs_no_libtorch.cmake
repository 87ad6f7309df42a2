# cmake -D PROGRAM=... -P needs_no_libtorch.cmake
# Fails if PROGRAM is linked to a library of LibTorch's, directly or through another one.
execute_process(COMMAND ldd ${PROGRAM} OUTPUT_VARIABLE libraries COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "lib(torch|c10|caffe2)[^ ]*" found "${libraries}")
if(found)
  message(FATAL_ERROR "${PROGRAM} needs ${found}")
endif()
