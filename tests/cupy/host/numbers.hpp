// The 16-bit numbers that CUDA has and a host compiler has not, and flags of kernels.
#pragma once

#include "host.hpp"
#include "common.cuh"

// Rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

static inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint16_t bf16_of(float x) {
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint16_t half_of(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size >= 65520) return (uint16_t)(sign | 0x7c00);
  if (size < 6.103515625e-05f) return (uint16_t)(sign | (uint32_t)std::nearbyint(size * 16777216.0f));
  const uint32_t bits = to_bits(size) - (112u << 23);
  return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
static inline float float_of(uint16_t half) {
  const int power = half >> 10 & 31, rest = half & 1023;
  const float size = power == 31 ? (rest ? NAN : INFINITY)
                                 : std::ldexp((float)(power ? rest + 1024 : rest), (power ? power : 1) - 25);
  return half & 0x8000 ? -size : size;
}

template <class A> static inline A widened(__nv_bfloat16 x) { return from_bits((uint32_t)x.bits << 16); }
template <class A> static inline A widened(__half x) { return float_of(x.bits); }
template <> inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) { return {bf16_of(x)}; }
template <> inline __half narrowed<__half>(float x) { return {half_of(x)}; }
template <> inline __nv_bfloat16 narrowed<__nv_bfloat16>(double x) { return {bf16_of((float)x)}; }
template <> inline __half narrowed<__half>(double x) { return {half_of((float)x)}; }

// A kernel's flags, set when it is called. Self: whose they are.
template <class Self> struct HostFlags {
  static inline int FEATURE, ANGLES, DECAY, REVERSE, STRICT, GRADIENT, NORMALIZE, EXTRA;
  static inline int MASK, BORDERS, TOTAL, OUTPUT, SUMS, ROWS, TURN, DO;

  static void set(const int64_t* flags) {
    int* const all[] = {&FEATURE, &ANGLES,  &DECAY, &REVERSE, &STRICT, &GRADIENT, &NORMALIZE, &EXTRA,
                        &MASK,    &BORDERS, &TOTAL, &OUTPUT,  &SUMS,   &ROWS,     &TURN,      &DO};
    for (int* flag : all) *flag = (int)*flags++;
  }
};
