# tests/fuzz/<stem>_fuzz.cpp is one libFuzzer executable; seeds lie in tests/fuzz/corpus/<stem>_fuzz/.
# Needs clang: the preset `fuzz` names it and instruments the library through MOESAIC_SANITIZE.
if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
  message(FATAL_ERROR "MOESAIC_FUZZ needs clang (libFuzzer): cmake --preset fuzz")
endif()
file(GLOB MOESAIC_FUZZERS CONFIGURE_DEPENDS tests/fuzz/*_fuzz.cpp)
foreach(source IN LISTS MOESAIC_FUZZERS)
  get_filename_component(stem ${source} NAME_WE)
  add_executable(${stem} ${source})
  target_link_libraries(${stem} PRIVATE moesaic_internal)
  target_link_options(${stem} PRIVATE -fsanitize=fuzzer)
endforeach()
