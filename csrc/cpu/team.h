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

class Barrier;

struct Team {
    size_t thread, num_threads;
    Barrier* meeting;
    uint8_t* shared;
    uint8_t* local;

    // All wait here for each other; what they wrote before is seen after.
    void barrier() const;

    // This thread's part of n things: contiguous, and the same for the same n.
    Range share(size_t n) const { return {n * thread / num_threads, n * (thread + 1) / num_threads}; }
};

}  // namespace pelton
