// A kernel whose blocks wait for each other, for a host compiler: all threads of all blocks as fibers. What copies
// bring and what threads tell other blocks comes late, and a place that waits for a copy holds NaN.
#pragma once

#define shared_memory of_one_block
#include "numbers.hpp"
#undef shared_memory
static char* shared_memory;  // of the block that runs

#include <sys/mman.h>

#include <functional>
#include <map>

#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
static inline uint32_t __float_as_uint(float x) { return to_bits(x); }
static inline float __uint_as_float(uint32_t x) { return from_bits(x); }
static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = (uint64_t)high << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= (uint32_t)(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return found;
}
static inline float quick_exponential(float x) { return std::exp(x); }
static inline float quick_quotient(float x, float y) { return x / y; }
static inline uint32_t rounded_bf16(float low, float high) { return (uint32_t)bf16_of(high) << 16 | bf16_of(low); }
template <int REGISTERS> static inline void take_registers() {}
template <int REGISTERS> static inline void give_registers() {}

namespace grid {
constexpr int64_t STACK = 1 << 15, SHARED = 1 << 18, PATIENCE = 1 << 26;
constexpr int LANES = 32, LATE = 20000, SAID = 24;  // switches that a copy takes; bytes

struct Warp {
  void* stack[LANES];
  bool done[LANES] = {};
  int alive = LANES, lane = 0, idle = 0;
  int count[2] = {}, synced[LANES] = {}, complete = 0;
  char said[2][LANES][SAID];
  races::Order order[2];
};
struct Meeting {
  int count = 0, turn = 0;
  races::Order order;
};
struct Barrier {
  int count, pending, bytes, phase;
  races::Order order;
};
struct Copy {
  int64_t due;
  char* to;
  const void* from;
  int bytes, barrier;
};
static std::vector<Warp> warps;
static std::vector<std::map<int, Meeting>> meetings;  // of blocks, by number
static std::vector<Barrier> barriers;
static std::vector<std::vector<Copy>> late;  // of threads
static std::multimap<int64_t, Copy> copies;
static std::multimap<int64_t, std::pair<float*, uint32_t>> words;
static std::vector<char> shared;
static int here, running, threads;  // a warp, warps, threads of a block
static int64_t now, stuck;
static uint32_t chance;
static void* home;
static std::vector<int64_t> asleep;  // until when, of warps
static int tired = -1;               // a warp of each block that sleeps most, while others nap; -1: nobody does
static char *slow_from, *slow_to;  // words of a place, if there is one, come later than all others
static std::function<void()> body;
static int watched = 0;  // the block whose races are looked for

[[noreturn]] static inline void fail(const char* why) {
  fprintf(stderr, "block %d, thread %d: %s\n", blockIdx.x, threadIdx.x, why);
  abort();
}
static inline uint32_t drawn(uint32_t below) {
  chance = chance * 1664525u + 1013904223u;
  return (chance >> 8) % below;
}
static inline void goes_on() { warps[here].idle = 0, stuck = 0; }
static inline void complete(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase, b.pending = b.count;
  races::over(b.order);
  goes_on();
}

// What is due arrives.
static inline void deliver(int64_t until) {
  while (!copies.empty() && copies.begin()->first <= until) {
    const Copy copy = copies.begin()->second;
    memcpy(copy.to, copy.from, copy.bytes);
    barriers[copy.barrier].bytes -= copy.bytes;
    complete(barriers[copy.barrier]);
    copies.erase(copies.begin());
  }
  while (!words.empty() && words.begin()->first <= until) {
    memcpy(words.begin()->second.first, &words.begin()->second.second, 4);
    words.erase(words.begin());
  }
}

static inline void run(void** from, int warp, int lane) {
  here = warp, warps[warp].lane = lane;
  const int of_block = threads / LANES;
  blockIdx.x = warp / of_block, threadIdx.x = warp % of_block * LANES + lane;
  shared_memory = shared.data() + blockIdx.x * SHARED;
  races::runs(blockIdx.x == watched ? threadIdx.x : -1);
  fibers_switch(from, warps[warp].stack[lane]);
}
static inline int next_warp() {
  int next = here;
  do {
    next = (next + 1) % (int)warps.size();
    if (next == here) now += 64;
  } while (!warps[next].alive || asleep[next] > now);
  return next;
}
static inline int next_lane(const Warp& w) {
  int next = w.lane;
  do next = (next + 1) % LANES;
  while (w.done[next]);
  return next;
}
// Others have their turn: this warp's lanes, and once none of them goes on, the next warp.
static inline void yield() {
  if (++now % 64 == 0) deliver(now);
  if (++stuck > PATIENCE) fail("waits for ever");
  Warp& w = warps[here];
  const int lane = w.lane;
  if (++w.idle <= w.alive) {
    const int next = next_lane(w);
    if (next != lane) run(&w.stack[lane], here, next);
    return;
  }
  w.idle = 0;
  w.lane = next_lane(w);
  if (tired >= 0 && !drawn(here % (threads / LANES) == tired ? 6 : 400)) asleep[here] = now + drawn(1 << 20);
  const int next = next_warp();
  if (next != here || warps[next].lane != lane) run(&w.stack[lane], next, warps[next].lane);
}
static void entry() {
  body();
  Warp& w = warps[here];
  void* nowhere;
  w.done[w.lane] = true;
  goes_on();
  if (--w.alive) run(&nowhere, here, next_lane(w));
  if (--running) {
    const int next = next_warp();
    run(&nowhere, next, warps[next].lane);
  }
  fibers_switch(&nowhere, home);
}

// All blocks at once, with shared memory that begins as NaN.
static inline void launch(int blocks, int of_block, uint32_t seed, std::function<void()> kernel) {
  threads = of_block, body = kernel, chance = seed, now = stuck = 0;
  running = blocks * threads / LANES;
  warps.assign(running, Warp());
  asleep.assign(running, 0);
  meetings.assign(blocks, {});
  late.assign(blocks * threads, {});
  barriers.clear();
  shared.assign(blocks * SHARED, (char)0xff);
  races::watch(shared.data() + watched * SHARED, SHARED, threads);
  const int64_t size = blocks * threads * STACK;
  const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* const stacks = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, how, -1, 0);
  if (stacks == MAP_FAILED) fail("there is no memory for stacks");
  for (int i = 0; i < blocks * threads; ++i) {
    void** const top = (void**)(((uintptr_t)(stacks + (i + 1) * STACK) & ~(uintptr_t)15) - 16);
    void*& stack = warps[i / LANES].stack[i % LANES];
#if defined(__x86_64__)
    top[-2] = (void*)entry;
    stack = top - 8;
#else
    stack = top - fibers::SAVED;
    ((void**)stack)[11] = (void*)entry;
#endif
  }
  run(&home, 0, 0);
  deliver(INT64_MAX);
  munmap(stacks, size);
}

