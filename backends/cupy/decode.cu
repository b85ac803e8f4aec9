// One token of every sequence: its state is read once, moved on by a token, added to, read out, written back.
//
//     C, S <- decay (cos C - sin S, sin C + cos S)      C += phi(k) v^T      o = scale phi(q)^T C
//
// A block of threads works on some columns of one head's state: a thread has W of them side by side, in every
// GROUPS-th row. Bound by the memory that holds the state: many rows are asked for before the first is waited for.
// Letters: b rows of q, s rows of the state, d features of q and k, e features of v and o.
#include "twice.cuh"

// What the state's addresses are made of comes first; slices_of and heads_of are for `divided`.
struct Step {
  void *kv;
  int64_t kv_s, kv_h, kv_f, kv_e;
  int64_t slices_of, heads_of;
  int64_t S, H, D, E;
  void *slots, *log_decay;
  int64_t g_b, g_h;
  void *q, *k, *v, *o;
  int64_t q_b, q_h, q_d;
  int64_t k_b, k_h, k_d;
  int64_t v_b, v_h, v_e;
  void *theta;
  double angle;
  double scale, eps;
  void *length;
  int64_t length_s;
  void *z;
  int64_t z_s, z_h, z_f;
};

// x / n, where `of` is 2^64 / n, rounded up; of 1 it is 0.
__device__ __forceinline__ unsigned divided(unsigned x, int64_t of) {
#ifdef __CUDACC__
  return of ? (unsigned)__umul64hi(x, (uint64_t)of) : x;
#else
  return of ? (unsigned)(((unsigned __int128)x * (uint64_t)of) >> 64) : x;
#endif
}

template <
    class T_, int THREADS_, int W_, int LANES_, int AT_ONCE_, int WIDEST_, int FEATURE_, int ANGLES_,
    int DECAY_, int NORMALIZE_, int FULL_>
struct Choice {
  typedef T_ T;                              // of q, k, v and o
  static constexpr int THREADS = THREADS_;   // of a block
  static constexpr int W = W_;               // columns of a thread
  static constexpr int LANES = LANES_;       // threads beside each other in a row
  static constexpr int AT_ONCE = AT_ONCE_;   // rows of a thread that are under way
  static constexpr int WIDEST = WIDEST_;     // features d that fit
  static constexpr int TURNS = ANGLES_ == 2 ? WIDEST_ : 1;  // constants of a step
  static constexpr int FEATURE = FEATURE_, ANGLES = ANGLES_, DECAY = DECAY_;  // as the product has them
  static constexpr int NORMALIZE = NORMALIZE_;  // then a block has all columns
  static constexpr int FULL = FULL_;            // D is WIDEST, and no block has columns to spare
};

// One number of the state, and beside it the other part if there are angles, one token later.
template <class O, class S>
__device__ __forceinline__ void advance(
    S& cosine, S& sine, const Turn<S>& turn, bool forgets, S added) {
  if (forgets) cosine = added, sine = 0;  // whatever they were, NaN too
  else if (O::ANGLES) turn.apply(cosine, sine, added);
  else if (O::DECAY) cosine = times(cosine, turn.large, added);
  else cosine += added;
}

// Adds 1, and nobody waits for what was there.
__device__ __forceinline__ void counted(uint64_t* length) {
#ifdef __CUDACC__
  asm volatile("red.global.add.u64 [%0], 1;" ::"l"(length) : "memory");
#else
  *length += 1;
#endif
}

