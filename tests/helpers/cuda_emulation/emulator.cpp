#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_emulation {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kStackBytes = 128 * 1024;

uint64_t seed = 0;
int64_t launches = 0;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
};

struct Warp {
  int alive = 0;
  int arrived = 0;
  std::string operation;
  uint64_t given[kWarpSize] = {};
  uint64_t taken[kWarpSize] = {};
  unsigned present = 0;        // lanes that have given
  unsigned taken_present = 0;  // lanes of the exchange that is over
};

// The threads of the block that runs. Stacks are kept for the next one.
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  int current = 0;
  int alive = 0;
  int at_barrier = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
};

Block block;

void switch_to_scheduler() { swapcontext(&block.threads[block.current].context, &block.scheduler); }

void end_exchange(Warp& warp, int warp_index) {
  std::copy(warp.given, warp.given + kWarpSize, warp.taken);
  warp.taken_present = warp.present;
  warp.present = 0;
  warp.arrived = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const size_t index = static_cast<size_t>(warp_index) * kWarpSize + lane;
    if (index < block.threads.size() && block.threads[index].state == State::kAtWarp) {
      block.threads[index].state = State::kReady;
    }
  }
}

void end_barrier() {
  block.at_barrier = 0;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
}

void thread_main() {
  try {
    (*block.kernel)();
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  Thread& thread = block.threads[block.current];
  thread.state = State::kDone;
  const int warp_index = block.current / kWarpSize;
  Warp& warp = block.warps[warp_index];
  --block.alive;
  --warp.alive;
  if (warp.alive > 0 && warp.arrived == warp.alive) end_exchange(warp, warp_index);
  if (block.alive > 0 && block.at_barrier == block.alive) end_barrier();
  switch_to_scheduler();  // does not return
}

// Waits until all lanes of the warp that are left have given a value.
Warp& meet(unsigned mask, uint64_t value, const std::string& operation) {
  if (mask != kAllLanes) throw std::logic_error(operation + ": only full masks are emulated");
  const int warp_index = block.current / kWarpSize;
  const int lane = block.current % kWarpSize;
  Warp& warp = block.warps[warp_index];
  if (warp.arrived > 0 && warp.operation != operation) {
    throw std::logic_error("lanes of one warp are at " + operation + " and at " + warp.operation);
  }
  warp.operation = operation;
  warp.given[lane] = value;
  warp.present |= 1u << lane;
  ++warp.arrived;
  if (warp.arrived == warp.alive) {
    end_exchange(warp, warp_index);
  } else {
    block.threads[block.current].state = State::kAtWarp;
    switch_to_scheduler();
  }
  return warp;
}

void start_block(const std::function<void()>& kernel, int num_threads) {
  block.kernel = &kernel;
  block.error = nullptr;
  block.alive = num_threads;
  block.at_barrier = 0;
  block.threads.resize(num_threads);
  block.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, Warp{});
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack) thread.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
    thread.state = State::kReady;
    ++block.warps[i / kWarpSize].alive;
  }
}

void run_block(const std::function<void()>& kernel, const std::vector<int>& order) {
  start_block(kernel, static_cast<int>(order.size()));
  while (block.alive > 0 && !block.error) {
    bool progress = false;
    for (const int i : order) {
      if (block.threads[i].state != State::kReady || block.error) continue;
      progress = true;
      block.current = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
    if (!progress) throw std::logic_error("threads wait for others that never come");
  }
  if (block.error) std::rethrow_exception(block.error);
}

}  // namespace

void run(const Grid& grid, const std::function<void()>& kernel) {
  ++launches;
  if (grid.threads < 1 || grid.threads > 1024 || grid.blocks_x < 1 || grid.blocks_x > 2147483647 || grid.blocks_y < 1 ||
      grid.blocks_y > 65535) {
    throw std::logic_error("CUDA refuses this grid: " + std::to_string(grid.blocks_x) + " x " +
                           std::to_string(grid.blocks_y) + " blocks of " + std::to_string(grid.threads));
  }
  gridDim = dim3(static_cast<unsigned>(grid.blocks_x), static_cast<unsigned>(grid.blocks_y), 1);
  blockDim = dim3(static_cast<unsigned>(grid.threads), 1, 1);
  std::mt19937_64 random(seed);
  std::vector<int> order(grid.threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<int64_t> blocks(grid.blocks_x * grid.blocks_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (seed != 0) {
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(blocks.begin(), blocks.end(), random);
  }
  for (const int64_t index : blocks) {
    blockIdx = {static_cast<unsigned>(index % grid.blocks_x), static_cast<unsigned>(index / grid.blocks_x), 0};
    run_block(kernel, order);
  }
}

void sync_block() {
  ++block.at_barrier;
  if (block.at_barrier == block.alive) {
    end_barrier();
    return;
  }
  block.threads[block.current].state = State::kAtBarrier;
  switch_to_scheduler();
}

uint64_t exchange(unsigned mask, uint64_t value, const char* operation, const std::function<int(int)>& source) {
  const int from = source(block.current % kWarpSize);
  // Part of the name, so that lanes that ask for different distances are found out.
  const Warp& warp = meet(mask, value, operation + (" " + std::to_string(from ^ (block.current % kWarpSize))));
  if (from < 0 || from >= kWarpSize || !(warp.taken_present >> from & 1)) {
    throw std::logic_error(std::string(operation) + " reads lane " + std::to_string(from) + ", which has left");
  }
  return warp.taken[from];
}

unsigned vote(unsigned mask, bool value, const char* operation) {
  const Warp& warp = meet(mask, value, operation);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((warp.taken_present >> lane & 1) && warp.taken[lane]) bits |= 1u << lane;
  }
  return bits;
}

void require_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    throw std::logic_error("misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace cuda_emulation

namespace {
std::string last_launch;
}

void vd_emulation_seed(uint64_t seed) { cuda_emulation::seed = seed; }
int64_t vd_emulation_launches() { return cuda_emulation::launches; }
const char* vd_emulation_last() { return last_launch.c_str(); }

namespace cuda_emulation {
void describe_launch(const Grid& grid, const std::string& kernel) {
  last_launch = kernel + " " + std::to_string(grid.blocks_x) + "x" + std::to_string(grid.blocks_y) + "x" +
                std::to_string(grid.threads);
}
}  // namespace cuda_emulation
