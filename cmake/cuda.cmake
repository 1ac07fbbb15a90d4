# The CUDA backend. src/cuda/*.cu are compiled for the two families this library has kernels for:
#   sm_90a  Hopper: wgmma, TMA              (src/cuda/sm90/ only for this)
#   sm_80   Ampere, and what runs its SASS  (sm_80 and sm_90 SASS, compute_80 PTX for newer parts)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90-real)  # the family below; nothing asks for a GPU in this machine
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 knows nvcc's flag up to 17 only
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit 13 REQUIRED)

file(GLOB_RECURSE MOESAIC_CUDA_SM90 CONFIGURE_DEPENDS src/cuda/sm90/*.cu)
file(GLOB_RECURSE MOESAIC_CUDA_ALL CONFIGURE_DEPENDS src/cuda/*.cu)
list(REMOVE_ITEM MOESAIC_CUDA_ALL ${MOESAIC_CUDA_SM90})
file(GLOB MOESAIC_CUDA_HOST CONFIGURE_DEPENDS src/cuda/*.cpp)

# Serialized wgmma and spills beyond a few registers fail the build: see ptxas_guard.sh. NDEBUG, whatever
# the build type: a device assert in a loop of wgmma serializes it.
# Line tables are for profiling builds: with them the library is more than three times as large (one product's kernels
# 2.5 MB instead of 0.7).
set(MOESAIC_CUDA_FLAGS -Xptxas=-warn-spills --expt-relaxed-constexpr
    $<$<NOT:$<CONFIG:Release>>:-lineinfo> -Xcompiler=-Wall,-ffp-contract=off)
set(MOESAIC_CUDA_LAUNCHER ${PROJECT_SOURCE_DIR}/cmake/ptxas_guard.sh)
if(CCACHE)
  list(APPEND MOESAIC_CUDA_LAUNCHER ${CCACHE})
endif()
function(moesaic_cuda_objects name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MOESAIC_CUDA_FLAGS}>
                         $<$<COMPILE_LANGUAGE:CXX>:${MOESAIC_CXX_FLAGS}>)
  target_compile_definitions(${name} PRIVATE NDEBUG)
  target_link_libraries(${name} PRIVATE CUDA::cudart_static fmt::fmt-header-only)
  set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER "${MOESAIC_CUDA_LAUNCHER}")
endfunction()

if(MOESAIC_CUDA_SM90)
  moesaic_cuda_objects(moesaic_cuda_sm90 ${MOESAIC_CUDA_SM90})
  set_target_properties(moesaic_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES "90a-real")
endif()
if(MOESAIC_CUDA_ALL)
  moesaic_cuda_objects(moesaic_cuda_sm80 ${MOESAIC_CUDA_ALL} ${MOESAIC_CUDA_HOST})
  set_target_properties(moesaic_cuda_sm80 PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
endif()

add_library(moesaic_cuda_link INTERFACE)
foreach(part moesaic_cuda_sm90 moesaic_cuda_sm80)
  if(TARGET ${part})
    target_sources(moesaic_cuda_link INTERFACE $<TARGET_OBJECTS:${part}>)
  endif()
endforeach()
# cudart statically: a driver is all that a user's machine needs. The one driver function we call
# (the tensor map encoder) is looked up through cudart.
target_link_libraries(moesaic_cuda_link INTERFACE CUDA::cudart_static)
