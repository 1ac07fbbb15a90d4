// SPDX-License-Identifier: Apache-2.0
#include "openmp.h"

#include <dlfcn.h>

#include <atomic>
#include <functional>

#include "moesaic/runtime.h"

namespace moesaic::python {
namespace {

// What compilers call for `#pragma omp parallel`: runs work(data) on every thread of a team, the caller among them.
using Parallel = void (*)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);

// A team may have fewer threads than were asked for (inside another parallel region it has one), so that bodies are
// handed out, not numbered by thread.
struct Bodies {
  const std::function<void(int)>* body;
  int count;
  std::atomic<int> next{0};
  static void work(void* data) {
    auto& self = *static_cast<Bodies*>(data);
    for (int i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < self.count;) (*self.body)(i);
  }
};

}  // namespace

void use_openmp(const std::string& path) {
  if (path.empty()) return set_parallel_hook({});
  void* const runtime = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (runtime == nullptr)
    throw Error(ErrorCode::kInvalidArgument, "use_openmp: " + path + " is not loaded in this process");
  const auto parallel = reinterpret_cast<Parallel>(dlsym(runtime, "GOMP_parallel"));
  if (parallel == nullptr)
    throw Error(ErrorCode::kInvalidArgument, "use_openmp: " + path + " has no GOMP_parallel; pass an OpenMP runtime");
  set_parallel_hook([parallel](int n, const std::function<void(int)>& body) {
    Bodies bodies{.body = &body, .count = n};
    parallel(Bodies::work, &bodies, static_cast<unsigned>(n), 0);
  });
}

}  // namespace moesaic::python
