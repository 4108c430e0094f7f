#include "pool.h"

#include <sys/mman.h>

#include <chrono>
#include <new>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace pelton {
namespace {

constexpr size_t huge_page = size_t(2) << 20;
constexpr int spins_before_yield = 4000;                       // about 50 us: longer than a kernel's imbalance
constexpr auto spin_for_work = std::chrono::microseconds(300);  // longer than Python needs between two steps

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void bind_to(int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(size_t(cpu), &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // where that is forbidden, the thread runs unbound
#else
    (void)cpu;
#endif
}

}  // namespace

void Team::barrier() const { meeting->wait(); }

void Barrier::wait() {
    const size_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        for (Counter& counter : claimed) counter.value.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins < spins_before_yield)
            pause();
        else
            std::this_thread::yield();
    }
}

Buffer::Buffer(size_t size) : size_(size) {
    if (size == 0) return;
    // Mapped with room to begin at a huge page, so that large pieces cost few page-table walks.
    const size_t align = size >= huge_page ? huge_page : 4096;
    const size_t room = size + align;
    void* base = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<uintptr_t>(base);
    const uintptr_t first = (start + align - 1) / align * align;
    const uintptr_t end = (first + size + 4095) / 4096 * 4096;
    if (first > start) munmap(base, first - start);
    if (start + room > end) munmap(reinterpret_cast<void*>(end), (start + room + 4095) / 4096 * 4096 - end);
    data_ = reinterpret_cast<uint8_t*>(first);
#if defined(MADV_HUGEPAGE)
    if (align == huge_page) madvise(data_, size, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() {
    if (data_) munmap(data_, (size_ + 4095) / 4096 * 4096);
}

Pool::Pool(size_t num_threads, std::vector<int> cpus)
    : num_threads_(num_threads), cpus_(std::move(cpus)), barrier_(num_threads), locals_(num_threads) {
    for (size_t thread = 1; thread < num_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
    {
        std::lock_guard lock(sleep_);
        closing_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Pool::reserve(Scratch scratch) {
    if (shared_.size() < scratch.shared) shared_ = Buffer(scratch.shared);
    for (auto& local : locals_)
        if (local.size() < scratch.local) local = Buffer(scratch.local);
}

void Pool::run(const Job& job, Scratch scratch) {
    std::lock_guard lock(one_job_);
    reserve(scratch);
    job_ = &job;
    if (num_threads_ > 1) {
        {
            std::lock_guard awake(sleep_);
            ticket_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }
    job(team(0));
    barrier_.wait();  // nobody still uses the job
}

void Pool::work(size_t thread) {
    if (!cpus_.empty()) bind_to(cpus_[thread]);
    for (uint64_t done = 0;;) {
        const auto until = std::chrono::steady_clock::now() + spin_for_work;
        while (ticket_.load(std::memory_order_acquire) == done) {
            for (int i = 0; i < 64; ++i) pause();
            if (closing_.load(std::memory_order_relaxed)) return;
            if (std::chrono::steady_clock::now() < until) continue;
            std::unique_lock lock(sleep_);
            wake_.wait(lock, [&] { return closing_ || ticket_.load(std::memory_order_acquire) != done; });
            if (closing_) return;
        }
        ++done;
        (*job_)(team(thread));
        barrier_.wait();
    }
}

}  // namespace pelton