// All lanes of a warp say something, and hear what the others have said; orders: what they did before, too, which a
// vote or a shuffle does not do.
template <class X> static inline const char (*all(const X& x, bool news = true, bool orders = false))[SAID] {
  static_assert(sizeof(X) <= SAID, "");
  Warp& w = warps[here];
  const int lane = w.lane, turn = w.synced[lane]++, side = turn % 2;
  memcpy(w.said[side][lane], &x, sizeof(X));
  if (orders) races::tell(w.order[side]);
  if (++w.count[side] == LANES) {
    w.count[side] = 0, w.complete = turn + 1;
    races::over(w.order[side]);
    if (news) goes_on();
  }
  while (w.complete <= turn) yield();
  if (orders) races::hear(w.order[side]);
  return w.said[side];
}
template <class X> static inline X heard(const char (*from)[SAID], int lane) {
  X x;
  memcpy(&x, from[lane], sizeof(X));
  return x;
}
static inline int lane() { return warps[here].lane; }
static inline char* checked(uint32_t at, int bytes) {
  if (at % bytes || at + bytes > SHARED) fail("an address in shared memory");
  return shared_memory + at;
}
}  // namespace grid

static inline void __syncwarp() { grid::all(0, true, true); }
static inline float __shfl_sync(unsigned, float x, int from) { return grid::heard<float>(grid::all(x), from); }
static inline float __shfl_xor_sync(unsigned, float x, int by) {
  const auto said = grid::all(x);
  return grid::heard<float>(said, grid::lane() ^ by);
}
static inline float __shfl_down_sync(unsigned, float x, int by) {
  const auto said = grid::all(x);
  const int lane = grid::lane();
  return grid::heard<float>(said, lane + by < 32 ? lane + by : lane);
}
// Where it is asked again and again, nothing goes on.
static inline bool __all_sync(unsigned, bool mine) {
  const auto said = grid::all(mine, false);
  bool all = true;
  for (int lane = 0; lane < grid::LANES; ++lane) all = all && grid::heard<bool>(said, lane);
  if (all) grid::goes_on();
  return all;
}

