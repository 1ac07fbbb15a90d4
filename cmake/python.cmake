# The Python package's one shared object. apache-tvm-ffi gives one ABI for every framework (DLPack).
find_package(Python 3.9 COMPONENTS Interpreter REQUIRED)
if(NOT TARGET tvm_ffi::header)
  execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir
                  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE tvm_ffi_ROOT)
  find_package(tvm_ffi CONFIG REQUIRED)
endif()
add_library(moesaic_python SHARED python/binding/module.cpp python/binding/convert.cpp
  python/binding/arguments.cpp python/binding/openmp.cpp
            $<TARGET_OBJECTS:moesaic_objects>)
set_target_properties(moesaic_python PROPERTIES OUTPUT_NAME moesaic_ffi)
target_include_directories(moesaic_python PRIVATE ${PROJECT_SOURCE_DIR}/include)
target_compile_options(moesaic_python PRIVATE ${MOESAIC_CXX_FLAGS})
target_link_libraries(moesaic_python PRIVATE tvm_ffi::header tvm_ffi::shared Threads::Threads ${CMAKE_DL_LIBS})
target_link_options(moesaic_python PRIVATE -static-libstdc++ -static-libgcc
                    -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/python_symbols.map)
set_target_properties(moesaic_python PROPERTIES LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/python_symbols.map)
if(MOESAIC_CUDA)
  target_link_libraries(moesaic_python PRIVATE moesaic_cuda_link)
endif()
install(TARGETS moesaic_python LIBRARY DESTINATION moesaic COMPONENT python EXCLUDE_FROM_ALL)
