# SPDX-License-Identifier: Apache-2.0
# The front door. CMake (CMakePresets.json) does the work; these are the commands one types.
#   make demo    install what is missing, build the CPU release, run a real checkpoint's MoE layer
#   make test    build and run every test that a machine without a GPU can run
#   make build   the library and the command only: build/cpu/moesaic
#   make cuda    compile everything CUDA (needs nvcc 13, no GPU)
#   make cuda-test    the tests of that build that need no GPU
#   make asan | tsan    the tests under AddressSanitizer + UBSan | ThreadSanitizer
#   make fuzz    every libFuzzer target for FUZZ_SECONDS (30) each
#   make install [BUILD=cuda] [PREFIX=/usr/local]
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
BUILD ?= cpu
FUZZ_SECONDS ?= 30
CHECKPOINT := examples/data/qwen3-moe-tiny
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))

# ccache, where it is: one cache for all clones and build folders of this project.
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1

.PHONY: demo test build cuda cuda-test asan tsan fuzz install clean deps
.DEFAULT_GOAL := build

deps:
	@scripts/install_deps.sh build

# Configured once; Ninja configures again by itself when a CMake file changes.
# Configured again behind scripts/setup_venv.sh, too: it brings the Python tests.
build/%/build.ninja: $(wildcard .venv/pyvenv.cfg) | deps
	@cmake --preset $* $(CMAKE_FLAGS)

build: build/cpu/build.ninja
	@cmake --build --preset cpu -j $(JOBS) --target moesaic_library moesaic_command

demo: build
	build/cpu/moesaic info
	build/cpu/moesaic run --checkpoint $(CHECKPOINT) --layer 0 --tokens 64 --seed 1

test: build/cpu/build.ninja
	@cmake --build --preset cpu -j $(JOBS)
	@ctest --preset cpu -j $(JOBS) --output-log build/cpu/Testing/Temporary/summary.log
	@cat build/cpu/not_tested.txt
	@sed -n '/^MOESAIC_PYTHON (/{s/^/comparisons with transformers were skipped: /p;q}' build/cpu/Testing/Temporary/LastTest.log

build/cuda/build.ninja: CMAKE_FLAGS += -DCMAKE_CUDA_COMPILER=$(NVCC)
cuda: | deps
	@test -n "$(NVCC)" || { echo "make cuda: no nvcc on the PATH or in /usr/local/cuda/bin; install the \
	CUDA toolkit 13, or name its compiler: make cuda NVCC=/path/to/nvcc" >&2; exit 2; }
	@$(MAKE) --no-print-directory build/cuda/build.ninja
	@cmake --build --preset cuda -j $(JOBS)
cuda-test: cuda
	@ctest --preset cuda -L no_gpu -V --output-log build/cuda/Testing/no_gpu.log >/dev/null || \
	{ cat build/cuda/Testing/no_gpu.log; exit 1; }
	@grep -E 'tests passed|kernels for|[0-9] MB$$|^ *[0-9]+/[0-9]+ Test' build/cuda/Testing/no_gpu.log

asan: build/asan/build.ninja
	@cmake --build --preset asan -j $(JOBS)
	@ctest --preset asan -j $(JOBS)

# The tests in which threads meet; the others run one product after the other and take ten times as long here.
TSAN_TESTS ?= thread_pool_test numa_test layer_test stages_test
tsan: build/tsan/build.ninja
	@cmake --build --preset tsan -j $(JOBS) --target $(TSAN_TESTS)
	@ctest --preset tsan -R '^($(subst $(eval) ,|,$(strip $(TSAN_TESTS))))$$'

fuzz: | deps
	@scripts/install_deps.sh fuzz
	@$(MAKE) --no-print-directory build/fuzz/build.ninja
	@cmake --build --preset fuzz -j $(JOBS)
	@scripts/run_fuzzers.sh build/fuzz $(FUZZ_SECONDS)

install: $(if $(filter cuda,$(BUILD)),cuda,build)
	cmake --install build/$(BUILD) --prefix $(PREFIX)

clean:
	rm -rf build
