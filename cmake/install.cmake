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

# The pages with what they link to; README.md's links to headers lead to where those are installed.
file(RELATIVE_PATH headers ${CMAKE_INSTALL_FULL_DOCDIR} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS README.md)
file(READ README.md readme)
string(REPLACE "](include/" "](${headers}/" readme "${readme}")
file(WRITE ${PROJECT_BINARY_DIR}/README.md "${readme}")
install(FILES LICENSE CHANGELOG.md ${PROJECT_BINARY_DIR}/README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY docs DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY examples DESTINATION ${CMAKE_INSTALL_DOCDIR} FILES_MATCHING
        PATTERN "*.c" PATTERN "*.cpp" PATTERN "*.py" PATTERN "data" EXCLUDE PATTERN "__pycache__" EXCLUDE)

# pkg-config.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(MOESAIC_PC_UP .)
else()
  string(REGEX REPLACE "[^/]+" ".." MOESAIC_PC_UP ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endif()
foreach(folder LIBDIR INCLUDEDIR)
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${folder}}" OR IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
    set(MOESAIC_PC_${folder} ${CMAKE_INSTALL_FULL_${folder}})
  else()
    set(MOESAIC_PC_${folder} "\${prefix}/${CMAKE_INSTALL_${folder}}")
  endif()
endforeach()
configure_file(cmake/moesaic.pc.in ${PROJECT_BINARY_DIR}/moesaic.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/moesaic.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(EXPORT moesaicTargets NAMESPACE moesaic:: DESTINATION ${MOESAIC_CMAKE_DIR})
configure_package_config_file(cmake/moesaicConfig.cmake.in
  ${PROJECT_BINARY_DIR}/moesaicConfig.cmake INSTALL_DESTINATION ${MOESAIC_CMAKE_DIR})
# While the major version is 0, a new minor version may break a caller.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moesaicConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/moesaicConfig.cmake ${PROJECT_BINARY_DIR}/moesaicConfigVersion.cmake
        DESTINATION ${MOESAIC_CMAKE_DIR})
