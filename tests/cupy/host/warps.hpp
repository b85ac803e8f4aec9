// What warps have on a GPU, for fibers: exchanges between lanes, products of matrices, copies that come late.
#pragma once

#define ONE_BY_ONE

#include "numbers.hpp"

namespace warps {
constexpr int WARPS = 4, ROOM = 24;
struct Copy {
  uint32_t to;
  const void* from;
};
static char said[WARPS][2][32][ROOM];  // by the lanes of a warp, now and the time before
static int turn[WARPS * 32];
static std::vector<Copy> copies[WARPS * 32];

// All lanes of a warp say something, and hear what the others have said.
template <class X> static inline const char (*all(const X& x))[ROOM] {
  static_assert(sizeof(X) <= ROOM, "");
  const int own = fibers::current, warp = own / 32;
  const int now = turn[own] ^= 1;
  memcpy(said[warp][now][own % 32], &x, sizeof(X));
  fibers::go_to(warp * 32 + (own % 32 + fibers::direction + 32) % 32);
  return said[warp][now];
}
template <class X> static inline X heard(const char (*from)[ROOM], int lane) {
  X x;
  memcpy(&x, from[lane], sizeof(X));
  return x;
}
static inline int lane() { return fibers::current % 32; }

struct Operands {
  uint32_t a[4], b[2];
};

// sums += a b: the lane that goes on first multiplies for all; `left` and `right` find numbers in what lanes have.
template <int K, class Left, class Right>
static inline void add_product(float (&s)[4], const Operands& own, Left left, Right right) {
  static float products[WARPS][16][8];
  const auto from = all(own);
  auto& product = products[fibers::current / 32];
  if (lane() == (fibers::direction > 0 ? 0 : 31)) {
    float b[K][8];
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) b[k][column] = right(from, k, column);
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for (int k = 0; k < K; ++k) {
        const float a = left(from, row, k);
        for (int column = 0; column < 8; ++column) sums[column] += a * b[k][column];
      }
      memcpy(product[row], sums, sizeof sums);
    }
  }
  for (int v = 0; v < 4; ++v) s[v] += product[lane() / 4 + v / 2 * 8][lane() % 4 * 2 + v % 2];
}
static inline float number(uint32_t both, int odd) { return from_bits(odd ? both & 0xffff0000u : both << 16); }
static inline float number(uint32_t bits) { return from_bits(bits & 0xffffe000u); }

static int64_t reachable = 0;  // bytes of shared memory
static inline const char* checked(uint32_t at) {
  if (at % 16 || at + 16 > reachable) {
    fprintf(stderr, "a row of a piece begins at %u, of %lld bytes\n", at, (long long)reachable);
    abort();
  }
  return shared_memory + at;
}
template <int N> static inline void load(uint32_t (&x)[N], uint32_t at, bool turned) {
  const auto from = all(at);
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < 2; ++v) {
      const int of = turned ? column + v : row, in = turned ? row : column + v;
      memcpy((uint16_t*)&x[i] + v, checked(heard<uint32_t>(from, 8 * i + of)) + 2 * in, 2);
    }
}
}  // namespace warps

static inline void __syncwarp() {
  static races::Order order[warps::WARPS][2];
  races::Order& own = order[fibers::current / 32][warps::turn[fibers::current]];
  races::tell(own);
  warps::all(0);
  races::over(own), races::hear(own);
}
template <class X> static inline X __shfl_sync(unsigned, X x, int lane) {
  return warps::heard<X>(warps::all(x), lane % 32);
}
template <class X> static inline X __shfl_xor_sync(unsigned, X x, int mask) {
  return warps::heard<X>(warps::all(x), warps::lane() ^ mask);
}
template <class X> static inline X __shfl_up_sync(unsigned, X x, int by) {
  const auto from = warps::all(x);
  return warps::lane() < by ? x : warps::heard<X>(from, warps::lane() - by);
}

static inline uint32_t place(const void* p) { return (uint32_t)((const char*)p - shared_memory); }
static inline void load_4(uint32_t (&x)[4], uint32_t at) { warps::load(x, at, false); }
static inline void load_4_turned(uint32_t (&x)[4], uint32_t at) { warps::load(x, at, true); }
static inline void load_2_turned(uint32_t (&x)[2], uint32_t at) { warps::load(x, at, true); }
static inline uint32_t load_1(uint32_t at) {
  if (at + 4 > warps::reachable) {
    fprintf(stderr, "%u is read, of %lld bytes of shared memory\n", at, (long long)warps::reachable);
    abort();
  }
  return *(const uint32_t*)(shared_memory + at);
}
static inline void copy_ahead(uint32_t to, const void* from) {
  if (to % 16 || (uintptr_t)from % 16) {
    fprintf(stderr, "a copy of 16 bytes from %p to %u\n", from, to);
    abort();
  }
  warps::copies[fibers::current].push_back({to, from});
  races::access(shared_memory + to, 16, true);
}
static inline void wait_for_copies() {  // as late as they may come
  for (const auto& copy : warps::copies[fibers::current]) {
    memcpy(shared_memory + copy.to, copy.from, 16);
    races::access(shared_memory + copy.to, 16, true);
  }
  warps::copies[fibers::current].clear();
}
static inline void add_product_bf16(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  warps::add_product<16>(
      s, {{a[0], a[1], a[2], a[3]}, {b0, b1}},
      [](auto from, int row, int k) {
        const auto own = (const warps::Operands*)from[row % 8 * 4 + k % 8 / 2];
        return warps::number(own->a[row / 8 + k / 8 * 2], k % 2);
      },
      [](auto from, int k, int column) {
        return warps::number(((const warps::Operands*)from[column * 4 + k % 8 / 2])->b[k / 8], k % 2);
      });
}
static inline void add_product_tf32(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  warps::add_product<8>(
      s, {{a[0], a[1], a[2], a[3]}, {b0, b1}},
      [](auto from, int row, int k) {
        return warps::number(((const warps::Operands*)from[row % 8 * 4 + k % 4])->a[row / 8 + k / 4 * 2]);
      },
      [](auto from, int k, int column) {
        return warps::number(((const warps::Operands*)from[column * 4 + k % 4])->b[k / 4]);
      });
}
static inline uint32_t rounded_bf16(float low, float high) { return (uint32_t)bf16_of(high) << 16 | bf16_of(low); }
static inline uint32_t rounded_tf32(float x) {
  const uint32_t bits = to_bits(x);
  return x != x ? bits : (bits + 0x1000) & 0xffffe000u;
}
static inline void quick_cos_sin(uint64_t phase, float* c, float* s) { cos_sin(phase, c, s); }
static inline uint32_t relu_of_both(uint32_t both) {
  uint32_t found = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t x = both >> shift & 0xffff;
    if (!(x & 0x8000) || (x & 0x7fff) > 0x7f80) found |= x << shift;
  }
  return found;
}
static inline float quick_exponential(float x) { return std::exp(x); }
static inline float quick_quotient(float x, float y) { return x / y; }
static inline int forgotten(int x) { return x; }
