// Sharing the items of a job among XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace mamba_eqx {

// A job that several threads work on. A thread that comes late finds no item left; the job outlives
// the call for its sake, but the arrays do not.
struct Job {
  std::function<void(int64_t)> run;
  int64_t items;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    int64_t count = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items; ++count) run(i);
    if (count > 0) done.fetch_add(count, std::memory_order_release);
  }

  void wait() const {
    // The other threads are each within an item, which takes microseconds unless the system runs
    // something else in their place.
    for (int spins = 0; done.load(std::memory_order_acquire) < items; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }
};

// Calls `run` with every number below `items`, each once, and returns when all calls have.
inline void for_each_item(xla::ffi::ThreadPool& pool, int64_t items,
                          std::function<void(int64_t)> run) {
  if (items == 0) return;
  auto job = std::make_shared<Job>();
  job->run = std::move(run);
  job->items = items;
  const int64_t threads = std::min<int64_t>(pool.num_threads(), items);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([job] { job->work(); });
  job->work();
  job->wait();
}

}  // namespace mamba_eqx
