// SPDX-License-Identifier: Apache-2.0
// The pool: jobs live on their callers' stacks and are linked into a list; workers join any job that
// still has tasks and a free seat. A list, and not one slot, so that forwards of several host threads
// run side by side instead of queueing.
#include "cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "moesaic/runtime.h"

namespace moesaic {
namespace {

constexpr int kMaxThreads = 4096;
// How long a worker looks for the next job before it sleeps. A forward's stages follow each other
// within a few microseconds; a futex wake-up costs about as much as this.
constexpr auto kStayAwake = std::chrono::microseconds(50);

thread_local bool inside_task = false;
thread_local int worker_node = -1;  // -1: not a worker, so wherever it runs at the moment

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int cores_available() { return static_cast<int>(topology().cores.size()); }

int node_of_this_thread() {
  const Topology& t = topology();
  if (t.nodes() == 1) return 0;
  return worker_node >= 0 && worker_node < t.nodes() ? worker_node : t.node_of_cpu(sched_getcpu());
}

Pinning default_pinning() {
  const char* text = std::getenv("MOESAIC_PIN");
  if (text == nullptr || *text == '\0' || std::strcmp(text, "0") == 0) return Pinning::kNone;
  if (std::strcmp(text, "1") == 0) return Pinning::kCores;
  invalid(std::string("MOESAIC_PIN: expected 0 or 1, got '") + text + "'");
}
std::atomic<Pinning>& chosen_pinning() {
  static std::atomic<Pinning> pinning{default_pinning()};
  return pinning;
}

// Puts a worker where it belongs; again whenever what decides has changed. Cores that the system refuses are left
// alone.
class Placement {
 public:
  explicit Placement(int thread) : thread_(thread) {}
  void apply() {
    const Topology* t = &topology();
    const Pinning pinning = chosen_pinning().load(std::memory_order_relaxed);
    if (t == applied_ && pinning == pinning_) return;
    const Topology::Core& mine = t->core_of_thread(thread_);
    worker_node = mine.node;
    // Untouched so far, and nothing is wanted: a thread keeps what its program gave it.
    const bool bound = pinning == Pinning::kCores || t->nodes() > 1;
    if (bound || bound_) {
      cpu_set_t set;
      CPU_ZERO(&set);
      for (const Topology::Core& core : t->cores)
        if (pinning == Pinning::kCores ? core.cpu == mine.cpu : core.node == mine.node)
          if (core.cpu < CPU_SETSIZE) CPU_SET(static_cast<unsigned>(core.cpu), &set);
      (void)sched_setaffinity(0, sizeof(set), &set);
    }
    bound_ = bound;
    applied_ = t;
    pinning_ = pinning;
  }

 private:
  const int thread_;
  const Topology* applied_ = nullptr;
  Pinning pinning_ = Pinning::kNone;
  bool bound_ = false;
};

int default_threads() {
  const char* text = std::getenv("MOESAIC_THREADS");
  if (text == nullptr || *text == '\0') return cores_available();
  int value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < 1 || value > kMaxThreads)
    invalid("MOESAIC_THREADS: expected a number from 1 to " + std::to_string(kMaxThreads) +
            ", got '" + text + "'");
  return value;
}

// The counters every participant of one job draws from, and the first thing that went wrong.
struct Tasks {
  Tasks(const NodeRuns& runs, FunctionRef<void(std::int64_t)> body) : runs(runs), body(body) {
    for (int n = 0; n < runs.nodes; ++n) counter(n).store(runs.first(n), std::memory_order_relaxed);
  }

  struct alignas(64) Counter {
    std::atomic<std::int64_t> next;
  };
  const NodeRuns& runs;
  const FunctionRef<void(std::int64_t)> body;
  std::array<Counter, kMaxNodes> counters;
  std::mutex error_mutex;
  std::exception_ptr error;

