# What `make install` needs is what `make build` makes. Installs the build into a scratch prefix and lets an external
# project find it there:
#   cmake -DBUILD=... -DSOURCE=... -DWORK=... -DCXX=... -DFLAGS=... -DLIBRARY=libmoesaic.so.... -P install_test.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE rc OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(NOT rc EQUAL 0)
    message(FATAL_ERROR "failed (${rc}): ${ARGN}\n${out}")
  endif()
endfunction()

find_program(MAKE make)
find_program(NINJA NAMES ninja ninja-build)
if(MAKE AND NINJA AND EXISTS ${BUILD}/build.ninja)
  execute_process(COMMAND ${MAKE} -n build WORKING_DIRECTORY ${SOURCE} OUTPUT_VARIABLE out COMMAND_ERROR_IS_FATAL ANY)
  if(NOT out MATCHES "--target ([a-z_ ]+)")
    message(FATAL_ERROR "`make -n build` names no targets:\n${out}")
  endif()
  string(STRIP "${CMAKE_MATCH_1}" targets)
  string(REPLACE " " ";" targets "${targets}")
  execute_process(COMMAND ${NINJA} -C ${BUILD} -t commands ${targets} OUTPUT_VARIABLE out COMMAND_ERROR_IS_FATAL ANY)
  string(FIND "${out}" "${LIBRARY}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "`make build` makes ${targets}, of which none is ${LIBRARY}: `make install` would not find it")
  endif()
endif()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE}/tests/external -B ${WORK}/build -G Ninja -DCMAKE_CXX_COMPILER=${CXX}
    "-DCMAKE_CXX_FLAGS=${FLAGS}" -DCMAKE_PREFIX_PATH=${WORK}/prefix)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/uses_moesaic)
