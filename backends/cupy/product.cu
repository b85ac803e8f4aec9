// The one product behind every pass, for any CUDA GPU: out_i = scale sum_j (x_i . y_j) L_ij w_j over a state.
//
//     forward   x = phi(q)   y = phi(k)   w = v
//     dq        x = do       y = v        w = phi(k)    GRADIENT
//     dk        x = v        y = do       w = phi(q)    GRADIENT, REVERSE
//     dv        x = phi(k)   y = phi(q)   w = do        REVERSE
//
// A block of threads holds BE columns of w of one head of one sequence, beside a state [f c] in shared
// memory. It walks over C tokens at a time: pairs inside them one by one, everything before them through the
// state. Angles make two of a feature, cos(t theta) and sin(t theta) times it, side by side: of the
// contracted features (INNER) or of w's (OUTER). Between loading and storing nothing knows of angles, masks
// and dtypes.
//
// Letters: i rows of x and out, j rows of y and w (both C a block); d contracted features, f with their parts
// (C at a time); e features of w, c with their parts. Upper case is a size; a trailing [i f] is a shape.
#include "arguments.cuh"
#include "common.cuh"
#include "rows.cuh"
#include "out.cuh"
#include "state.cuh"

#ifdef __CUDACC__
extern __shared__ char shared_memory[];
#endif

