# tests/<stem>_test.cpp is one executable and one ctest of that name. tests/cuda/ needs a device and
# carries the label `cuda`: without one each test skips and says so. The label `no_gpu` is on what says something of a
# CUDA build on any machine: `make cuda-test`.
find_package(GTest REQUIRED)
# Tests that compare with PyTorch and transformers run this interpreter (the environment variable
# MOESAIC_PYTHON); where it does not exist they skip and say so.
set(MOESAIC_TEST_PYTHON ${PROJECT_SOURCE_DIR}/.venv/bin/python CACHE FILEPATH "Python with torch and transformers, for tests")
function(moesaic_test source)
  get_filename_component(stem ${source} NAME_WE)
  add_executable(${stem} ${source})
  target_compile_options(${stem} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${MOESAIC_CXX_FLAGS}>)
  target_compile_definitions(${stem} PRIVATE MOESAIC_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  if(TARGET moesaic_harness)
    target_link_libraries(${stem} PRIVATE moesaic_harness)
  endif()
  target_link_libraries(${stem} PRIVATE moesaic_internal GTest::gtest GTest::gtest_main)
  target_link_options(${stem} PRIVATE ${MOESAIC_EXE_LINK})
  add_test(NAME ${stem} COMMAND ${stem})
  set_tests_properties(${stem} PROPERTIES ENVIRONMENT "MOESAIC_PYTHON=${MOESAIC_TEST_PYTHON}")
endfunction()
file(GLOB MOESAIC_TEST_SOURCES CONFIGURE_DEPENDS tests/*_test.cpp)
foreach(source IN LISTS MOESAIC_TEST_SOURCES)
  moesaic_test(${source})
endforeach()
if(MOESAIC_CUDA)
  file(GLOB MOESAIC_CUDA_TESTS CONFIGURE_DEPENDS tests/cuda/*_test.cpp tests/cuda/*_test.cu)
  foreach(source IN LISTS MOESAIC_CUDA_TESTS)
    moesaic_test(${source})
    get_filename_component(stem ${source} NAME_WE)
    set_tests_properties(${stem} PROPERTIES LABELS cuda)
  endforeach()
  set_tests_properties(gemm_views_test workspace_plan_test PROPERTIES LABELS "cuda;no_gpu")
  set_tests_properties(shared_grants_test layering_test workspace_test PROPERTIES LABELS no_gpu)
  if(TARGET sass_test)  # reads the library as it is shipped; skips where there is no cuobjdump
    set_tests_properties(sass_test PROPERTIES LABELS "cuda;no_gpu")
    get_filename_component(compiler_folder ${CMAKE_CUDA_COMPILER} DIRECTORY)
    file(GLOB from_pypi .venv/lib/python3*/site-packages/nvidia/cu*/bin)
    find_program(MOESAIC_CUOBJDUMP cuobjdump HINTS ${compiler_folder} ${CUDAToolkit_BIN_DIR} ${from_pypi})
    string(REPLACE ";" "," architectures "${CMAKE_CUDA_ARCHITECTURES}")  # a list would come apart
    target_compile_definitions(sass_test PRIVATE MOESAIC_LIBRARY="$<TARGET_FILE:moesaic>"
      MOESAIC_CUOBJDUMP="${MOESAIC_CUOBJDUMP}" MOESAIC_ARCHITECTURES="${architectures}")
    add_dependencies(sass_test moesaic)
  endif()
endif()

# The C interface, from C and against the library as it is shipped.
foreach(stem c_api_test c_api_errors_test)
  add_executable(${stem} tests/${stem}.c)
  set_target_properties(${stem} PROPERTIES C_STANDARD 99 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF)
  target_compile_options(${stem} PRIVATE -Wall -Wextra -pedantic)
  target_link_libraries(${stem} PRIVATE moesaic::moesaic m)
  add_test(NAME ${stem} COMMAND ${stem})
endforeach()

# The installed package, found by an external project.
add_test(NAME install_test COMMAND ${CMAKE_COMMAND} -DBUILD=${PROJECT_BINARY_DIR} -DSOURCE=${PROJECT_SOURCE_DIR}
  -DWORK=${PROJECT_BINARY_DIR}/install_test -DCXX=${CMAKE_CXX_COMPILER} "-DFLAGS=${MOESAIC_SANITIZE_FLAG}"
  -DLIBRARY=$<TARGET_FILE_NAME:moesaic> -DTOOLS=$<TARGET_EXISTS:moesaic_command>
  -DLIBDIR=${CMAKE_INSTALL_LIBDIR} -DDOCDIR=${CMAKE_INSTALL_DOCDIR}
  -P ${PROJECT_SOURCE_DIR}/tests/install_test.cmake)
include(cmake/examples.cmake)

# The tests of the command run the command.
foreach(stem cli_test cli_run_test cli_files_test cli_flags_test checkpoint_transformers_test readme_test)
  if(TARGET ${stem} AND TARGET moesaic_command)
    target_compile_definitions(${stem} PRIVATE MOESAIC_COMMAND="$<TARGET_FILE:moesaic_command>")
    add_dependencies(${stem} moesaic_command)
  endif()
endforeach()

# The Python package, where the tests' interpreter can import what it needs; otherwise it says why not.
execute_process(COMMAND ${MOESAIC_TEST_PYTHON} -c "import tvm_ffi, numpy, pytest"
                RESULT_VARIABLE MOESAIC_NO_PYTHON OUTPUT_QUIET ERROR_QUIET)
set(not_tested)
if(MOESAIC_SANITIZE)
  set(not_tested "Python package: not tested under sanitizers (they would have to be loaded into Python first)")
elseif(MOESAIC_NO_PYTHON)
  string(CONCAT not_tested "Python package: not tested, ${MOESAIC_TEST_PYTHON} cannot import tvm_ffi, numpy and pytest "
         "(scripts/setup_venv.sh .venv)")
else()
  if(NOT MOESAIC_PYTHON)
    set(Python_EXECUTABLE ${MOESAIC_TEST_PYTHON})
    include(cmake/python.cmake)
  endif()
  add_test(NAME python_test COMMAND ${MOESAIC_TEST_PYTHON} -m pytest -q -p no:cacheprovider -rs
           ${PROJECT_SOURCE_DIR}/python/tests WORKING_DIRECTORY ${PROJECT_BINARY_DIR})
  set_tests_properties(python_test PROPERTIES ENVIRONMENT
    "PYTHONPATH=${PROJECT_SOURCE_DIR}/python;MOESAIC_LIBRARY=$<TARGET_FILE:moesaic_python>\
;MOESAIC_WHEEL_BUILD=${PROJECT_BINARY_DIR}-wheel;MOESAIC_WHEEL_CXX=${CMAKE_CXX_COMPILER}")
endif()
if(not_tested)
  message(STATUS "${not_tested}")
  string(APPEND not_tested "\n")
endif()
file(WRITE ${PROJECT_BINARY_DIR}/not_tested.txt "${not_tested}")  # `make test` says it at its end, too