// Everything that a thread reads is asked for before the first of it is waited for.
template <class O> __global__ void __launch_bounds__(O::THREADS) decode(Step a) {
  typedef typename O::T T;
  typedef typename Wide<T>::type S;
  typedef Piece<S, O::W> P;
  constexpr int THREADS = O::THREADS, W = O::W, LANES = O::LANES, AT_ONCE = O::AT_ONCE, WIDEST = O::WIDEST;
  constexpr int GROUPS = THREADS / LANES, COLUMNS = W * LANES, OWN = (WIDEST + THREADS - 1) / THREADS;
  __shared__ S of_q[WIDEST], of_k[WIDEST], found[GROUPS][COLUMNS + 1], sums[THREADS];
  __shared__ typename Turns<S, O::TURNS>::Array turns;
  __shared__ bool forgotten;
  const unsigned thread = threadIdx.x % THREADS, lane = thread % LANES, group = thread / LANES;
  const int D = O::FULL ? WIDEST : (int)a.D, E = (int)a.E;
  const unsigned slices = (E + COLUMNS - 1) / COLUMNS, head = divided(blockIdx.x, a.slices_of);
  const unsigned b = divided(head, a.heads_of), h = head - b * (unsigned)a.H;
  const int begin = (int)((blockIdx.x - head * slices) * COLUMNS), e = begin + (int)lane * W;
  const int64_t s = a.slots ? ((const int64_t*)a.slots)[b] : b;
  T* const o = (T*)a.o + (int64_t)head * E + begin;
  if (s < 0 || s >= a.S) {  // padding
    for (int c = (int)thread; c < COLUMNS && begin + c < E; c += THREADS) o[c] = narrowed<T>(0.0f);
    return;
  }
  const bool here = O::FULL || e < E;  // W divides E
  const int64_t jump = GROUPS * a.kv_f, half = a.D * a.kv_f;
  S* at = (S*)a.kv + s * a.kv_s + h * a.kv_h + group * a.kv_f + e * a.kv_e;
  P rows[AT_ONCE], others[AT_ONCE];
  const auto ask = [&](int first) {
    const S* from = at;
    UNROLL for (int u = 0; u < AT_ONCE; ++u, from += jump)
      if (first + u * GROUPS < (here ? D : 0)) {
        rows[u] = *(const P*)from;
        if (O::ANGLES) others[u] = *(const P*)(from + half);
      }
  };
  ask((int)group);
  const S g = O::DECAY ? ((const S*)a.log_decay)[b * a.g_b + h * a.g_h] : S(0);
  S* const z = (S*)a.z + s * a.z_s + h * a.z_h;
  T q[OWN], k[OWN], v[W];
  S z_cosine[OWN], z_sine[OWN];
  UNROLL for (int i = 0; i < OWN; ++i) {
    const int d = (int)thread + i * THREADS;
    if (d < D) {
      q[i] = ((const T*)a.q)[b * a.q_b + h * a.q_h + d * a.q_d];
      k[i] = ((const T*)a.k)[b * a.k_b + h * a.k_h + d * a.k_d];
      if (O::NORMALIZE) z_cosine[i] = z[d * a.z_f];
      if (O::NORMALIZE && O::ANGLES) z_sine[i] = z[(D + d) * a.z_f];
    }
  }
  if (here) UNROLL for (int w = 0; w < W; ++w) v[w] = ((const T*)a.v)[b * a.v_b + h * a.v_h + (e + w) * a.v_e];

  if (O::ANGLES == 2 || thread == 0) {
    const double factor = exponential((double)g);
    if (thread == 0) forgotten = O::DECAY && factor == 0;
    for (int d = (int)thread; d < (O::ANGLES == 2 ? D : 1); d += THREADS) {
      double c = 1, si = 0;
      if (O::ANGLES) cos_sin(fraction(O::ANGLES == 2 ? ((const double*)a.theta)[h * D + d] : a.angle), &c, &si);
      turns[d] = Turn<S>(c * factor, si * factor);
    }
  }
  UNROLL for (int i = 0; i < OWN; ++i) {
    const int d = (int)thread + i * THREADS;
    if (d < D) {
      of_q[d] = phi(O::FEATURE, widened<S>(q[i])) * (S)a.scale;
      of_k[d] = phi(O::FEATURE, widened<S>(k[i]));
    }
  }
  __syncthreads();

  const bool forgets = forgotten;
  S sum[W] = {};
  for (int first = (int)group; here && first < D; first += GROUPS * AT_ONCE) {
    if (WIDEST > GROUPS * AT_ONCE && first >= GROUPS) ask(first);
    UNROLL for (int u = 0; u < AT_ONCE; ++u, at += jump) {
      const int d = first + u * GROUPS, own = O::ANGLES == 2 ? d : 0;
      if (d < D) {
        UNROLL for (int w = 0; w < W; ++w) {
          S sine = O::ANGLES ? others[u].v[w] : S(0);
          advance<O, S>(rows[u].v[w], sine, turns[own], forgets, of_k[d] * widened<S>(v[w]));
          if (O::ANGLES) others[u].v[w] = sine;
          sum[w] += of_q[d] * rows[u].v[w];
        }
        *(P*)at = rows[u];
        if (O::ANGLES) *(P*)(at + half) = others[u];
      }
    }
    if (WIDEST <= GROUPS * AT_ONCE) break;
  }
  UNROLL for (int w = 0; w < W; ++w) found[group][lane * W + w] = sum[w];
  if (O::NORMALIZE) {  // another block's z must not change before it is read: this one has all columns
    S weights = 0;
    UNROLL for (int i = 0; i < OWN; ++i) {
      const int d = (int)thread + i * THREADS, own = O::ANGLES == 2 ? d : 0;
      if (d < D) {
        advance<O, S>(z_cosine[i], z_sine[i], turns[own], forgets, of_k[d]);
        z[d * a.z_f] = z_cosine[i];
        if (O::ANGLES) z[(D + d) * a.z_f] = z_sine[i];
        weights += of_q[d] * z_cosine[i];
      }
    }
    sums[thread] = weights;
  }
  if (thread == 0 && begin == 0 && h == 0) counted((uint64_t*)a.length + s * a.length_s);
  __syncthreads();
  for (int c = (int)thread; c < COLUMNS && begin + c < E; c += THREADS) {
    S all = 0;
    UNROLL for (int i = 0; i < GROUPS; ++i) all += found[i][c];
    if (O::NORMALIZE) {
      S weights = 0;
      for (int i = 0; i < THREADS && i < D; ++i) weights += sums[i];
      all /= weights <= (S)a.eps ? (S)a.eps : weights;
    }
    o[c] = narrowed<T>(all);
  }
}
