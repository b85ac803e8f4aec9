// Races in the shared memory of one block: of two accesses, one of them a write, neither comes first by what threads
// have heard of each other at barriers. The compiler tells of every access (-fsanitize=thread, without its library).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define UNTOLD __attribute__((no_sanitize("thread")))

namespace races {
typedef std::vector<int> Clock;  // how far each thread has come
struct Order {                   // what a barrier has heard, and what it had when it was over
  Clock arrived, over;
};
struct Event {
  int thread = -1, clock = 0;
};
struct Byte {
  Event written;
  std::vector<Event> read;  // since then
};

static const char *first, *last;  // what is watched
static int thread = -1;           // that runs, if its block is watched
static std::vector<Clock> clocks;
static std::vector<Byte> bytes;

UNTOLD static void watch(const char* from, int64_t size, int threads) {
  first = from, last = from + size;
  bytes.assign(size, Byte());
  clocks.assign(threads, Clock(threads, 0));
  for (int i = 0; i < threads; ++i) clocks[i][i] = 1;
}
UNTOLD static void join(Clock& one, const Clock& other) {
  if (one.size() < other.size()) one.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i)
    if (other[i] > one[i]) one[i] = other[i];
}
UNTOLD static void tell(Order& order) {
  if (thread < 0) return;
  join(order.arrived, clocks[thread]);
  ++clocks[thread][thread];
}
UNTOLD static void over(Order& order) { order.over = order.arrived; }
UNTOLD static void hear(const Order& order) {
  if (thread >= 0) join(clocks[thread], order.over);
}
UNTOLD static void check(const Event& other, int64_t at, const char* what) {
  if (other.thread < 0 || clocks[thread][other.thread] >= other.clock) return;
  fprintf(stderr, "a race at byte %lld of shared memory: thread %d %s thread %d\n", (long long)at, thread, what,
          other.thread);
  abort();
}
UNTOLD static void access(const void* where, int64_t size, bool writes) {
  const char* const from = (const char*)where;
  if (thread < 0 || from < first || from >= last) return;
  const Event now = {thread, clocks[thread][thread]};
  for (int64_t at = from - first; at < from - first + size; ++at) {
    Byte& byte = bytes[at];
    check(byte.written, at, writes ? "writes after" : "reads what was written by");
    if (writes) {
      for (const Event& other : byte.read) check(other, at, "writes what was read by");
      byte.written = now, byte.read.clear();
      continue;
    }
    bool known = false;
    for (Event& other : byte.read)
      if (other.thread == thread) other = now, known = true;
    if (!known) byte.read.push_back(now);
  }
}
}  // namespace races

#define TOLD(SIZE)                                                                                     \
  extern "C" UNTOLD void __tsan_read##SIZE(void* at) { races::access(at, SIZE, false); }               \
  extern "C" UNTOLD void __tsan_write##SIZE(void* at) { races::access(at, SIZE, true); }
#define TOLD_UNALIGNED(SIZE)                                                                           \
  extern "C" UNTOLD void __tsan_unaligned_read##SIZE(void* at) { races::access(at, SIZE, false); }     \
  extern "C" UNTOLD void __tsan_unaligned_write##SIZE(void* at) { races::access(at, SIZE, true); }
TOLD(1) TOLD(2) TOLD(4) TOLD(8) TOLD(16)
TOLD_UNALIGNED(2) TOLD_UNALIGNED(4) TOLD_UNALIGNED(8) TOLD_UNALIGNED(16)
extern "C" UNTOLD void __tsan_read_range(void* at, unsigned long size) { races::access(at, size, false); }
extern "C" UNTOLD void __tsan_write_range(void* at, unsigned long size) { races::access(at, size, true); }
extern "C" UNTOLD void __tsan_vptr_update(void**, void*) {}
extern "C" UNTOLD void __tsan_func_entry(void*) {}
extern "C" UNTOLD void __tsan_func_exit() {}
extern "C" UNTOLD void __tsan_init() {}
