# 64-bit ARM from an x86-64 Debian: the cross compiler, the target's libraries, and qemu to run what was built.
#   dpkg --add-architecture arm64 && apt-get update
#   apt-get install g++-aarch64-linux-gnu qemu-user-static libgtest-dev:arm64 libfmt-dev:arm64
#   cmake --preset aarch64 && cmake --build --preset aarch64 --target cpu_gemm_test
#   ctest --test-dir build/aarch64 -R cpu_gemm_test
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
# qemu 7.2 knows bf16 and i8mm as -cpu max. No -L: the C library beside the cross compiler is another build than
# the one that came with the arm64 packages, and a loader of one with a library of the other hangs in pthread_create.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -cpu max)