  std::atomic<std::int64_t>& counter(int node) {
    return counters[static_cast<std::size_t>(node)].next;
  }
  bool exhausted() {
    for (int n = 0; n < runs.nodes; ++n)
      if (counter(n).load(std::memory_order_relaxed) < runs.end(n)) return false;
    return true;
  }
  void work() {
    const bool outer = std::exchange(inside_task, true);
    const int home = node_of_this_thread();
    for (int n = home; n < home + runs.nodes; ++n) work_at(n % runs.nodes);
    inside_task = outer;
  }
  void work_at(int node) {
    for (;;) {
      const std::int64_t task = counter(node).fetch_add(1, std::memory_order_relaxed);
      if (task >= runs.end(node)) return;
      try {
        body(task);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
  void rethrow() const {
    if (error) std::rethrow_exception(error);
  }
};

struct Job {
  Tasks* tasks = nullptr;
  int free_seats = 0;                // guarded by Pool::mutex_
  std::atomic<int> helpers{0};       // workers inside; only rises while the job is listed
  Job* next = nullptr;               // guarded by Pool::mutex_
};

class Pool {
 public:
  Pool() { chosen_pinning(); }  // a wrong MOESAIC_PIN is the caller's to hear of, not a worker's
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(Tasks& tasks, int threads) {
    Job job;
    job.tasks = &tasks;
    job.free_seats = threads - 1;
    bool sleepers = false;
    {
      const std::lock_guard lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, thread = static_cast<int>(workers_.size()) + 1] { serve(thread); });
      spin_ = static_cast<int>(workers_.size()) < cores_;
      job.next = jobs_;
      jobs_ = &job;
      epoch_.fetch_add(1, std::memory_order_release);
      sleepers = sleeping_ > 0;
    }
    if (sleepers) {
      if (threads == 2)
        wake_.notify_one();
      else
        wake_.notify_all();
    }
    tasks.work();
    {
      const std::lock_guard lock(mutex_);
      Job** link = &jobs_;
      while (*link != &job) link = &(*link)->next;
      *link = job.next;
    }
    // Nobody can join any more; wait for those who did. They are in their last task: spin for a
    // moment, then let others have the core.
    for (int round = 0; job.helpers.load(std::memory_order_acquire) != 0; ++round) {
      if (round < 4096)
        relax();
      else
        std::this_thread::yield();
    }
  }

 private:
  // With mutex_ held: a job with tasks left and a free seat, entered; or null.
  Job* join() {
    for (Job* job = jobs_; job != nullptr; job = job->next) {
      if (job->free_seats == 0 || job->tasks->exhausted()) continue;
      --job->free_seats;
      job->helpers.fetch_add(1, std::memory_order_relaxed);
      return job;
    }
    return nullptr;
  }

  void serve(int thread) {
    Placement placement(thread);
    std::unique_lock lock(mutex_);
    while (!stop_) {
      if (Job* job = join()) {
        lock.unlock();
        placement.apply();
        job->tasks->work();
        job->helpers.fetch_sub(1, std::memory_order_release);  // the job may be gone behind this
        lock.lock();
        continue;
      }
      const std::uint64_t seen = epoch_.load(std::memory_order_relaxed);
      if (spin_) {  // pointless, and harmful, when there are more threads than cores
        lock.unlock();
        const bool news = look_out(seen);
        lock.lock();
        if (news) continue;
      }
      ++sleeping_;
      wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
      --sleeping_;
    }
  }

  bool look_out(std::uint64_t seen) const {
    const auto until = std::chrono::steady_clock::now() + kStayAwake;
    do {
      for (int i = 0; i < 64; ++i) {
        if (epoch_.load(std::memory_order_acquire) != seen) return true;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }

  const int cores_ = cores_available();
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  Job* jobs_ = nullptr;
  int sleeping_ = 0;
  bool stop_ = false;
  bool spin_ = true;
  std::atomic<std::uint64_t> epoch_{0};  // rises with every job
};

Pool& pool() {
  static Pool instance;
  return instance;
}

std::atomic<int> chosen_threads{0};  // 0: the default

struct Hook {
  std::mutex mutex;
  std::shared_ptr<const ParallelHook> function;
  std::atomic<bool> present{false};
};
Hook& hook() {
  static Hook instance;
  return instance;
}
std::shared_ptr<const ParallelHook> current_hook() {
  Hook& h = hook();
  if (!h.present.load(std::memory_order_acquire)) return nullptr;
  const std::lock_guard lock(h.mutex);
  return h.function;
}

}  // namespace

void set_num_threads(int threads) {
  check_range("threads", threads, 1, kMaxThreads);
  chosen_threads.store(threads, std::memory_order_relaxed);
}

int num_threads() {
  if (const int chosen = chosen_threads.load(std::memory_order_relaxed)) return chosen;
  static const int by_default = default_threads();
  return by_default;
}

void set_parallel_hook(ParallelHook function) {
  Hook& h = hook();
  const std::lock_guard lock(h.mutex);
  h.present.store(static_cast<bool>(function), std::memory_order_release);
  h.function =
      function ? std::make_shared<const ParallelHook>(std::move(function)) : nullptr;
}

void set_pinning(Pinning pinning) { chosen_pinning().store(pinning, std::memory_order_relaxed); }

void parallel_for(const NodeRuns& runs, FunctionRef<void(std::int64_t)> body) {
  const std::int64_t count = runs.count();
  if (count <= 0) return;
  Tasks tasks(runs, body);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads(), count));
  if (threads == 1 || inside_task) {
    tasks.work();
  } else if (const auto host = current_hook()) {
    (*host)(threads, [&](int) { tasks.work(); });
  } else {
    pool().run(tasks, threads);
  }
  tasks.rethrow();
}

}  // namespace moesaic
