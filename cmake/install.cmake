# Headers, the library and a CMake package: find_package(llmcache) and link llmcache::llmcache, or
# find_package(llmcache COMPONENTS header_only) and link llmcache::header_only.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/llmcache)

# llmcache_torch goes along empty: where LibTorch is depends on the machine, so llmcacheConfig.cmake fills it.
install(TARGETS llmcache llmcache_torch EXPORT llmcacheTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/llmcache DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/include/llmcache/version.h ${implementation}
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/llmcache)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(EXPORT llmcacheTargets NAMESPACE llmcache:: DESTINATION ${package_dir})
# A static library fits the LibTorch that it was compiled with: up to the patch version, see the template.
string(REGEX MATCH "^[0-9]+\\.[0-9]+" LLMCACHE_TORCH_VERSION "${Torch_VERSION}")
configure_package_config_file(cmake/llmcacheConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/llmcacheConfig.cmake
                              INSTALL_DESTINATION ${package_dir} PATH_VARS CMAKE_INSTALL_INCLUDEDIR
                              NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/llmcacheConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/llmcacheConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/llmcacheConfigVersion.cmake
        DESTINATION ${package_dir})