// One block of threads: what it works on, and where that lies.
template <class O> struct Block {
  typedef O Flags;
  typedef typename O::T T;
  typedef typename O::A A;
  typedef typename Wide<T>::type S;
  static constexpr int C = O::C, BE = O::BE, THREADS = threads_of(C, BE);
  static constexpr int V = 16 / sizeof(A), PITCH = C + V, W_PITCH = BE + V;
  static constexpr int COLUMNS = C * BE / THREADS / 4, PAIRS = C * C / THREADS / 4;  // of a thread's 4 rows,
  static constexpr int BAND = C / 4, GAP = C / PAIRS;      // which are BAND apart, as its pairs are GAP
  static constexpr int WARPS = BE / (8 * COLUMNS);         // side by side
  static constexpr int WIDTH = COLUMNS < V ? COLUMNS : V;  // columns read at once

  static constexpr bool AHEAD = O::AHEAD, W_LATER = sizeof(A) > 4;  // float64 has no room for w while it adds
  static constexpr int ALL_XY = C * C / V / THREADS, ROWS_XY = AHEAD || ALL_XY < 4 ? ALL_XY : 4;  // at once
  static constexpr int ROWS_W = C * BE / V / THREADS;

  typedef Piece<T, V> Line;  // V features of a row as they lie in memory

  const Arguments& a;
  const bool INNER = O::ANGLES == 1 || (O::ANGLES == 2 && !O::GRADIENT);
  const bool OUTER = O::ANGLES == 2 && O::GRADIENT;
  const bool PAIRED = O::OUTPUT && !O::TOTAL, ADDS = !(O::OUTPUT && O::TOTAL);  // ADDS: y and w, to the state
  const int parts = INNER ? 2 : 1, w_parts = OUTER ? 2 : 1;
  const int D = a.D, contracted = D + (O::EXTRA ? 1 : 0), F = parts * contracted, ROWS = rows_of(F);
  const int E = a.E, SLICE = BE / w_parts, slices = (E + SLICE - 1) / SLICE;

  const int slice = blockIdx.x % slices;
  const int h = blockIdx.x / slices % (int)a.H, s = blockIdx.x / slices / (int)a.H;
  int64_t row = s, begin = 0, tokens = !O::OUTPUT ? a.M : !PAIRED || a.N > a.M ? a.N : a.M;
  int64_t t = 0;  // the first of `here` tokens of this step
  int here = 0, here_x = 0, here_y = 0;  // fewer of x or of y, where their lengths differ
  int known = 0;  // of so many tokens the decays are at hand

  const int thread = threadIdx.x, tx = thread / 2 % 8, ty = thread % 2 + thread / 16 % 2 * 2;
  const int warp_row = thread / 32 / WARPS, warp_column = thread / 32 % WARPS;
  const int first_i = warp_row * 4 + ty, first_j = warp_column * 8 + tx;  // of pairs
  const int first_f = warp_row * 16 + ty * V, first_c = warp_column * 8 * COLUMNS + tx * WIDTH;
  // A thread loads and stores V features: of x and y from c_d on, of w and out from e on.
  const int D_GROUPS = C / parts / V, c_d = thread % D_GROUPS * V;
  const int E_GROUPS = SLICE / V, c_e = thread % E_GROUPS * V, e = slice * SLICE + c_e;
  uint64_t e_step[V];      // OUTER: their angles,
  double torque[V] = {};   // and what turns them
  const double g = O::DECAY == 1 ? summable(((const S*)a.log_decay)[h * a.g_h]) : 0;

  A* const X = (A*)shared_memory;    // [i f], then pairs [i j]
  A* const Y = X + C * PITCH;        // [j f]
  A* const W = Y + C * PITCH;        // [j c], then out
  A* const state = W + C * W_PITCH;  // [f c]
  A* const z = state + ROWS * BE;    // [f]
  A* const near = z + ROWS;          // [i]: the decay from the state to a token
  A* const far = near + C;           // [j]: and from a token to the state
  A* const factor = far + C;         // [j]: of the gradient of the output
  A* const cosine = factor + C;      // [j]: of one angle for all
  A* const sine = cosine + C;
  A* const share = sine + C;         // one number a thread; in front what sums of weights come to [i]
  A* const extra = share;            // [j]: no pass has both
  Sum* const room = (Sum*)(share + THREADS);        // [2 C]: sums of log decays, and room to form them
  int* const shown = (int*)(room + 2 * C);          // [C]: whether a token is there, and the mask shows it
  const Sum* sums = room;

  __device__ __forceinline__ explicit Block(const Arguments& arguments) : a(arguments) {
    find_tokens(*this);
    UNROLL for (int v = 0; v < V; ++v) e_step[v] = OUTER && e + v < E ? step_of(e + v, E) : 0;
  }

  static __device__ __forceinline__ A wide(const void* from, int64_t at) { return (A)((const S*)from)[at]; }
  __device__ __forceinline__ int64_t line(int i, int64_t count) const {  // of arrays [B count H]
    return (row * count + begin + t + i) * a.H + h;
  }
  __device__ __forceinline__ uint64_t step_of(int feature, int features) const {
    return fraction(O::ANGLES == 1 ? a.angle : ((const double*)a.theta)[h * features + feature]);
  }
  __device__ __forceinline__ Rows<T> rows(void* array, int64_t b, int64_t n, int64_t head, int64_t d) const {
    const bool together = d == 1 && ((uint64_t)array | (b | n | head) * sizeof(T)) % sizeof(Line) == 0;
    return {(T*)array + row * b + (begin + t) * n + h * head, n, d, together};
  }
  __device__ __forceinline__ bool in_x(int i) const { return O::MASK == 2 ? shown[i] : i < here_x; }
  __device__ __forceinline__ bool in_y(int j) const { return O::MASK == 1 ? shown[j] : j < here_y; }

  __device__ __forceinline__ void enter(int step) {
    t = (int64_t)step * C;
    here = here_x = here_y = step < 0 ? 0 : (int)clamped(tokens - t, 0, C);
    if (!O::TOTAL && !O::SUMS) return;  // as many of both
    here_x = (int)clamped(a.N - begin - t, 0, here);
    here_y = (int)clamped(a.M - begin - t, 0, here);
  }

  // What belongs to the tokens of a step, whichever feature.
  __device__ __forceinline__ void know_tokens() {
    __syncthreads();
    const int i = thread;
    if (i < C) {
      const int in_do = O::DO == 1 ? here_x : here_y, in_keys = O::MASK == 2 ? here_x : here_y;
      const int in_extra = O::EXTRA == 1 ? here_x : here_y;
      if (O::MASK)
        shown[i] = i < in_keys && ((const bool*)a.mask)[row * a.mask_b + (begin + t + i) * a.mask_n];
      if (O::DO && i < in_do) {
        const A den = a.den ? wide(a.den, line(i, O::DO == 1 ? a.N : a.M)) : 1;
        factor[i] = (A)a.do_scale / (a.den && den <= (A)a.eps ? (A)a.eps : den);
      }
      if (O::EXTRA == 1 ? O::OUTPUT : O::EXTRA && ADDS)
        extra[i] = i < in_extra ? wide(a.extra, (row * a.H + h) * a.extra_n + begin + t + i) : A(0);
      if (O::EXTRA && O::DO) extra[i] *= (A)a.do_scale;
      if (O::ANGLES == 1) cos_sin(step_of(0, 0) * (t + i + 1), cosine + i, sine + i);
      if (O::DECAY == 1 && here != known) {
        const int before = i + 1, after = i < here ? here - 1 - i : 0;
        near[i] = exponential((A)(g * (O::REVERSE ? after : before)));
        far[i] = exponential((A)(g * (O::REVERSE ? before : after)));
      }
      if (O::DECAY == 2) {
        const S* log_decay = (const S*)a.log_decay + row * a.g_b + (begin + t) * a.g_n + h * a.g_h;
        const double one = i < here ? summable(log_decay[i * a.g_n]) : 0, grain = grained(one);
        room[i] = {grain, one - grain};
      }
    }
    known = here;
    if (O::DECAY == 2) {
      Sum *from = room, *to = room + C;
      for (int reach = 1; reach < C; reach *= 2) {
        __syncthreads();
        if (i < C) to[i] = i < reach ? from[i] : added(from[i], from[i - reach]);
        Sum* const swap = from;
        from = to, to = swap;
      }
      sums = from;
    }
    if (O::MASK || O::DO || O::EXTRA || O::ANGLES == 1 || O::DECAY == 2) __syncthreads();
    if (O::DECAY == 2 && i < C) {
      const A before = exponential((A)(sums[i].grains + sums[i].rest));
      const A after = exponential((A)span(i, C - 1));
      near[i] = O::REVERSE ? after : before;
      far[i] = O::REVERSE ? before : after;
    }
  }

  // What log decays come to from behind a token up to a later one.
  __device__ __forceinline__ double span(int early, int late) const {
    return fmin((sums[late].grains - sums[early].grains) + (sums[late].rest - sums[early].rest), 0.0);
  }

  // The decay between two tokens of a block, one of which sees the other.
  __device__ __forceinline__ A between(int i, int j) const {
    const int lag = O::REVERSE ? j - i : i - j;
    if (O::DECAY == 0 || lag == 0) return 1;
    if (O::DECAY == 1) return (O::REVERSE ? far : near)[lag - 1];
    return exponential((A)(O::REVERSE ? span(i, j) : span(j, i)));
  }

  // Whether some row of a band sees some of these pairs.
  static __device__ __forceinline__ bool meet(int m, int n) {
    return O::REVERSE ? (n + 1) * GAP > m * BAND : n * GAP < (m + 1) * BAND;
  }

  // The state's part of out, and pairs, as far as these features go.
  __device__ __forceinline__ void read(A (&o)[4][COLUMNS], A (&p)[4][PAIRS], A& weights, int f0) {
    const int count = F - f0 < C ? F - f0 : C;
    for (int first = 0; first < count; first += AT_ONCE) {
      UNROLL for (int f = first; f < first + AT_ONCE; f += V) {
        A x[4][V];
        along<BAND>(x, X + first_i * PITCH + f, PITCH);
        tile<WIDTH>(o, x, state + (f0 + f) * BE + first_c, BE);
        if (!PAIRED) continue;
        UNROLL for (int n = 0; n < PAIRS; ++n) {
          A y[1][V];
          along<1>(y, Y + (first_j + GAP * n) * PITCH + f, PITCH);
          UNROLL for (int m = 0; m < 4; ++m)
            if (meet(m, n)) UNROLL for (int v = 0; v < V; ++v) p[m][n] += x[m][v] * y[0][v];
        }
      }
    }
    if (!O::NORMALIZE) return;
    constexpr int PART = C * C / THREADS;  // a thread adds up a part of a row
    const int first = thread / C * PART;
    for (int f = first; f < first + PART && f < count; f += V) {
      const Piece<A> of_x = *(Piece<A>*)(X + thread % C * PITCH + f), of_z = *(Piece<A>*)(z + f0 + f);
      UNROLL for (int v = 0; v < V; ++v) weights += of_x.v[v] * of_z.v[v];
    }
  }

  // y as the block's other end sees it.
  __device__ __forceinline__ void fade() {
    if (!O::DECAY) return;
    constexpr int APART = THREADS * V / C, LINES = C / APART < 4 ? C / APART : 4;  // of a thread, at once
    for (int j = thread * V / C; j < C; j += LINES * APART) {
      A* const first = Y + j * PITCH + thread * V % C;
      Piece<A> line[LINES];
      UNROLL for (int u = 0; u < LINES; ++u) {
        line[u] = *(Piece<A>*)(first + u * APART * PITCH);
        UNROLL for (int v = 0; v < V; ++v) line[u].v[v] = kept(line[u].v[v], far[j + u * APART]);
      }
      UNROLL for (int u = 0; u < LINES; ++u) *(Piece<A>*)(first + u * APART * PITCH) = line[u];
    }
  }

  // Pairs lie where x was.
  __device__ __forceinline__ void keep_pairs(A (&o)[4][COLUMNS], A (&p)[4][PAIRS]) {
    UNROLL for (int m = 0; m < 4; ++m) {
      const int i = first_i + BAND * m;
      if (O::DECAY) UNROLL for (int n = 0; n < COLUMNS; ++n) o[m][n] = kept(o[m][n], near[i]);
      UNROLL for (int n = 0; n < PAIRS; ++n) {
        const int j = first_j + GAP * n;
        const bool seen = O::REVERSE ? j > i : j < i;
        if (PAIRED && meet(m, n)) p[m][n] = seen || (i == j && !O::STRICT) ? kept(p[m][n], between(i, j)) : A(0);
      }
    }
    UNROLL for (int m = 0; m < 4; ++m) UNROLL for (int n = 0; n < PAIRS; ++n)
      if (PAIRED && (meet(m, n) || O::NORMALIZE)) X[(first_i + BAND * m) * PITCH + first_j + GAP * n] = p[m][n];
  }

  __device__ __forceinline__ A whole() const { return O::DECAY ? (O::REVERSE ? far : near)[here - 1] : A(1); }

  // w, which pairs bring to out, and y to the state.
  __device__ __forceinline__ void add(A (&o)[4][COLUMNS], bool pairs, bool moves, int f0) {
    if (O::NORMALIZE && moves && thread < C && f0 + thread < F) {
      A sum = 0;
      BATCH for (int j = 0; j < C; ++j) sum += Y[j * PITCH + thread];
      z[f0 + thread] = kept(z[f0 + thread], whole()) + sum;
    }
    A sum[4][COLUMNS] = {};
    UNROLL for (int band = 0; band < 4; ++band) {
      UNROLL for (int j = band * BAND; j < (band + 1) * BAND; j += V) {
        A w[V][COLUMNS];
        UNROLL for (int v = 0; v < V; ++v) across<8, WIDTH>(w[v], W + (j + v) * W_PITCH + first_c);
        if (moves) {
          UNROLL for (int v = 0; v < V; ++v) {
            A y[4];
            across<4, V>(y, Y + (j + v) * PITCH + first_f);
            UNROLL for (int m = 0; m < 4; ++m) UNROLL for (int n = 0; n < COLUMNS; ++n) sum[m][n] += y[m] * w[v][n];
          }
        }
        if (!pairs) continue;
        UNROLL for (int m = 0; m < 4; ++m) {
          if (O::REVERSE ? m > band : m < band) continue;
          A p[1][V];
          along<1>(p, X + (first_i + BAND * m) * PITCH + j, PITCH);
          UNROLL for (int v = 0; v < V; ++v) UNROLL for (int n = 0; n < COLUMNS; ++n) o[m][n] += p[0][v] * w[v][n];
        }
      }
    }
    if (!moves) return;
    const A decay = whole();
    UNROLL for (int m = 0; m < 4; ++m) {
      const int f = f0 + first_f + m / V * 4 * V + m % V;
      if (f >= ROWS) continue;
      A old[COLUMNS];
      across<8, WIDTH>(old, state + f * BE + first_c);
      UNROLL for (int n = 0; n < COLUMNS; ++n) sum[m][n] += kept(old[n], decay);
      lay<8, WIDTH>(state + f * BE + first_c, sum[m]);
    }
  }
};

