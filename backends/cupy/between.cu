// Around the product: the denominator's gradient, sums over suffixes, rows of a pool.
#include "common.cuh"

constexpr int THREADS = 256;

struct Quotient {
  void *den, *o, *gradient, *out;
  int64_t o_b, o_n, o_h, o_e;
  int64_t do_b, do_n, do_h, do_e;
  int64_t B, N, H, E;
  double eps;
};

// Of a quotient o = num / max(den, eps): out [B H N] = -(do . o) / den, or 0 where the clamp acts.
// A thread a row.
template <class T> __global__ void denominator_gradient(Quotient a) {
  typedef typename Wide<T>::type S;
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= a.B * a.N * a.H) return;
  const int64_t h = i % a.H, n = i / a.H % a.N, b = i / a.H / a.N;
  const T* const o = (const T*)a.o + b * a.o_b + n * a.o_n + h * a.o_h;
  const T* const gradient = (const T*)a.gradient + b * a.do_b + n * a.do_n + h * a.do_h;
  const S den = ((const S*)a.den)[i];
  S sum = 0;
  for (int64_t e = 0; e < a.E; ++e) sum += widened<S>(gradient[e * a.do_e]) * widened<S>(o[e * a.o_e]);
  ((S*)a.out)[(b * a.H + h) * a.N + n] = den <= (S)a.eps ? S(0) : -sum / den;
}

struct Suffixes {
  void *plus, *minus, *end, *log_decay, *out, *borders;
  int64_t g_b, g_n, g_h;
  int64_t plus_slices, minus_slices;
  int64_t B, N, M, H, S;
};

// The gradient of log decays: of each token the sum of everything that passes it, from the sequence's end on,
// in float64. plus [slices B N H] and minus [slices B M H]: phi(q) . dq and phi(k) . dk; end [S H] float64: what
// the final state adds, or null. out: S [B N H], or float64 [S H] summed over tokens if decays are per head.
// A block of threads a sequence and head.
template <class S, int PER_TOKEN, int BORDERS> __global__ void suffix_sums(Suffixes a) {
  __shared__ double sums[2][THREADS], all;
  const int64_t h = blockIdx.x % a.H, s = blockIdx.x / a.H;
  const int64_t row = BORDERS == 2 ? 0 : s;
  int64_t begin, tokens;
  sequence_of(BORDERS, s, (const int64_t*)a.borders, a.N > a.M ? a.N : a.M, begin, tokens);
  double carry = a.end ? ((const double*)a.end)[s * a.H + h] : 0, whole = 0;
  for (int64_t block = (tokens + THREADS - 1) / THREADS - 1; block >= 0; --block) {
    const int64_t n = block * THREADS + threadIdx.x, at = begin + n;
    double x = 0;
    if (n < tokens) {
      if (at < a.N)
        for (int64_t i = 0; i < a.plus_slices; ++i)
          x += ((const S*)a.plus)[((i * a.B + row) * a.N + at) * a.H + h];
      if (at < a.M)
        for (int64_t i = 0; i < a.minus_slices; ++i)
          x -= ((const S*)a.minus)[((i * a.B + row) * a.M + at) * a.H + h];
    }
    int side = 0;
    sums[side][threadIdx.x] = x;
    for (int reach = 1; reach < THREADS; reach *= 2) {  // each thread's sum reaches twice as far
      __syncthreads();
      double more = threadIdx.x + reach < THREADS ? sums[side][threadIdx.x + reach] : 0;
      sums[1 - side][threadIdx.x] = sums[side][threadIdx.x] + more;
      side = 1 - side;
    }
    const double passed = carry + sums[side][threadIdx.x];
    const bool real = n < tokens;
    const S* const g = (const S*)a.log_decay + row * a.g_b + (real ? at : 0) * a.g_n + h * a.g_h;
    // where the factor is 0, so is its derivative
    const double found = real && exponential(*g) > 0 ? passed : 0;
    if (PER_TOKEN && real) ((S*)a.out)[(row * a.N + at) * a.H + h] = (S)found;
    __syncthreads();
    if (threadIdx.x == 0) all = carry + sums[side][0];
    __syncthreads();
    carry = all;
    if (!PER_TOKEN) {
      sums[0][threadIdx.x] = found;
      for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[0][threadIdx.x] += sums[0][threadIdx.x + half];
      }
      __syncthreads();
      whole += sums[0][0];
    }
    __syncthreads();
  }
  if (!PER_TOKEN && threadIdx.x == 0) ((double*)a.out)[s * a.H + h] = whole;
}

struct Rows {
  void *slots, *from, *z, *length, *borders;
  int64_t S, F, pool, N;
};

// What a pass over rows of a pool leaves to do when all of it is over: z [pool F] from [S F] if there is one,
// and the tokens that rows have seen. A block of threads a sequence.
template <class S, int BORDERS> __global__ void keep_rows(Rows a) {
  const int64_t s = blockIdx.x, slot = ((const int64_t*)a.slots)[s];
  if (slot < 0 || slot >= a.pool) return;  // padding
  if (a.z)
    for (int64_t f = threadIdx.x; f < a.F; f += THREADS)
      ((S*)a.z)[slot * a.F + f] = ((const S*)a.from)[s * a.F + f];
  int64_t begin, tokens;
  sequence_of(BORDERS, s, (const int64_t*)a.borders, a.N, begin, tokens);
  if (threadIdx.x == 0) ((int64_t*)a.length)[slot] += tokens;
}