static inline void let_in(int number, int threads) {
  grid::Meeting& m = grid::meetings[blockIdx.x][number];
  races::tell(m.order);
  if (++m.count == threads) m.count = 0, ++m.turn, races::over(m.order), grid::goes_on();
}
static inline void meet(int number, int threads) {
  const int turn = grid::meetings[blockIdx.x][number].turn;
  let_in(number, threads);
  while (grid::meetings[blockIdx.x][number].turn == turn) grid::yield();
  races::hear(grid::meetings[blockIdx.x][number].order);
}
#define __syncthreads() meet(0, grid::threads)

static inline uint32_t place(const void* x) { return (uint32_t)((const char*)x - shared_memory); }
static inline void barrier_begin(uint64_t* barrier, int count) {
  *barrier = grid::barriers.size();
  grid::barriers.push_back({count, count, 0, 0, {}});
}
static inline void barriers_are_seen() {}
static inline void arrive(uint64_t* barrier) {
  grid::Barrier& b = grid::barriers[*barrier];
  races::tell(b.order);
  if (--b.pending < 0) grid::fail("more arrive than were expected");
  grid::complete(b);
}
static inline void arrive_expecting(uint64_t* barrier, int bytes) {
  grid::barriers[*barrier].bytes += bytes;
  arrive(barrier);
}
static inline bool is_over(uint64_t* barrier, int phase) {
  const bool over = (grid::barriers[*barrier].phase & 1) != phase;
  if (over) grid::goes_on(), races::hear(grid::barriers[*barrier].order);
  else grid::yield();
  return over;
}
static inline void wait(uint64_t* barrier, int phase) {
  while (!is_over(barrier, phase)) {}
}
static inline void __trap() { grid::fail("there is no more room"); }

static inline uint64_t read_once() { return 0; }
static inline void copy_bytes(uint32_t to, const void* from, int bytes, uint64_t* barrier, uint64_t) {
  if (bytes % 16 || (uintptr_t)from % 16) grid::fail("a copy that is none of 16 bytes");
  char* const place = grid::checked(to, 16);
  grid::checked(to + bytes - 16, 16);
  memset(place, 0xff, bytes);
  races::access(place, bytes, true), races::tell(grid::barriers[*barrier].order);
  const int64_t due = grid::now + grid::drawn(grid::LATE);
  grid::copies.emplace(due, grid::Copy{due, place, from, bytes, (int)*barrier});
}
static inline std::vector<grid::Copy>& own_copies() { return grid::late[blockIdx.x * grid::threads + threadIdx.x]; }
static inline void copy_late(uint32_t to, const void* from) {
  char* const place = grid::checked(to, 16);
  memset(place, 0xff, 16);
  races::access(place, 16, true);
  own_copies().push_back({0, place, from, 16, 0});
}
static inline void late_copies_are_there() {
  for (const grid::Copy& copy : own_copies()) {
    memcpy(copy.to, copy.from, copy.bytes);
    races::access(copy.to, copy.bytes, true);
  }
  own_copies().clear();
}
static inline uint4 read_16(uint32_t at) {
  uint4 x;
  memcpy(&x, grid::checked(at, 16), 16);
  return x;
}
static inline void write_4(uint32_t at, uint32_t x) { memcpy(grid::checked(at, 4), &x, 4); }

static inline void tell(float* to, uint32_t word) {
  const bool slow = (char*)to >= grid::slow_from && (char*)to < grid::slow_to;
  const bool soon = grid::slow_from || grid::drawn(32);
  const uint32_t late = slow ? (1 << 18) + grid::drawn(1 << 18) : grid::drawn(soon ? 4096 : 1 << 18);
  grid::words.emplace(grid::now + late, std::make_pair(to, word));
}
static inline void pause(unsigned) { grid::yield(); }
static inline uint32_t look(const float* at) {
  grid::yield();
  return to_bits(*at);
}
static inline uint4 look_4(const float* at) {
  grid::yield();
  uint4 x;
  memcpy(&x, at, 16);
  return x;
}

static inline void add_weights(float (&s)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a.x, a.y, a.z, a.w, b0, b1};
  typedef uint32_t Six[6];
  const auto said = grid::all(own);
  const auto number = [&](int lane, int which, int odd) {
    const uint32_t both = (*(const Six*)said[lane])[which];
    return from_bits(odd ? both & 0xffff0000u : both << 16);
  };
  const int row = grid::lane() / 4, column = grid::lane() % 4 * 2;
  for (int v = 0; v < 4; ++v)
    for (int k = 0; k < 16; ++k) {
      const float weight = number(row * 4 + k % 8 / 2, k / 8 * 2 + v / 2, k % 2);
      const float other = number((column + v % 2) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      if (weight != 0 && other != 0) s[v] += weight * other;
    }
}
