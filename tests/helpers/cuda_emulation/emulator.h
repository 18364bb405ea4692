// Runs a CUDA kernel on the host, slowly and strictly: every thread of a block is a coroutine, blocks follow each
// other. Threads of a warp meet at warp operations and threads of a block at barriers; a thread that does not come,
// a warp whose lanes are at different operations, a value from a lane that has left and a misaligned vector access
// end in an exception, where a GPU may hang, give a wrong value, or work by luck. The order of blocks and threads is
// drawn from a seed, so that results that depend on it show.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace cuda_emulation {

struct Grid {
  int64_t blocks_x = 0;
  int64_t blocks_y = 0;
  int64_t threads = 0;
};

void run(const Grid& grid, const std::function<void()>& kernel);

void sync_block();
// Every lane gives `value` and gets that of lane source(its own lane).
uint64_t exchange(unsigned mask, uint64_t value, const char* operation, const std::function<int(int)>& source);
// Bit i: what lane i gave.
unsigned vote(unsigned mask, bool value, const char* operation);
void require_aligned(const void* pointer, size_t bytes);

}  // namespace cuda_emulation

// For the tests, by ctypes.
extern "C" {
// Order of blocks and threads of the launches that follow.
void vd_emulation_seed(uint64_t seed);
int64_t vd_emulation_launches();
// Size and parameter types of the last launch.
const char* vd_emulation_last();
}
