// Races in a block's shared memory: two accesses, one of them a write, of which neither comes first by what threads
// have heard of each other at barriers. Compiled with -DRACES -fsanitize=thread, and linked without that: the compiler
// tells of each access, and these functions are in the place of its library's.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace races {
#ifndef RACES
struct Order {};
static inline void watch(const char*, int64_t, int) {}
static inline void runs(int) {}
static inline void tell(Order&) {}
static inline void over(Order&) {}
static inline void hear(const Order&) {}
static inline void access(const void*, int64_t, bool) {}
#else
#define UNTOLD __attribute__((no_sanitize("thread")))

typedef std::vector<int> Clock;  // how far each thread has come
struct Order {
  Clock arrived, over;  // what a barrier hears, and what it had heard when it was over
  int block = 0;
};
struct Event {
  int thread = -1, clock = 0;
};
struct Place {  // GRAIN bytes
  Event written;
  std::vector<Event> read;  // since then
};
static const char *first, *last;  // what is watched
static int thread = -1;           // that runs; of a block that is not watched, -1
static int block = 0;             // how many have been watched
static std::vector<Clock> known;  // by each thread
static std::vector<Place> places;
constexpr int64_t GRAIN = 2;

UNTOLD static void watch(const char* from, int64_t size, int threads) {
  first = from, last = from + size, ++block;
  places.assign((size + GRAIN - 1) / GRAIN, Place());
  known.assign(threads, Clock(threads, 0));
  for (int i = 0; i < threads; ++i) known[i][i] = 1;
}
UNTOLD static void runs(int which) { thread = which; }

UNTOLD static void join(Clock& one, const Clock& other) {
  if (one.size() < other.size()) one.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i)
    if (other[i] > one[i]) one[i] = other[i];
}
UNTOLD static void tell(Order& order) {
  if (thread < 0) return;
  if (order.block != block) order = Order(), order.block = block;
  join(order.arrived, known[thread]);
  ++known[thread][thread];
}
UNTOLD static void over(Order& order) { order.over = order.arrived; }
UNTOLD static void hear(const Order& order) {
  if (thread >= 0) join(known[thread], order.over);
}

UNTOLD static void check(const Event& other, int64_t at, const char* what) {
  if (other.thread < 0 || known[thread][other.thread] >= other.clock) return;
  const long long byte = at * GRAIN;
  fprintf(stderr, "a race at byte %lld of shared memory: thread %d %s thread %d\n", byte, thread, what, other.thread);
  abort();
}
UNTOLD static void access(const void* where, int64_t size, bool writes) {
  const char* const from = (const char*)where;
  if (thread < 0 || from < first || from >= last) return;
  const Event now = {thread, known[thread][thread]};
  const int64_t end = (from - first + size + GRAIN - 1) / GRAIN;
  for (int64_t at = (from - first) / GRAIN; at < end; ++at) {
    Place& place = places[at];
    check(place.written, at, writes ? "writes over" : "reads what was written by");
    if (writes) {
      for (const Event& other : place.read) check(other, at, "writes what was read by");
      place.written = now, place.read.clear();
      continue;
    }
    bool again = false;
    for (Event& other : place.read)
      if (other.thread == thread) other = now, again = true;
    if (!again) place.read.push_back(now);
  }
}
#endif
}  // namespace races

#ifdef RACES
#define TOLD(NAME, SIZE)                                                                                \
  extern "C" UNTOLD void __tsan_##NAME##read##SIZE(void* at) { races::access(at, SIZE, false); }        \
  extern "C" UNTOLD void __tsan_##NAME##write##SIZE(void* at) { races::access(at, SIZE, true); }
TOLD(, 1) TOLD(, 2) TOLD(, 4) TOLD(, 8) TOLD(, 16)
TOLD(unaligned_, 2) TOLD(unaligned_, 4) TOLD(unaligned_, 8) TOLD(unaligned_, 16)
extern "C" UNTOLD void __tsan_read_range(void* at, unsigned long size) { races::access(at, size, false); }
extern "C" UNTOLD void __tsan_write_range(void* at, unsigned long size) { races::access(at, size, true); }
extern "C" UNTOLD char __tsan_atomic8_load(const volatile void* at, int) { return *(const volatile char*)at; }
extern "C" UNTOLD void __tsan_vptr_update(void**, void*) {}
extern "C" UNTOLD void __tsan_func_entry(void*) {}
extern "C" UNTOLD void __tsan_func_exit() {}
extern "C" UNTOLD void __tsan_init() {}
#endif
