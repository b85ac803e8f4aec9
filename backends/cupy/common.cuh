// Pieces that every kernel shares: dtypes, feature maps, angles at any position, decays.
#pragma once

#ifdef __CUDACC_RTC__
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif
#ifdef __CUDACC__
#ifndef WITHOUT_NARROW_TYPES
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#define UNROLL _Pragma("unroll")
#define BATCH _Pragma("unroll 8")
#define ONCE _Pragma("unroll 1")
#else  // a host compiler, with words for CUDA's from elsewhere
#define UNROLL
#define BATCH
#define ONCE
#endif

enum Feature { NONE, RELU, SILU, ELU };

// States and what is kept for each token: float64 for float64 inputs, else float32.
template <class T> struct Wide { typedef float type; };
template <> struct Wide<double> { typedef double type; };

// 16 bytes, what one instruction moves.
template <class A, int W = 16 / sizeof(A)> struct alignas(W * sizeof(A)) Piece { A v[W]; };

template <class A> __device__ __forceinline__ A widened(float x) { return x; }
template <class A> __device__ __forceinline__ A widened(double x) { return x; }
template <class T> __device__ __forceinline__ T narrowed(float x) { return x; }
template <class T> __device__ __forceinline__ T narrowed(double x) { return x; }
#if defined(__CUDACC__) && !defined(WITHOUT_NARROW_TYPES)
template <class A> __device__ __forceinline__ A widened(__half x) { return __half2float(x); }
template <class A> __device__ __forceinline__ A widened(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ __half narrowed<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __half narrowed<__half>(double x) { return __double2half(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}
#endif

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class A> __device__ __forceinline__ A phi(int feature, A x) {
  if (feature == RELU) return x <= 0 ? A(0) : x;  // a NaN stays one
  if (feature == SILU) return x / (1 + exponential(-x));
  if (feature == ELU) return x > 0 ? x + 1 : exponential(x);
  return x;
}

template <class A> __device__ __forceinline__ A slope(int feature, A x) {
  if (feature == RELU) return x > 0 ? A(1) : A(0);
  if (feature == SILU) {
    const A s = 1 / (1 + exponential(-x));
    return s * (1 + x * (1 - s));
  }
  if (feature == ELU) return x > 0 ? A(1) : exponential(x);
  return A(1);
}

// An angle as a 64-bit fraction of a turn: whole turns drop out of any multiple of it. It is divided by 2 pi in twice
// the precision, as a long sequence multiplies what is lost.
__device__ __forceinline__ uint64_t fraction(double radians) {
  const double turns = __dmul_rn(radians, 0.15915494309189535);  // rounded: the rest is what that leaves out
  const double rest = fma(radians, 0.15915494309189535, -turns) + radians * -9.839338337591243e-18;
  const double part = turns - floor(turns + 0.5);  // [-0.5, 0.5), exactly
  return (uint64_t)(int64_t)(part * 18446744073709551616.0) + (uint64_t)(int64_t)(rest * 18446744073709551616.0);
}

// Cosine and sine of a phase. It is reduced before it is rounded: float32 takes its upper half.
__device__ __forceinline__ void cos_sin(uint64_t phase, double* c, double* s) {
  sincospi((double)(int64_t)phase * 1.0842021724855044e-19, s, c);  // 2^-63: two of them a turn
}
__device__ __forceinline__ void cos_sin(uint64_t phase, float* c, float* s) {
  sincospif((float)(int)(phase >> 32) * 4.656612873077393e-10f, s, c);
}

// The same number, which hides from a compiler that it is: what follows from it is computed anew in every step, instead
// of waiting in registers.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A decay of 0 forgets what it is applied to, NaN too.
template <class A> __device__ __forceinline__ A kept(A x, A decay) { return decay != 0 ? x * decay : A(0); }

// Within [low, high].
__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Where a sequence's tokens begin, and how many there are of `longest` at most; borders that make no sense are cut.
// kind: 1 lengths, 2 sequences back to back.
__device__ __forceinline__ void sequence_of(
    int kind, int64_t s, const int64_t* borders, int64_t longest, int64_t& begin, int64_t& tokens) {
  begin = 0, tokens = longest;
  if (kind == 1) tokens = clamped(borders[s], 0, longest);
  if (kind == 2) {
    begin = clamped(borders[s], 0, longest);
    tokens = clamped(borders[s + 1], begin, longest) - begin;
  }
}

// The tokens of a block's sequence; none of what is padding in a pool.
template <class B> __device__ __forceinline__ void find_tokens(B& b) {
  sequence_of(B::Flags::BORDERS, b.s, (const int64_t*)b.a.borders, b.tokens, b.begin, b.tokens);
  if (B::Flags::BORDERS == 2) b.row = 0;
  if (!b.a.slots) return;
  const int64_t slot = ((const int64_t*)b.a.slots)[b.s];
  if (slot < 0 || slot >= b.a.pool) b.tokens = 0;
}

// A sum of log decays: multiples of 2^-32, which add up exactly, and the rest. Differences of long sums lose
// nothing.
struct Sum {
  double grains, rest;
};
__device__ __forceinline__ Sum added(const Sum& a, const Sum& b) { return {a.grains + b.grains, a.rest + b.rest}; }
__device__ __forceinline__ double grained(double x) { return floor(x * 4294967296.0) * 2.3283064365386963e-10; }

// A log decay that may be -inf, as a number that can be summed and subtracted: e^-800 is 0.
__device__ __forceinline__ double summable(double log_decay) { return log_decay < -800 ? -800.0 : log_decay; }

// Tiles of matrix products in shared memory. A warp is 4 x 8 threads: of a product with C rows it owns 16, a
// thread 4. Operands that lie along the summed dimension are read 16 bytes along it; a thread's rows of them
// are 4 or 8 apart, as rows there are 16 bytes longer than a power of two. Operands across it are read 16
// bytes at once too.
template <int APART, class A, int R, int V>
__device__ __forceinline__ void along(A (&out)[R][V], const A* rows, int pitch) {
  UNROLL for (int r = 0; r < R; ++r) {
    const Piece<A> piece = *(const Piece<A>*)(rows + r * APART * pitch);
    UNROLL for (int v = 0; v < V; ++v) out[r][v] = piece.v[v];
  }
}

template <int LANES, int W, class A, int R>
__device__ __forceinline__ void across(A (&out)[R], const A* row) {
  UNROLL for (int r = 0; r < R; r += W) {
    const Piece<A, W> piece = *(const Piece<A, W>*)(row + r * LANES);
    UNROLL for (int v = 0; v < W; ++v) out[r + v] = piece.v[v];
  }
}

template <int LANES, int W, class A, int R>
__device__ __forceinline__ void lay(A* row, const A (&in)[R]) {
  UNROLL for (int r = 0; r < R; r += W) {
    Piece<A, W> piece;
    UNROLL for (int v = 0; v < W; ++v) piece.v[v] = in[r + v];
    *(Piece<A, W>*)(row + r * LANES) = piece;
  }
}

// sum [4 n] += a [4 k] b [k n] for a piece of k; b is read a row at a time.
template <int W, class A, int N, int V>
__device__ __forceinline__ void tile(A (&sum)[4][N], const A (&a)[4][V], const A* b, int pitch) {
  UNROLL for (int v = 0; v < V; ++v) {
    A row[N];
    across<8, W>(row, b + v * pitch);
    UNROLL for (int m = 0; m < 4; ++m) UNROLL for (int n = 0; n < N; ++n) sum[m][n] += a[m][v] * row[n];
  }
}
