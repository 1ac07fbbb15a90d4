// SPDX-License-Identifier: Apache-2.0
// The CPU backend's threads: one pool per process in which the caller takes part. Workers sleep when
// there is nothing to do, and stay awake for some tens of microseconds behind a job, because the next
// stage of a forward follows at once. set_num_threads, num_threads and set_parallel_hook of
// moesaic/runtime.h are defined here, too.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "cpu/numa.h"

namespace moesaic {

// A callable's address and how to call it: what std::function does without owning or allocating.
// The callable must outlive the call it is passed to.
template <typename Signature>
class FunctionRef;
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
  FunctionRef(F&& f)  // NOLINT: implicit, so that a lambda can be passed as it stands
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

// Runs body(i) once for every task i and returns when all are done. Each run's tasks are handed out by a
// shared counter, in ascending order, to the node's threads first, then to whoever is done with his own: which
// thread runs which is not determined, so a body's result must not depend on it. Calls from several host threads
// share the workers. A call from inside a body runs in place. The first exception of a body is rethrown here; the
// other tasks still run.
void parallel_for(const NodeRuns& tasks, FunctionRef<void(std::int64_t)> body);
inline void parallel_for(std::int64_t tasks, FunctionRef<void(std::int64_t)> body) {
  parallel_for(NodeRuns(tasks), body);
}

// Whether each worker stays on one core: the second, third, ... of those this process may run on, nodes in turn (the
// first is left to the thread that calls, which stays where its program wants it). Default: MOESAIC_PIN. Without it
// workers go where the system puts them, on a machine of several nodes within their node.
enum class Pinning : std::uint8_t { kNone, kCores };
void set_pinning(Pinning pinning);

}  // namespace moesaic
