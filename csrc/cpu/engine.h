// What the module works with: one pool of threads, one table of kernels, and the program being recorded, if any.
#pragma once

#include "program.h"

namespace pelton {

Pool& pool();
void set_pool(size_t num_threads, const std::vector<int>& cpus);

const Kernels& kernels();
void set_kernels(const Kernels& table);

// Runs a call at once, or adds it to the program that is being recorded. Throws std::invalid_argument if the program
// was made for another number of rows.
void submit(const Call& call, size_t num_rows);

void begin_recording(Program& program);
void end_recording();

// Runs programs one after the other, each with its number of rows.
void replay(const std::vector<std::pair<const Program*, size_t>>& parts);

}  // namespace pelton
