// CUDA's words for a host compiler: one block at a time, its threads as fibers that meet at barriers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "races.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  int x = 0;
};
static Index threadIdx, blockIdx;
alignas(16) static char shared_memory[1 << 18];

static inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(M_PI * x);
  *c = std::cos(M_PI * x);
}
// Compilers join products and sums, as CUDA's do; this one stays a product.
static inline double __dmul_rn(double x, double y) {
  volatile double product = x * y;
  return product;
}
static inline void sincospif(float x, float* s, float* c) {
  *s = (float)std::sin(M_PI * x);
  *c = (float)std::cos(M_PI * x);
}

// Saves what a call must preserve on one stack, and takes it from another.
extern "C" void fibers_switch(void** from, void* to) asm("fibers_switch");
#if defined(__x86_64__)
asm(R"(
.text
fibers_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
fibers_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "a switch of stacks is written for x86-64 and aarch64"
#endif

namespace fibers {
constexpr int64_t STACK = 1 << 16, SAVED = 20;  // bytes; words that a switch takes from a stack, at most

struct Fiber {
  void* stack = nullptr;
  int64_t barriers = 0;
};
static std::vector<Fiber> all;
static std::vector<char> memory;
static void* home;
static int current, direction, running;
static void (*body)(const void*);
static const void* argument;

static inline void go_to(int next) {
  void** const from = &all[current].stack;
  current = threadIdx.x = next;
  races::runs(next);
  fibers_switch(from, all[next].stack);
}

static inline int neighbour() {
  const int count = (int)all.size();
  return (current + direction + count) % count;
}

static void entry() {
  body(argument);
  for (const Fiber& fiber : all)
    if (fiber.barriers > all[current].barriers) {
      fprintf(stderr, "thread %d left where others wait at a barrier\n", current);
      abort();
    }
  if (--running) go_to(neighbour());
  void* nowhere;
  fibers_switch(&nowhere, home);
}

// Runs a block: threads upwards in even blocks and downwards in odd ones, so that a barrier that is missing
// shows. Shared memory begins as NaN, and nothing may lie behind `shared` bytes of it.
static inline void block(int threads, int64_t shared, void (*kernel)(const void*), const void* arguments) {
  if (shared > (int64_t)sizeof shared_memory) {
    fprintf(stderr, "a block has no %lld bytes of shared memory\n", (long long)shared);
    abort();
  }
  memset(shared_memory, 0xff, sizeof shared_memory);
  races::watch(shared_memory, shared, threads);
  all.assign(threads, Fiber());
  memory.resize(threads * STACK);
  body = kernel, argument = arguments, running = threads;
  direction = blockIdx.x % 2 ? -1 : 1;
  for (int i = 0; i < threads; ++i) {
    void** const top = (void**)(((uintptr_t)(memory.data() + (i + 1) * STACK) & ~(uintptr_t)15) - 16);
#if defined(__x86_64__)
    top[-2] = (void*)entry;  // where its first switch returns to, with a stack as after a call
    all[i].stack = top - 8;
#else
    all[i].stack = top - SAVED;
    ((void**)all[i].stack)[11] = (void*)entry;
#endif
  }
  current = threadIdx.x = direction > 0 ? 0 : threads - 1;
  races::runs(current);
  fibers_switch(&home, all[current].stack);
  races::runs(-1);
  for (int64_t i = shared; i < (int64_t)sizeof shared_memory; ++i)
    if (shared_memory[i] != (char)0xff) {
      fprintf(stderr, "byte %lld of shared memory was written, of %lld\n", (long long)i, (long long)shared);
      abort();
    }
}
}  // namespace fibers

static inline void __syncthreads() {
  static races::Order order[2];
  races::Order& own = order[fibers::all[fibers::current].barriers++ % 2];
  races::tell(own);
  fibers::go_to(fibers::neighbour());
  races::over(own), races::hear(own);  // all have been here
}