// Lines of a step's features from f0 on; w's with the first ones.
template <class B, class Line, int XY, int COLUMNS>
__device__ __forceinline__ void ask(const B& b, Line (&x)[XY], Line (&y)[XY], Line (&w)[COLUMNS], int f0) {
  const Arguments& a = b.a;
  ask_xy(b, x, y, f0, 0);
  if (b.ADDS) ask_columns(b, w, b.rows(a.w, a.w_b, a.w_n, a.w_h, a.w_d), f0 ? 0 : b.here_y);
}

// Read the state, go through the tokens block by block, write the state.
template <class O> __global__ void
__launch_bounds__(threads_of(O::C, O::BE), blocks_of(threads_of(O::C, O::BE)))
product(Arguments a) {
  typedef typename O::A A;
  Block<O> block(a);
  constexpr int C = O::C;
  const int onward = O::REVERSE ? -1 : 1;
  read_state(block);
  int left = (int)((block.tokens + C - 1) / C), step = O::REVERSE ? left - 1 : 0;
  typename Block<O>::Line x[Block<O>::ROWS_XY], y[Block<O>::ROWS_XY], w[Block<O>::ROWS_W];
  block.enter(step);
  if (O::AHEAD) ask(block, x, y, w, 0);
  for (; left; --left) {
    if (!O::AHEAD) ask(block, x, y, w, 0);
    block.know_tokens();
    A o[4][Block<O>::COLUMNS] = {}, p[4][Block<O>::PAIRS] = {}, weights = 0;
    if (block.ADDS) put_w(block, w);
    const bool moves = block.ADDS && (left > 1 || a.final || a.final_z);
    for (int f0 = 0; f0 < block.F; f0 += C) {
      const bool last = f0 + C >= block.F;
      if (f0) __syncthreads();
      for (int first = 0; first * block.parts < Block<O>::ALL_XY; first += Block<O>::ROWS_XY) {
        if (!O::AHEAD && (first || f0)) ask_xy(block, x, y, f0, first);
        put_xy(block, x, y, f0, first);
      }
      __syncthreads();
      if (O::OUTPUT) {
        block.read(o, p, weights, f0);
        __syncthreads();
      }
      if (moves) block.fade();
      if (O::OUTPUT && last) block.keep_pairs(o, p);
      __syncthreads();
      if (O::AHEAD) {
        block.enter(last ? step + onward : step);
        if (Block<O>::W_LATER) ask_xy(block, x, y, last ? 0 : f0 + C, 0);
        else ask(block, x, y, w, last ? 0 : f0 + C);
        block.enter(step);
      }
      if (O::OUTPUT && O::NORMALIZE && last) divide_by(block, weights);
      if (block.ADDS) block.add(o, block.PAIRED && last, moves, f0);
    }
    if (O::AHEAD && Block<O>::W_LATER && block.ADDS) {
      block.enter(step + onward);
      ask_columns(block, w, block.rows(a.w, a.w_b, a.w_n, a.w_h, a.w_d), block.here_y);
      block.enter(step);
    }
    if (O::OUTPUT) finish(block, o);
    block.enter(step += onward);
  }
  __syncthreads();
  write_state(block);
  if (O::TURN) write_turn(block);
}
