# examples/*.cpp and *.c use nothing but the public headers and the library, and each is run as a test.
file(GLOB MOESAIC_EXAMPLES CONFIGURE_DEPENDS examples/*.cpp examples/*.c)
foreach(source IN LISTS MOESAIC_EXAMPLES)
  get_filename_component(stem ${source} NAME_WE)
  add_executable(example_${stem} ${source})
  target_link_libraries(example_${stem} PRIVATE moesaic::moesaic)
  add_test(NAME example_${stem} COMMAND example_${stem} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(stem MATCHES quickstart)  # in C++ and in C: the number that their comment derives
    set_tests_properties(example_${stem} PROPERTIES PASS_REGULAR_EXPRESSION "y\\[0\\]\\[0\\] = 1\\.230")
  endif()
endforeach()
