// Threads that share tasks, and the memory that each keeps.

#pragma once

#include "numbers.h"

#include <atomic>
#include <cstdlib>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

// torch's OpenMP runtime, which is already in the process: the threads of a second one would compete with it, at a
// tenth of the speed. Null if no such runtime is loaded; then a single thread runs.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" __attribute__((weak)) int omp_get_thread_num();

namespace {

// Runs body(task, following task or -1, thread) for each task. Each thread has a range of tasks, the same in every
// call, so that its data stays in its caches; a thread that is done continues with the next range, to balance the load.
// The following task is the one that will most likely be the thread's next.
template <class Body> struct Shared {
    static constexpr int MAX_THREADS = 256;
    const Body& body;
    int64_t tasks;
    int threads;
    struct alignas(64) Claimed { std::atomic<int64_t> count; };  // a cache line of its own
    Claimed claimed[MAX_THREADS];

    Shared(const Body& body, int64_t tasks, int threads) : body(body), tasks(tasks), threads(threads) {
        for (int i = 0; i < threads; ++i) claimed[i].count.store(0, std::memory_order_relaxed);
    }
    // The range's task after those that were claimed, or -1.
    int64_t task_after(int range, int64_t count) const {
        int64_t task = tasks * range / threads + count;
        return task < tasks * (range + 1) / threads ? task : -1;
    }
    static void run(void* data) {
        auto& self = *static_cast<Shared*>(data);
        int thread = self.threads > 1 ? omp_get_thread_num() : 0;
        for (int i = 0; i < self.threads; ++i) {
            int range = (thread + i) % self.threads;
            auto& count = self.claimed[range].count;
            for (int64_t task; (task = self.task_after(range, count.fetch_add(1, std::memory_order_relaxed))) >= 0;)
                self.body(task, self.task_after(range, count.load(std::memory_order_relaxed)), thread);
        }
    }
};

// The threads of an OpenMP runtime do not survive a fork, and the child would wait for them forever.
std::atomic<bool> forked{false};

template <class Body> void parallel(int threads, int64_t tasks, const Body& body) {
    bool alone = forked || threads <= 1 || tasks <= 1 || !GOMP_parallel || !omp_get_thread_num;
    threads = alone ? 1 : int(smaller<int64_t>(smaller<int64_t>(threads, tasks), Shared<Body>::MAX_THREADS));
    Shared<Body> shared(body, tasks, threads);
    if (alone) Shared<Body>::run(&shared);
    else GOMP_parallel(Shared<Body>::run, &shared, unsigned(threads), 0);
}

// Memory of the calling thread, kept between calls, since fresh pages cost more than small products.
struct Workspace {
    static constexpr int64_t KEPT = int64_t(32) << 20;
    uint8_t* memory = nullptr;
    int64_t size = 0;
    uint8_t* reserve(int64_t bytes) {
        if (bytes <= size) return memory;
        release();
        memory = static_cast<uint8_t*>(aligned_alloc(4096, size_t(round_up(bytes, 4096))));
        size = memory ? bytes : 0;
        return memory;
    }
    void release() { free(memory); memory = nullptr; size = 0; }
    void trim() { if (size > KEPT) release(); }
    ~Workspace() { release(); }
};
thread_local Workspace workspace;

}  // namespace
