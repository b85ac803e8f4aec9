// One token of every sequence: its state is read once, moved on by a token, added to, read out, written back.
//
//     C, S <- decay (cos C - sin S, sin C + cos S)      C += phi(k) v^T      o = scale phi(q)^T C
//
// A block of threads works on some columns of one head's state: a thread has W of them side by side, in every
// GROUPS-th row. Bound by the memory that holds the state: many rows are asked for before the first is waited for.
// Letters: b rows of q, s rows of the state, d features of q and k, e features of v and o.
#include "common.cuh"

struct Step {
  void *q, *k, *v, *o;
  int64_t q_b, q_h, q_d;
  int64_t k_b, k_h, k_d;
  int64_t v_b, v_h, v_e;
  void *log_decay;
  int64_t g_b, g_h;
  void *theta;
  double angle;
  void *slots;
  void *kv, *z, *length;
  int64_t kv_s, kv_h, kv_f, kv_e;
  int64_t z_s, z_h, z_f;
  int64_t length_s;
  int64_t S, H, D, E;
  double scale, eps;
};

// A constant in two numbers of one sign, neither 0 unless it is: a million steps of it are exact to the state's
// own rounding, and infinity times it is no NaN.
template <class S> struct Twice;
template <> struct Twice<float> {
  float high, low;
  __device__ __forceinline__ Twice() {}
  __device__ __forceinline__ Twice(double x) {
    union { double number; uint64_t bits; } cut = {x};
    cut.bits &= ~0x1fffffffull;  // what float32 holds
    high = (float)cut.number, low = (float)(x - cut.number + x * 8.673617379884035e-19);  // 2^-60
  }
};
template <> struct Twice<double> {
  double high;
  __device__ __forceinline__ Twice() {}
  __device__ __forceinline__ Twice(double x) : high(x) {}
};

// x c + rest.
__device__ __forceinline__ float times(float x, const Twice<float>& c, float rest) {
  return fmaf(x, c.high, fmaf(x, c.low, rest));
}
__device__ __forceinline__ double times(double x, const Twice<double>& c, double rest) {
  return fma(x, c.high, rest);
}

template <
    class T_, int THREADS_, int W_, int LANES_, int AT_ONCE_, int WIDEST_, int FEATURE_, int ANGLES_,
    int DECAY_, int NORMALIZE_>
struct Choice {
  typedef T_ T;                              // of q, k, v and o
  static constexpr int THREADS = THREADS_;   // of a block
  static constexpr int W = W_;               // columns of a thread
  static constexpr int LANES = LANES_;       // threads beside each other in a row
  static constexpr int AT_ONCE = AT_ONCE_;   // rows of a thread that are under way
  static constexpr int WIDEST = WIDEST_;     // features d that fit
  static constexpr int FEATURE = FEATURE_, ANGLES = ANGLES_, DECAY = DECAY_;  // as the product has them
  static constexpr int NORMALIZE = NORMALIZE_;  // then a block has all columns
};

// One number of the state, and beside it the other part if there are angles, one token later.
template <class O, class S>
__device__ __forceinline__ void advance(
    S& cosine, S& sine, const Twice<S>& c, const Twice<S>& s, bool forgets, S added) {
  if (forgets) cosine = added, sine = 0;  // whatever they were, NaN too
  else if (O::ANGLES) {
    const S old = cosine;
    cosine = times(old, c, times(-sine, s, added));
    sine = times(old, s, times(sine, c, S(0)));
  } else if (O::DECAY) cosine = times(cosine, c, added);
  else cosine += added;
}

