#include "engine.h"

#include <memory>
#include <stdexcept>

namespace pelton {
namespace {

std::unique_ptr<Pool> the_pool;
const Kernels* the_kernels = supported_kernels()[0];
thread_local Program* recording = nullptr;

}  // namespace

Pool& pool() {
    if (!the_pool) the_pool = std::make_unique<Pool>(1, std::vector<int>{});
    return *the_pool;
}
void set_pool(size_t num_threads, const std::vector<int>& cpus) {
    the_pool = std::make_unique<Pool>(num_threads, cpus);
}

const Kernels& kernels() { return *the_kernels; }
void set_kernels(const Kernels& table) { the_kernels = &table; }

void submit(const Call& call, size_t num_rows) {
    if (recording) {
        if (num_rows != recording->max_rows())
            throw std::invalid_argument("a program is recorded with all its rows at once");
        recording->add(call);
    } else {
        pool().run([&](const Team& team) { call.run(call, num_rows, team); }, call.scratch);
    }
}

void begin_recording(Program& program) {
    if (recording) throw std::invalid_argument("a program is being recorded already");
    recording = &program;
}
void end_recording() { recording = nullptr; }

void replay(const std::vector<std::pair<const Program*, size_t>>& parts) {
    Scratch scratch;
    for (const auto& [program, num_rows] : parts) {
        if (num_rows > program->max_rows()) throw std::invalid_argument("more rows than the program was recorded for");
        scratch.shared = std::max(scratch.shared, program->scratch().shared);
        scratch.local = std::max(scratch.local, program->scratch().local);
    }
    pool().run(
        [&](const Team& team) {
            for (const auto& [program, num_rows] : parts) program->run(num_rows, team);
        },
        scratch);
}

}  // namespace pelton
