// What tensor cores have from sm_80 on, a function each, and the two formats of their operands.
//
// A warp multiplies [16 k] by [k 8]. Of the sums lane l has columns 2 (l % 4) and the next, of row l / 4 and of
// row l / 4 + 8. Operands lie in shared memory in rows that are 16 bytes longer than a multiple of 64, so that 8
// of them fill different banks. A step takes 32 bytes of rows that lie along the contracted dimension, or K rows
// that lie across it.
#pragma once

#include "warp.cuh"

#ifdef __CUDACC__
#define ONE_BY_ONE _Pragma("unroll 1")

__device__ __forceinline__ void load_2_turned(uint32_t (&x)[2], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ uint32_t load_1(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}

// 16 bytes to shared memory, while this thread goes on; it may read them when it has waited.
__device__ __forceinline__ void copy_ahead(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void add_product_bf16(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void add_product_tf32(
    float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same number, of which the compiler knows nothing: what follows from it is computed anew, not kept in registers.
__device__ __forceinline__ int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
#endif

// bfloat16: two numbers a register. Places of a lane: `upright` of the left operand along the contracted dimension
// and of the right one across it; `beside` of the right one along it and of the left one across it.
template <class T> struct Operand;
template <> struct Operand<__nv_bfloat16> {
  static constexpr int SIZE = 2, K = 16;
  static constexpr bool AS_THEY_ARE = true;  // in memory

  static __device__ __forceinline__ int upright(int lane, int pitch) { return lane % 16 * pitch + lane / 16 * 16; }
  static __device__ __forceinline__ int beside(int lane, int pitch) {
    return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
  }
  static __device__ __forceinline__ int left_across(int lane, int pitch) { return beside(lane, pitch); }
  static __device__ __forceinline__ int right_across(int lane, int pitch) { return upright(lane, pitch); }

  // 16 columns of a left operand, 16 or 8 of a right one, across K rows.
  static __device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t at, int) { load_4_turned(a, at); }
  static __device__ __forceinline__ void load_right(uint32_t (&b)[4], uint32_t at, int) { load_4_turned(b, at); }
  static __device__ __forceinline__ void load_few(uint32_t (&b)[2], uint32_t at, int) { load_2_turned(b, at); }

  static __device__ __forceinline__ void add(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    add_product_bf16(s, a, b0, b1);
  }
  // Sums [16 K], as a left operand.
  static __device__ __forceinline__ void from_sums(uint32_t (&a)[4], const float (*s)[4]) {
    UNROLL for (int v = 0; v < 4; ++v) a[v] = rounded_bf16(s[v / 2][v % 2 * 2], s[v / 2][v % 2 * 2 + 1]);
  }
  // A left operand across rows, times a factor for each row.
  static __device__ __forceinline__ void weigh(uint32_t (&a)[4], const float* factors, int lane) {
    UNROLL for (int v = 0; v < 4; ++v) {
      const float* const own = factors + lane % 4 * 2 + v / 2 * 8;
      a[v] = rounded_bf16(kept(low_of(a[v]), own[0]), kept(high_of(a[v]), own[1]));
    }
  }
  // Two neighbours of a row, or four groups of them.
  static __device__ __forceinline__ void lay(char* at, float x, float y) { *(uint32_t*)at = rounded_bf16(x, y); }
  static __device__ __forceinline__ void lay_all(char* at, const float (&x)[8], bool there) {
    Piece<uint32_t> bits;
    UNROLL for (int v = 0; v < 4; ++v) bits.v[v] = there ? rounded_bf16(x[2 * v], x[2 * v + 1]) : 0;
    *(Piece<uint32_t>*)at = bits;
  }
  template <class Line> static __device__ __forceinline__ void lay_raw(char* at, const Line& line, bool there) {
    Piece<uint32_t> bits = *(const Piece<uint32_t>*)&line;
    UNROLL for (int v = 0; v < 4; ++v) bits.v[v] = there ? bits.v[v] : 0;
    *(Piece<uint32_t>*)at = bits;
  }
  // Feature maps of numbers as they lie in memory.
  static __device__ __forceinline__ bool maps(int feature) { return feature == RELU; }
  template <class Line> static __device__ __forceinline__ void map(Line& line, int) {
    Piece<uint32_t>& bits = *(Piece<uint32_t>*)&line;
    UNROLL for (int v = 0; v < 4; ++v) bits.v[v] = relu_of_both(bits.v[v]);
  }
  static __device__ __forceinline__ float what_stays(float x) { return high_of(rounded_bf16(0, x)); }
  // Where a row of 8 lies in an operand that is read across rows, with one that is read along them.
  static __device__ __forceinline__ int row_of(int r) { return r; }
};

// tf32: one number a register. Rows that are read across are 2 (l % 4) and the next for lane l, in the places of
// l % 4 and l % 4 + 4, as sums have them.
template <class T> struct Operand {
  static constexpr int SIZE = 4, K = 8;
  static constexpr bool AS_THEY_ARE = false;

  static __device__ __forceinline__ int upright(int lane, int pitch) { return lane % 16 * pitch + lane / 16 * 16; }
  static __device__ __forceinline__ int beside(int lane, int pitch) {
    return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
  }
  static __device__ __forceinline__ int left_across(int lane, int pitch) {
    return lane % 4 * 2 * pitch + lane / 4 * 4;
  }
  static __device__ __forceinline__ int right_across(int lane, int pitch) { return left_across(lane, pitch); }

  static __device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t at, int pitch) {
    UNROLL for (int v = 0; v < 4; ++v) a[v] = load_1(at + v / 2 * pitch + v % 2 * 32);
  }
  static __device__ __forceinline__ void load_right(uint32_t (&b)[4], uint32_t at, int pitch) {
    UNROLL for (int v = 0; v < 4; ++v) b[v] = load_1(at + v % 2 * pitch + v / 2 * 32);
  }
  static __device__ __forceinline__ void load_few(uint32_t (&b)[2], uint32_t at, int pitch) {
    b[0] = load_1(at), b[1] = load_1(at + pitch);
  }

  static __device__ __forceinline__ void add(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    add_product_tf32(s, a, b0, b1);
  }
  static __device__ __forceinline__ void from_sums(uint32_t (&a)[4], const float (*s)[4]) {
    UNROLL for (int v = 0; v < 4; ++v) a[v] = rounded_tf32(s[0][v % 2 * 2 + v / 2]);
  }
  static __device__ __forceinline__ void weigh(uint32_t (&a)[4], const float* factors, int lane) {
    UNROLL for (int v = 0; v < 4; ++v)
      a[v] = rounded_tf32(kept(from_bits(a[v]), factors[lane % 4 * 2 + v / 2]));
  }
  static __device__ __forceinline__ void lay(char* at, float x, float y) {
    *(Piece<uint32_t, 2>*)at = {rounded_tf32(x), rounded_tf32(y)};
  }
  template <int N> static __device__ __forceinline__ void lay_all(char* at, const float (&x)[N], bool there) {
    UNROLL for (int i = 0; i < N; i += 4) {
      Piece<uint32_t> bits;
      UNROLL for (int v = 0; v < 4; ++v) bits.v[v] = there ? rounded_tf32(x[i + v]) : 0;
      *(Piece<uint32_t>*)(at + 4 * i) = bits;
    }
  }
  template <class Line> static __device__ __forceinline__ void lay_raw(char*, const Line&, bool) {}
  static __device__ __forceinline__ bool maps(int) { return false; }
  template <class Line> static __device__ __forceinline__ void map(Line&, int) {}
  static __device__ __forceinline__ float what_stays(float x) { return from_bits(rounded_tf32(x)); }
  static __device__ __forceinline__ int row_of(int r) { return r % 4 * 2 + r / 4; }
};
