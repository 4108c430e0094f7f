// The threads that run a kernel together. Each calls it with the same arguments and takes its share of the work.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pelton {

// Memory a kernel needs besides its arguments, in bytes.
struct Scratch {
    size_t shared = 0;  // one piece for the team
    size_t local = 0;   // a piece for each thread
};

struct Range {
    size_t begin, end;
};

// A counter alone on its cache line.
struct alignas(64) Counter {
    std::atomic<size_t> value{0};
};

class Barrier;

struct Team {
    size_t thread, num_threads;
    Barrier* meeting;
    Counter* claimed;  // for each thread: how much of its share is taken; set back at every barrier
    uint8_t* shared;
    uint8_t* local;

    Team(size_t thread, size_t num_threads, Barrier* meeting, Counter* claimed, uint8_t* shared, uint8_t* local)
        : thread(thread), num_threads(num_threads), meeting(meeting), claimed(claimed), shared(shared), local(local) {}

    // All wait here for each other; what they wrote before is seen after.
    void barrier() const;

    // This thread's part of n things: contiguous, and the same for the same n.
    Range share(size_t n) const { return share_of(thread, n); }

    // Calls f(range) for pieces of n things until all are taken: first this thread's share, then what others have left
    // of theirs, so that a slow processor does not hold up the team. Once between two barriers.
    template <typename Function>
    void each_piece(size_t n, size_t piece, Function&& f) const {
        for (size_t i = 0; i < num_threads; ++i) {
            const size_t owner = (thread + i) % num_threads;
            const Range all = share_of(owner, n);
            for (;;) {
                const size_t begin = all.begin + claimed[owner].value.fetch_add(piece, std::memory_order_relaxed);
                if (begin >= all.end) break;
                f(Range{begin, begin + piece < all.end ? begin + piece : all.end});
            }
        }
    }

   private:
    Range share_of(size_t t, size_t n) const { return {n * t / num_threads, n * (t + 1) / num_threads}; }
};

}  // namespace pelton
