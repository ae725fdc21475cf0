// Runs a grid's threads as fibers of one host thread, block by block.
//
// A thread runs until it waits at a barrier or a warp collective; others run meanwhile. What a
// grid promises too much is told as an error of the launch: threads that wait for each other for
// ever, threads of a block at different barriers, lanes of a warp at different collectives.

#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Grid {
  Index blocks;
  Index threads;
};

struct Site {
  const char* file;
  int line;
};

// Values of a warp's lanes that took part in a collective: those in the mask that have not ended.
struct Lanes {
  uint32_t mask;
  const uint64_t* values;
};

// Calls body(argument) once for each thread of the grid; 0, or an error of `error_text`.
int run(Grid grid, void (*body)(void*), void* argument);

// What the last failed launch did wrong.
const char* error_text();

// The calling thread's.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
unsigned lane();

void wait_for_block(Site site);
void wait_for_warp(uint32_t mask, Site site);
Lanes exchange(uint32_t mask, uint64_t value, Site site);

// Memory of the calling thread's block, the same for all its threads that name `key`; not
// initialised: filled with a pattern that is a NaN.
void* shared_memory(const void* key, size_t bytes);

// Ends the launch with an error that names the calling thread.
[[noreturn]] void fail(const char* what, Site site);

}  // namespace emulation
