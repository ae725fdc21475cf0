// Built without a sanitizer's instrumentation: what it shares between fibers is its own affair. It
// tells the sanitizers of fibers and barriers instead.

#include "fibers.h"

#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#if defined(EMULATION_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(EMULATION_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration
constexpr int kLaunchFailure = 719;       // cudaErrorLaunchFailure

enum class State { kReady, kAtBlock, kAtWarp, kDone };

// What a sanitizer knows of a fiber.
struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
#if defined(EMULATION_ADDRESS)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
#elif defined(EMULATION_THREAD)
  void* clock = nullptr;
#endif
};

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  Index index;
  unsigned number = 0;
  Site site{"", 0};
  uint32_t mask = 0;
  uint64_t value = 0;
  uint64_t values[kWarp];
};

// The addresses of a block and of its warps' entries name their barriers to the race check.
struct Block {
  Index index;
  std::vector<Thread> threads;
  std::vector<char> warps;
  std::map<const void*, char*> shared;
};

struct Launch {
  Grid grid;
  void (*body)(void*);
  void* argument;
  Fiber scheduler;
  std::unique_ptr<Block> block;
  Thread* thread = nullptr;
  std::array<void*, kMaxThreads> ended_clocks;  // of the block before
  size_t num_ended = 0;
  bool failed = false;
};

Launch* launch = nullptr;
char error[512];

char* stack_of(unsigned number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) stacks.push_back(static_cast<char*>(std::malloc(kStackBytes)));
  return stacks[number];
}

void record(const char* what, Site site) {
  if (launch->failed) return;
  launch->failed = true;
  const Index& block = launch->block->index;
  const Thread* thread = launch->thread;
  int length = std::snprintf(error, sizeof error, "%s:%d: %s, in block (%u, %u, %u)", site.file,
                             site.line, what, block.x, block.y, block.z);
  if (thread != nullptr && length > 0 && size_t(length) < sizeof error) {
    std::snprintf(error + length, sizeof error - length, ", thread (%u, %u, %u)", thread->index.x,
                  thread->index.y, thread->index.z);
  }
}

void jump(Fiber& from, Fiber& to, bool for_good) {
#if defined(EMULATION_ADDRESS)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#elif defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(to.clock, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  swapcontext(&from.context, &to.context);
#if defined(EMULATION_ADDRESS)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void release(void* address) {
#if defined(EMULATION_THREAD)
  __tsan_release(address);
#endif
  (void)address;
}

void acquire(void* address) {
#if defined(EMULATION_THREAD)
  __tsan_acquire(address);
#endif
  (void)address;
}

// By the scheduler: no thread of the block wrote the pattern, all begin after it.
char* allocate(size_t bytes) {
#if defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(launch->scheduler.clock, __tsan_switch_to_fiber_no_sync);
#endif
  const size_t whole = (bytes + 63) / 64 * 64;
  char* memory = static_cast<char*>(std::aligned_alloc(64, whole));
  std::memset(memory, 0xff, bytes);
  release(memory);
#if defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(launch->thread->fiber.clock, __tsan_switch_to_fiber_no_sync);
#elif defined(EMULATION_ADDRESS)
  __asan_poison_memory_region(memory + bytes, whole - bytes);
#endif
  return memory;
}

void leave(State state) {
  Thread* thread = launch->thread;
  thread->state = state;
  jump(thread->fiber, launch->scheduler, state == State::kDone);
}

void enter_thread() {
#if defined(EMULATION_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler.bottom, &launch->scheduler.bytes);
#endif
  launch->body(launch->argument);
  release(launch);
  leave(State::kDone);
}

void start(Thread& thread) {
  Fiber& fiber = thread.fiber;
  fiber.stack = stack_of(thread.number);
#if defined(EMULATION_ADDRESS)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
  fiber.bottom = fiber.stack;
  fiber.bytes = kStackBytes;
#elif defined(EMULATION_THREAD)
  fiber.clock = __tsan_create_fiber(0);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter_thread, 0);
}

