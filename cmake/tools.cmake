# harness/: the case list, random data, verify and bench, shared by the command and the tests.
file(GLOB MOESAIC_HARNESS CONFIGURE_DEPENDS harness/*.cpp)
if(MOESAIC_STATIC_RUNTIME)
  set(MOESAIC_EXE_LINK -static-libstdc++ -static-libgcc)
endif()
if(MOESAIC_HARNESS)
  add_library(moesaic_harness STATIC ${MOESAIC_HARNESS})
  target_include_directories(moesaic_harness PUBLIC ${PROJECT_SOURCE_DIR}/include
    ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR})
  target_compile_options(moesaic_harness PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${MOESAIC_CXX_FLAGS}>)
  target_link_libraries(moesaic_harness PUBLIC fmt::fmt-header-only nlohmann_json::nlohmann_json Threads::Threads)
  if(MOESAIC_CUDA)
    file(GLOB MOESAIC_HARNESS_CUDA CONFIGURE_DEPENDS harness/*.cu)
    moesaic_cuda_objects(moesaic_harness_cuda ${MOESAIC_HARNESS_CUDA})
    set_target_properties(moesaic_harness_cuda PROPERTIES CUDA_ARCHITECTURES "80;90-real")
    target_include_directories(moesaic_harness_cuda PRIVATE ${PROJECT_SOURCE_DIR})
    target_sources(moesaic_harness PRIVATE $<TARGET_OBJECTS:moesaic_harness_cuda>)
    target_compile_definitions(moesaic_harness PUBLIC MOESAIC_HAS_CUDA)
    target_link_libraries(moesaic_harness PUBLIC CUDA::cudart_static)
  endif()
endif()

# Internals are hidden in the shared library, so the command and the tests link its objects.
add_library(moesaic_internal STATIC $<TARGET_OBJECTS:moesaic_objects>)
target_include_directories(moesaic_internal PUBLIC ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src
  ${PROJECT_SOURCE_DIR})
target_link_libraries(moesaic_internal PUBLIC Threads::Threads fmt::fmt-header-only nlohmann_json::nlohmann_json)
if(MOESAIC_CUDA)
  target_link_libraries(moesaic_internal PUBLIC moesaic_cuda_link)
endif()

file(GLOB MOESAIC_TOOL_SOURCES CONFIGURE_DEPENDS tools/*.cpp)
if(MOESAIC_TOOLS AND MOESAIC_TOOL_SOURCES)
  find_package(CLI11 REQUIRED)
  add_executable(moesaic_command ${MOESAIC_TOOL_SOURCES})
  # CLI11 and the JSON library cost ten seconds in every file that includes them: compiled together, in
  # one unit per core of a small machine, the command builds in a quarter of the time.
  set_target_properties(moesaic_command PROPERTIES OUTPUT_NAME moesaic UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 5)
  target_compile_options(moesaic_command PRIVATE ${MOESAIC_CXX_FLAGS})
  target_link_libraries(moesaic_command PRIVATE moesaic_harness moesaic_internal CLI11::CLI11)
  target_link_options(moesaic_command PRIVATE ${MOESAIC_EXE_LINK})
endif()