template <class O> __global__ void __launch_bounds__(O::THREADS) decode(Step a) {
  typedef typename O::T T;
  typedef typename Wide<T>::type S;
  constexpr int THREADS = O::THREADS, W = O::W, LANES = O::LANES, AT_ONCE = O::AT_ONCE, WIDEST = O::WIDEST;
  constexpr int GROUPS = THREADS / LANES, COLUMNS = W * LANES;
  __shared__ S of_q[WIDEST], of_k[WIDEST], found[GROUPS][COLUMNS + 1], sums[THREADS];
  __shared__ Twice<S> cosines[WIDEST], sines[WIDEST];  // of a step; the first is everybody's unless ANGLES is 2
  const int slices = (a.E + COLUMNS - 1) / COLUMNS;
  const int thread = threadIdx.x, slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.H, b = blockIdx.x / slices / a.H;
  const int lane = thread % LANES, group = thread / LANES, e = slice * COLUMNS + lane * W;
  const int64_t s = a.slots ? ((const int64_t*)a.slots)[b] : b;
  T* const o = (T*)a.o + (b * a.H + h) * a.E;
  if (s < 0 || s >= a.S) {  // padding
    for (int c = thread; c < COLUMNS && slice * COLUMNS + c < a.E; c += THREADS)
      o[slice * COLUMNS + c] = narrowed<T>(0.0f);
    return;
  }
  const bool here = e < a.E;  // W divides E
  S* const kv = (S*)a.kv + s * a.kv_s + h * a.kv_h + e * a.kv_e;
  const int64_t half = a.D * a.kv_f;
  Piece<S, W> rows[AT_ONCE], others[AT_ONCE];
  const auto ask = [&](int first) {
    UNROLL for (int u = 0; u < AT_ONCE; ++u) {
      const int d = first + u * GROUPS;
      if (!here || d >= a.D) continue;
      rows[u] = *(const Piece<S, W>*)(kv + d * a.kv_f);
      if (O::ANGLES) others[u] = *(const Piece<S, W>*)(kv + half + d * a.kv_f);
    }
  };
  ask(group);  // under way while all that is the head's is worked out
  const double g = O::DECAY ? (double)((const S*)a.log_decay)[b * a.g_b + h * a.g_h] : 0;
  const double factor = exponential(g);
  const bool forgets = O::DECAY && factor == 0;
  for (int d = thread; d < a.D; d += THREADS) {
    of_q[d] = phi(O::FEATURE, widened<S>(((const T*)a.q)[b * a.q_b + h * a.q_h + d * a.q_d])) * (S)a.scale;
    of_k[d] = phi(O::FEATURE, widened<S>(((const T*)a.k)[b * a.k_b + h * a.k_h + d * a.k_d]));
    if (O::ANGLES == 2) {
      double c, si;
      cos_sin(fraction(((const double*)a.theta)[h * a.D + d]), &c, &si);
      cosines[d] = Twice<S>(c * factor), sines[d] = Twice<S>(si * factor);
    }
  }
  if (O::ANGLES != 2 && thread == 0) {
    double c = 1, si = 0;
    if (O::ANGLES == 1) cos_sin(fraction(a.angle), &c, &si);
    cosines[0] = Twice<S>(c * factor), sines[0] = Twice<S>(si * factor);
  }
  __syncthreads();

  S v[W], sum[W] = {};
  UNROLL for (int w = 0; w < W; ++w)
    v[w] = here ? widened<S>(((const T*)a.v)[b * a.v_b + h * a.v_h + (e + w) * a.v_e]) : S(0);
  for (int first = group; here && first < a.D; first += GROUPS * AT_ONCE) {
    if (first != group) ask(first);
    UNROLL for (int u = 0; u < AT_ONCE; ++u) {
      const int d = first + u * GROUPS;
      if (d >= a.D) continue;
      const int own = O::ANGLES == 2 ? d : 0;
      UNROLL for (int w = 0; w < W; ++w) {
        S sine = O::ANGLES ? others[u].v[w] : S(0);
        advance<O>(rows[u].v[w], sine, cosines[own], sines[own], forgets, of_k[d] * v[w]);
        if (O::ANGLES) others[u].v[w] = sine;
        sum[w] += of_q[d] * rows[u].v[w];
      }
      *(Piece<S, W>*)(kv + d * a.kv_f) = rows[u];
      if (O::ANGLES) *(Piece<S, W>*)(kv + half + d * a.kv_f) = others[u];
    }
  }
  UNROLL for (int w = 0; w < W; ++w) found[group][lane * W + w] = sum[w];

  if (O::NORMALIZE) {  // then a block has all columns: another one's z must not change before it is read
    S* const z = (S*)a.z + s * a.z_s + h * a.z_h;
    S weights = 0;
    for (int d = thread; d < a.D; d += THREADS) {
      S cosine = z[d * a.z_f], sine = O::ANGLES ? z[(a.D + d) * a.z_f] : S(0);
      const int own = O::ANGLES == 2 ? d : 0;
      advance<O>(cosine, sine, cosines[own], sines[own], forgets, of_k[d]);
      z[d * a.z_f] = cosine;
      if (O::ANGLES) z[(a.D + d) * a.z_f] = sine;
      weights += of_q[d] * cosine;
    }
    sums[thread] = weights;
  }
  __syncthreads();
  for (int c = thread; c < COLUMNS && slice * COLUMNS + c < a.E; c += THREADS) {
    S all = 0;
    for (int i = 0; i < GROUPS; ++i) all += found[i][c];
    if (O::NORMALIZE) {
      S weights = 0;
      for (int i = 0; i < THREADS && i < a.D; ++i) weights += sums[i];
      all /= weights <= (S)a.eps ? (S)a.eps : weights;
    }
    o[slice * COLUMNS + c] = narrowed<T>(all);
  }
  if (thread == 0 && slice == 0 && h == 0) ((int64_t*)a.length)[s * a.length_s] += 1;
}