bool wake_block() {
  const Thread* first = nullptr;
  for (const Thread& thread : launch->block->threads) {
    if (thread.state == State::kDone) continue;
    if (thread.state != State::kAtBlock) return false;
    if (first == nullptr) first = &thread;
    if (thread.site.line != first->site.line || std::strcmp(thread.site.file, first->site.file)) {
      record("threads of a block wait at different barriers", thread.site);
      return false;
    }
  }
  for (Thread& thread : launch->block->threads) {
    if (thread.state == State::kAtBlock) thread.state = State::kReady;
  }
  return first != nullptr;
}

// Lanes of the warp that begins at `first`: those that one collective names, when all are there.
bool wake_warp(unsigned first) {
  std::vector<Thread>& threads = launch->block->threads;
  const unsigned size = std::min<size_t>(kWarp, threads.size() - first);
  bool woken = false;
  for (unsigned leader = 0; leader < size; ++leader) {
    const Thread& head = threads[first + leader];
    if (head.state != State::kAtWarp) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < size; ++lane) {
      const Thread& other = threads[first + lane];
      if (!(head.mask >> lane & 1) || other.state == State::kDone) continue;
      if (other.state != State::kAtWarp) {
        complete = false;
      } else if (other.mask != head.mask || other.site.line != head.site.line) {
        record("lanes of a warp are at different collectives", other.site);
        return false;
      }
    }
    if (!complete) continue;
    const uint32_t mask = head.mask;
    uint32_t present = 0;
    for (unsigned lane = 0; lane < size; ++lane) {
      const bool waits = threads[first + lane].state == State::kAtWarp;
      present |= uint32_t(waits) << lane & mask;
    }
    for (unsigned lane = 0; lane < size; ++lane) {
      Thread& to = threads[first + lane];
      if (!(present >> lane & 1)) continue;
      to.mask = present;
      for (unsigned from = 0; from < size; ++from) to.values[from] = threads[first + from].value;
    }
    for (unsigned lane = 0; lane < size; ++lane) {
      if (present >> lane & 1) threads[first + lane].state = State::kReady;
    }
    woken = true;
  }
  return woken;
}

// Runs what can run; in turns from the first thread and from the last, since no order is promised.
bool run_ready(bool backwards) {
  std::vector<Thread>& threads = launch->block->threads;
  bool any_left = false;
  for (size_t place = 0; place < threads.size() && !launch->failed; ++place) {
    Thread& thread = threads[backwards ? threads.size() - 1 - place : place];
    if (thread.state == State::kReady) {
      launch->thread = &thread;
      jump(launch->scheduler, thread.fiber, false);
      launch->thread = nullptr;
    }
    any_left |= thread.state != State::kDone;
  }
  return any_left;
}

void run_block(Index index, bool backwards) {
  launch->block = std::make_unique<Block>();
  Block& block = *launch->block;
  const Index size = launch->grid.threads;
  block.index = index;
  block.threads.resize(size_t(size.x) * size.y * size.z);
  block.warps.resize((block.threads.size() + kWarp - 1) / kWarp);
  for (unsigned number = 0; number < block.threads.size(); ++number) {
    Thread& thread = block.threads[number];
    thread.number = number;
    thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
    start(thread);
  }
  while (run_ready(backwards) && !launch->failed) {
    backwards = !backwards;
    bool woken = wake_block();
    for (size_t warp = 0; warp < block.warps.size(); ++warp) woken |= wake_warp(warp * kWarp);
    if (woken || launch->failed) continue;
    for (const Thread& thread : block.threads) {
      if (thread.state != State::kDone) {
        record("threads wait for others that never come", thread.site);
        break;
      }
    }
  }
}

// A new fiber may take the identity of one that is gone, and what either writes is then no race. So
// the threads of a block are kept until the next one has ended.
void forget_ended_clocks() {
#if defined(EMULATION_THREAD)
  for (size_t i = 0; i < launch->num_ended; ++i) __tsan_destroy_fiber(launch->ended_clocks[i]);
#endif
  launch->num_ended = 0;
}

