// One pool of threads for everything. Work is a number of chunks; whoever is running claims the next one. The caller works too
// and then waits only for chunks that are claimed already, so a worker without a processor cannot hold anybody up, as it does
// where each thread owns a fixed share and all meet at a barrier (performance.md 4.8).
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nf {
namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A job is published as (generation << 32 | next chunk) in `ticket`: a claim of a chunk of an older job fails by its generation.
struct Pool {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> done{0};
    std::atomic<int64_t> count{0};
    std::atomic<void (*)(void *, int64_t)> body{nullptr};
    std::atomic<void *> state{nullptr};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // what the first chunk that failed threw; read once all are done

    std::mutex mutex;  // for sleeping
    std::condition_variable wake;    // there is a job
    std::condition_variable needed;  // more threads are wanted
    std::atomic<int> sleeping{0};    // on `wake`
    std::atomic<int> wanted{1};      // threads, the caller included
    std::vector<std::thread> workers;
    std::mutex busy;  // one job at a time; another caller runs its own serially

    void want(int threads) {
        if (threads == wanted.load(std::memory_order_relaxed)) return;
        if (threads < wanted.exchange(threads)) return;
        std::lock_guard<std::mutex> lock(mutex);
        needed.notify_all();
    }

    // Claim and run chunks of generation `g` until there are none.
    void work(uint32_t g) {
        for (;;) {
            uint64_t now = ticket.load(std::memory_order_acquire);
            const auto total = static_cast<uint64_t>(count.load(std::memory_order_relaxed));
            if (now >> 32 != g || (now & 0xffffffffu) >= total) return;
            auto *run = body.load(std::memory_order_relaxed);
            void *with = state.load(std::memory_order_relaxed);
            // what was read above belongs to generation g if the ticket still does, which the exchange proves
            if (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
            try {
                run(with, static_cast<int64_t>(now & 0xffffffffu));
            } catch (...) {  // the caller's business, but the job has to end first: others still use what it owns
                if (!failed.exchange(true)) error = std::current_exception();
            }
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void worker(int index) {
        uint32_t seen = static_cast<uint32_t>(ticket.load(std::memory_order_acquire) >> 32);
        for (;;) {
            if (index >= wanted.load(std::memory_order_relaxed)) {  // not to be woken by each job of the others
                std::unique_lock<std::mutex> lock(mutex);
                needed.wait(lock, [&] { return index < wanted; });
            }
            const auto start = std::chrono::steady_clock::now();
            int spins = 0;
            for (;;) {
                const auto g = static_cast<uint32_t>(ticket.load(std::memory_order_acquire) >> 32);
                if (g != seen) {
                    seen = g;
                    break;
                }
                pause();
                if (++spins % 64) continue;
                const auto waited = std::chrono::steady_clock::now() - start;
                if (waited > std::chrono::microseconds(200)) {  // longer than the gaps between layers of a decoder
                    std::unique_lock<std::mutex> lock(mutex);
                    sleeping.fetch_add(1);
                    wake.wait(lock, [&] { return static_cast<uint32_t>(ticket.load() >> 32) != seen; });
                    sleeping.fetch_sub(1);
                    spins = 0;
                } else if (waited > std::chrono::microseconds(100)) {
                    std::this_thread::yield();
                }
            }
            if (index < wanted.load(std::memory_order_relaxed)) work(seen);
        }
    }

    void run(int64_t n, void (*f)(void *, int64_t), void *with) {
        const int threads = wanted.load(std::memory_order_relaxed);
        if (n < 1) return;
        if (threads == 1 || n == 1 || !busy.try_lock()) {
            for (int64_t i = 0; i < n; i++) f(with, i);
            return;
        }
        std::lock_guard<std::mutex> held(busy, std::adopt_lock);
        while (static_cast<int>(workers.size()) < threads - 1) {
            try {
                workers.emplace_back(&Pool::worker, this, static_cast<int>(workers.size()) + 1);
            } catch (const std::exception &) {
                break;  // the system has no more threads, or no memory for them: fewer do the same work
            }
        }
        // first a generation without chunks: a worker late for the old job must not find a chunk in the larger count of the new one
        const auto g = static_cast<uint32_t>(ticket.load(std::memory_order_relaxed) >> 32) + 2;
        ticket.store(static_cast<uint64_t>(g - 1) << 32 | 0xffffffffu, std::memory_order_seq_cst);
        body.store(f, std::memory_order_relaxed);
        state.store(with, std::memory_order_relaxed);
        done.store(0, std::memory_order_relaxed);
        count.store(n, std::memory_order_relaxed);
        ticket.store(static_cast<uint64_t>(g) << 32, std::memory_order_seq_cst);
        if (sleeping.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex);
            wake.notify_all();
        }
        work(g);
        int spins = 0;
        while (done.load(std::memory_order_acquire) < n) {  // chunks that others have claimed and not finished
            pause();
            if (++spins > 2000) std::this_thread::yield();
        }
        if (failed.load(std::memory_order_relaxed)) {
            const std::exception_ptr thrown = std::move(error);
            error = nullptr, failed = false;
            std::rethrow_exception(thrown);
        }
    }
};

alignas(Pool) unsigned char room[sizeof(Pool)];  // the pool is never destroyed: workers may outlive static destructors

// The child of a fork() has none of the workers, and locks and lists are as some other thread left them. So it gets a new pool
// in the place of the old, which leaves behind what it owned.
void begin_anew() {
    const int wanted = reinterpret_cast<Pool *>(room)->wanted;
    (new (room) Pool)->wanted = wanted;
}

Pool &pool() {
    static Pool *one = [] {
        Pool *made = new (room) Pool;
        pthread_atfork(nullptr, nullptr, begin_anew);
        return made;
    }();
    return *one;
}

}  // namespace

void parallel(int64_t count, void (*body)(void *, int64_t), void *state) { pool().run(count, body, state); }

}  // namespace nf

NF_API void nf_set_threads(int threads) { nf::pool().want(threads < 1 ? 1 : threads > 256 ? 256 : threads); }
NF_API int nf_threads(void) { return nf::pool().wanted; }
