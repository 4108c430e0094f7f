// Kernel calls as data: run at once, or recorded into a program and replayed as often as wanted.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace pelton {

// One kernel with its arguments. The number of rows is given when it is run.
struct Call {
    static constexpr size_t max_args = 192;

    const char* name;
    void (*run)(const Call& call, size_t num_rows, const Team& team);
    void (*kernel)();  // a Kernel<Args>, cast back by `run`
    Scratch scratch;
    alignas(16) uint8_t args[max_args];

    template <typename Args>
    static Call make(const char* name, Kernel<Args> kernel, const Args& args, Scratch scratch = {}) {
        static_assert(sizeof(Args) <= max_args && std::is_trivially_copyable_v<Args>);
        Call call{name, &Call::run_as<Args>, reinterpret_cast<void (*)()>(kernel), scratch, {}};
        std::memcpy(call.args, &args, sizeof args);
        return call;
    }

   private:
    template <typename Args>
    static void run_as(const Call& call, size_t num_rows, const Team& team) {
        const auto kernel = reinterpret_cast<Kernel<Args>>(call.kernel);
        kernel(*reinterpret_cast<const Args*>(call.args), num_rows, team);
    }
};

// Calls that always run one after the other, over fixed buffers. Recorded for `max_rows` rows, replayed for any number
// of rows up to that: every buffer has its rows outermost.
class Program {
   public:
    explicit Program(size_t max_rows) : max_rows_(max_rows) {}
    size_t max_rows() const { return max_rows_; }
    size_t num_calls() const { return calls_.size(); }
    void add(const Call& call) {
        calls_.push_back(call);
        scratch_.shared = std::max(scratch_.shared, call.scratch.shared);
        scratch_.local = std::max(scratch_.local, call.scratch.local);
    }
    const std::vector<Call>& calls() const { return calls_; }
    Scratch scratch() const { return scratch_; }
    void run(size_t num_rows, const Team& team) const {
        for (const Call& call : calls_) {
            call.run(call, num_rows, team);
            team.barrier();
        }
    }

   private:
    const size_t max_rows_;
    std::vector<Call> calls_;
    Scratch scratch_;
};

}  // namespace pelton
