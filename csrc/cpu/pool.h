// The thread pool: workers, each bound to a processor, that run lists of kernel calls together with the caller.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "team.h"

namespace pelton {

// A centralised barrier: the last to arrive sets the team's counters back and opens it for all.
class Barrier {
   public:
    explicit Barrier(size_t num_threads) : claimed(num_threads), num_threads_(num_threads) {}
    void wait();

    std::vector<Counter> claimed;

   private:
    const size_t num_threads_;
    alignas(64) std::atomic<size_t> arrived_{0};
    alignas(64) std::atomic<size_t> round_{0};
};

// Memory aligned to cache lines (large pieces: to huge pages), zeroed by the system.
class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(size_t size);
    ~Buffer();
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

   private:
    void swap(Buffer& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

class Pool {
   public:
    using Job = std::function<void(const Team&)>;

    // `cpus`: the processors of the threads, for as many threads; the caller of run() is the first thread and is not
    // bound. Empty: `num_threads` threads that are not bound.
    Pool(size_t num_threads, std::vector<int> cpus);
    ~Pool();

    size_t num_threads() const { return num_threads_; }

    // Every thread of the team runs the job once; returns when all have. One job at a time: others wait.
    void run(const Job& job, Scratch scratch = {});

   private:
    void work(size_t thread);
    void reserve(Scratch scratch);
    Team team(size_t thread) { return {thread, num_threads_, &barrier_, barrier_.claimed.data(), shared_.data(), locals_[thread].data()}; }

    const size_t num_threads_;
    const std::vector<int> cpus_;
    Barrier barrier_;
    Buffer shared_;
    std::vector<Buffer> locals_;
    std::vector<std::thread> threads_;
    std::mutex one_job_;
    std::mutex sleep_;
    std::condition_variable wake_;
    const Job* job_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};  // number of jobs begun
    std::atomic<bool> closing_{false};
};

}  // namespace pelton