void end_block() {
  forget_ended_clocks();
#if defined(EMULATION_THREAD)
  for (const Thread& thread : launch->block->threads) {
    launch->ended_clocks[launch->num_ended++] = thread.fiber.clock;
  }
#endif
  for (const auto& [key, memory] : launch->block->shared) std::free(memory);
  launch->block.reset();
}

}  // namespace

int run(Grid grid, void (*body)(void*), void* argument) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const size_t num_threads = size_t(grid.threads.x) * grid.threads.y * grid.threads.z;
  const size_t num_blocks = size_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  const Index& blocks = grid.blocks;
  const bool fits = blocks.x <= 0x7fffffff && blocks.y <= 0xffff && blocks.z <= 0xffff;
  if (!fits || num_blocks == 0 || num_threads == 0 || num_threads > kMaxThreads) {
    std::snprintf(error, sizeof error, "invalid configuration: %zu blocks of %zu threads",
                  num_blocks, num_threads);
    return kInvalidConfiguration;
  }
  auto current = std::make_unique<Launch>();
  launch = current.get();
  launch->grid = grid;
  launch->body = body;
  launch->argument = argument;
#if defined(EMULATION_THREAD)
  // Memory of ended blocks is given back by a fiber of its own: blocks are not to know each other,
  // and each inherits what the fiber knows that makes it.
  launch->scheduler.clock = __tsan_get_current_fiber();
  void* undertaker = __tsan_create_fiber(0);
#endif
  const Index count = grid.blocks;
  bool backwards = false;
  for (unsigned z = 0; z < count.z && !launch->failed; ++z) {
    for (unsigned y = 0; y < count.y && !launch->failed; ++y) {
      for (unsigned x = 0; x < count.x && !launch->failed; ++x) {
        run_block({x, y, z}, backwards);
        backwards = !backwards;
#if defined(EMULATION_THREAD)
        __tsan_switch_to_fiber(undertaker, __tsan_switch_to_fiber_no_sync);
        __tsan_acquire(launch);
        end_block();
        __tsan_switch_to_fiber(launch->scheduler.clock, __tsan_switch_to_fiber_no_sync);
#else
        end_block();
#endif
      }
    }
  }
  acquire(launch);
  forget_ended_clocks();
#if defined(EMULATION_THREAD)
  __tsan_destroy_fiber(undertaker);
#endif
  const bool failed = launch->failed;
  launch = nullptr;
  return failed ? kLaunchFailure : 0;
}

const char* error_text() { return error; }

const Index& thread_index() { return launch->thread->index; }
const Index& block_index() { return launch->block->index; }
const Index& block_size() { return launch->grid.threads; }
const Index& grid_size() { return launch->grid.blocks; }
unsigned lane() { return launch->thread->number % kWarp; }

void wait_for_block(Site site) {
  Block* block = launch->block.get();
  launch->thread->site = site;
  release(block);
  leave(State::kAtBlock);
  acquire(block);
}

void wait_for_warp(uint32_t mask, Site site) {
  char* warp = &launch->block->warps[launch->thread->number / kWarp];
  release(warp);
  exchange(mask, 0, site);
  acquire(warp);
}

Lanes exchange(uint32_t mask, uint64_t value, Site site) {
  Thread* thread = launch->thread;
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask of its own collective", site);
  thread->site = site;
  thread->mask = mask;
  thread->value = value;
  leave(State::kAtWarp);
  return {thread->mask, thread->values};
}

void* shared_memory(const void* key, size_t bytes) {
  char*& memory = launch->block->shared[key];
  if (memory == nullptr) memory = allocate(bytes);
  acquire(memory);
  return memory;
}

void fail(const char* what, Site site) {
  record(what, site);
  leave(State::kDone);
  std::abort();
}

}  // namespace emulation
