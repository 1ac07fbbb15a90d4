# libmoesaic. Every .cpp under src/ belongs to it; src/cuda only with MOESAIC_CUDA.
file(GLOB MOESAIC_SOURCES CONFIGURE_DEPENDS
     src/*.cpp src/reference/*.cpp src/checkpoint/*.cpp src/cpu/*.cpp)

# One translation unit per ISA level: src/cpu/isa/<stem>_<level>.cpp is compiled with that level's
# flags and entered only after cpuid said so. GCC 12: name the features, not -march=znver4.
file(GLOB MOESAIC_ISA_SOURCES CONFIGURE_DEPENDS src/cpu/isa/*.cpp)
# -Wno-...: vectors passed between inlined functions have no ABI; GCC 12's own AVX-512 header trips
# -Wuninitialized.
set(MOESAIC_ISA_scalar -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
set(MOESAIC_ISA_avx2 ${MOESAIC_ISA_scalar} -mavx2 -mfma -mf16c)
set(MOESAIC_ISA_avxvnni ${MOESAIC_ISA_avx2} -mavxvnni)
set(MOESAIC_ISA_avx512 ${MOESAIC_ISA_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(MOESAIC_ISA_avx512_vnni ${MOESAIC_ISA_avx512} -mavx512vnni -mavx512vbmi)
set(MOESAIC_ISA_avx512_bf16 ${MOESAIC_ISA_avx512_vnni} -mavx512bf16)
set(MOESAIC_ISA_amx ${MOESAIC_ISA_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
set(MOESAIC_ISA_neon -Wno-psabi)
set(MOESAIC_ISA_neon_bf16 ${MOESAIC_ISA_neon} -march=armv8.2-a+dotprod+bf16+i8mm)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(FILTER MOESAIC_ISA_SOURCES EXCLUDE REGEX "_neon")
else()
  list(FILTER MOESAIC_ISA_SOURCES EXCLUDE REGEX "_(avx|amx)")
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    list(FILTER MOESAIC_ISA_SOURCES EXCLUDE REGEX "_neon")
  endif()
endif()
if(MOESAIC_FUZZ)
  # Fuzzers feed the readers and the checks; the vector kernels, instrumented, take clang minutes each.
  foreach(level avx2 avxvnni avx512 avx512_vnni avx512_bf16 amx neon neon_bf16)
    list(APPEND MOESAIC_ISA_${level} -fno-sanitize=all)
  endforeach()
endif()
foreach(source IN LISTS MOESAIC_ISA_SOURCES)
  get_filename_component(stem ${source} NAME_WE)
  foreach(level scalar avx2 avxvnni avx512 avx512_vnni avx512_bf16 amx neon neon_bf16)
    if(stem MATCHES "_${level}$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${MOESAIC_ISA_${level}}")
    endif()
  endforeach()
endforeach()

add_library(moesaic_objects OBJECT ${MOESAIC_SOURCES} ${MOESAIC_ISA_SOURCES})
# The checkpoint reader's files each parse JSON's and fmt's headers: two units instead of fourteen.
file(GLOB MOESAIC_CHECKPOINT_SOURCES CONFIGURE_DEPENDS src/checkpoint/*.cpp)
set(unit 0)
foreach(source IN LISTS MOESAIC_CHECKPOINT_SOURCES)
  set_source_files_properties(${source} PROPERTIES UNITY_GROUP checkpoint_${unit})
  math(EXPR unit "1 - ${unit}")
endforeach()
set_target_properties(moesaic_objects PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
target_include_directories(moesaic_objects
  PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> PRIVATE ${PROJECT_SOURCE_DIR}/src)
target_compile_options(moesaic_objects PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${MOESAIC_CXX_FLAGS}>)
# fmt and JSON are used inside only: header-only fmt leaves nothing for a user to link.
target_link_libraries(moesaic_objects PRIVATE fmt::fmt-header-only nlohmann_json::nlohmann_json
                      PUBLIC Threads::Threads)
if(MOESAIC_CUDA)
  include(cmake/cuda.cmake)
  target_compile_definitions(moesaic_objects PRIVATE MOESAIC_HAS_CUDA)
endif()

add_library(moesaic $<TARGET_OBJECTS:moesaic_objects>)
add_library(moesaic::moesaic ALIAS moesaic)
target_include_directories(moesaic PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(moesaic PUBLIC cxx_std_20)
target_link_libraries(moesaic PUBLIC Threads::Threads)
# While the major version is 0, a new minor version may break a caller.
set(MOESAIC_SOVERSION ${PROJECT_VERSION_MAJOR})
if(MOESAIC_SOVERSION EQUAL 0)
  set(MOESAIC_SOVERSION 0.${PROJECT_VERSION_MINOR})
endif()
set_target_properties(moesaic PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${MOESAIC_SOVERSION})
if(MOESAIC_CUDA)
  target_link_libraries(moesaic PRIVATE $<BUILD_INTERFACE:moesaic_cuda_link>)
endif()
# The library by a name of its own: Ninja takes `moesaic` for the command's file.
add_custom_target(moesaic_library)
add_dependencies(moesaic_library moesaic)
