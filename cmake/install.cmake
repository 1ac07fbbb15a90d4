# cmake --install: the library, its headers, the command, and what find_package(moesaic) reads.
include(CMakePackageConfigHelpers)
set(MOESAIC_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/moesaic)

install(TARGETS moesaic EXPORT moesaicTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/moesaic DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
if(TARGET moesaic_command)
  install(TARGETS moesaic_command RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(EXPORT moesaicTargets NAMESPACE moesaic:: DESTINATION ${MOESAIC_CMAKE_DIR})
configure_package_config_file(cmake/moesaicConfig.cmake.in
  ${PROJECT_BINARY_DIR}/moesaicConfig.cmake INSTALL_DESTINATION ${MOESAIC_CMAKE_DIR})
# While the major version is 0, a new minor version may break a caller.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moesaicConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/moesaicConfig.cmake ${PROJECT_BINARY_DIR}/moesaicConfigVersion.cmake
        DESTINATION ${MOESAIC_CMAKE_DIR})
