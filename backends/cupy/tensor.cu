// The product of product.cu on tensor cores: the same sums, options and arguments, with operands rounded to bfloat16
// or tf32. Everything else is float32: sums, states, decays, the sums of weights.
//
// Four warps hold BE columns of w of one head of one sequence, and walk over C tokens at a time. A warp forms 16
// rows of out and of pairs, whose sums become the left operand of the next product where they are, in registers. It
// adds to 16 rows of the state of each chunk of C contracted features; before that a rounded copy of all rows is laid
// out for those who read. Sums of weights are one more column of w, of ones, and of the state.
//
// Raw rows of the next chunk are on their way while this one is multiplied (ahead.cuh).
#include "arguments.cuh"
#include "common.cuh"
#include "rows.cuh"
#include "state.cuh"
#include "tensor.cuh"
#include "ahead.cuh"
#include "results.cuh"

#ifdef __CUDACC__
extern __shared__ __align__(128) char shared_memory[];
#endif

template <class T_, class A_, int HELD_, int... FLAGS> struct Warps : Options<T_, A_, FLAGS...> {
  static constexpr int HELD = HELD_;  // chunks of the state, all of them in registers; 0: it is in shared memory
};

// Where things lie in shared memory, in bytes; F contracted features, EXTRA's and both parts of each included.
template <class T, int BE, int HELD> struct Places {
  typedef Operand<T> Op;
  static constexpr int C = 64, THREADS = 128, V = 16 / sizeof(T);
  static constexpr int PITCH = C * Op::SIZE + 16, W_PITCH = BE * Op::SIZE + 16;
  static constexpr int ROWS_XY = C * C / V / THREADS, ROWS_W = C * BE / V / THREADS;  // of a thread
  static constexpr int OF_X = 0, OF_Y = C * PITCH, OF_W = 2 * C * PITCH, OF_TABLES = OF_W + C * W_PITCH + 16;
  static constexpr int OF_LAGS = OF_TABLES + 2 * TABLES * C * 4, OF_SLOTS = OF_LAGS + (2 * C + 4) * 4;
  static constexpr int OF_COPY = OF_SLOTS + (2 * ROWS_XY + ROWS_W) * THREADS * 16;

  static __host__ __device__ constexpr int64_t chunks(int64_t F) { return HELD ? HELD : (F + C - 1) / C; }
  static __host__ __device__ constexpr int64_t of_turns(int64_t F) { return OF_COPY + chunks(F) * C * W_PITCH; }
  // While the state is read or written it lies in front, in float32. Who reads ones beside tf32 reads 16 bytes more,
  // of w too, which nobody may be writing.
  static __host__ __device__ constexpr int64_t of_sums(int64_t F, int64_t turns) {
    const int64_t end = of_turns(F) + 8 * turns + 16, state = chunks(F) * C * (BE + 1) * 4;
    return ((end > state ? end : state) + 15) / 16 * 16;
  }
  static __host__ __device__ constexpr int64_t bytes(int64_t F, int64_t turns, bool normalize) {
    return of_sums(F, turns) + (HELD ? 0 : chunks(F) * (BE / 8 + normalize) * THREADS * 16);
  }
};

// One block of threads: what it works on, and where that lies.
template <class O> struct Block : Places<typename O::T, O::BE, O::HELD> {
  typedef O Flags;
  typedef typename O::T T;
  typedef float A;
  typedef float S;
  typedef Places<T, O::BE, O::HELD> P;
  typedef Operand<T> Op;
  typedef Piece<T, P::V> Line;  // V features of a row as they lie in memory
  using P::C, P::PITCH, P::W_PITCH, P::V;
  static constexpr int BE = O::BE, STEPS = C / Op::K;
  static constexpr int ONES = BE / 8, COLUMNS = ONES + 1;  // groups of 8 columns, the one of ones included

  const Arguments& a;
  const bool INNER = O::ANGLES == 1 || (O::ANGLES == 2 && !O::GRADIENT);
  const bool OUTER = O::ANGLES == 2 && O::GRADIENT;
  const bool PAIRED = O::OUTPUT && !O::TOTAL, ADDS = !(O::OUTPUT && O::TOTAL);  // ADDS: y and w, to the state
  const int parts = INNER ? 2 : 1, w_parts = OUTER ? 2 : 1;
  const int D = a.D, contracted = D + (O::EXTRA ? 1 : 0), F = parts * contracted;
  const int chunks = (int)P::chunks(F), ROWS = chunks * C;
  const int E = a.E, SLICE = BE / w_parts, slices = (E + SLICE - 1) / SLICE;

  const int slice = blockIdx.x % slices;
  const int h = blockIdx.x / slices % (int)a.H, s = blockIdx.x / slices / (int)a.H;
  int64_t row = s, begin = 0, tokens = !O::OUTPUT ? a.M : !PAIRED || a.N > a.M ? a.N : a.M;
  int steps;

  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(~0u, thread / 32, 0);  // the compiler sees that it is one for all lanes
  // Of sums, a lane's rows are `group` and the one 8 below, its columns `first` and the next.
  const int group = lane / 4, first = lane % 4 * 2;
  // A thread asks for V features: of x and y from c_d on in a chunk, of w from e on.
  const int D_GROUPS = C / parts / V, c_d = thread % D_GROUPS * V;
  const int E_GROUPS = SLICE / V, c_e = thread % E_GROUPS * V, e = slice * SLICE + c_e;

  char* const X = shared_memory + P::OF_X;  // [i f], and passage between rows of memory and sums
  char* const Y = shared_memory + P::OF_Y;  // [j f]
  char* const W = shared_memory + P::OF_W;  // [j c], and a column of ones
  char* const copy = shared_memory + P::OF_COPY;  // [f c] of the state, and two columns of z
  float* const lags = (float*)(shared_memory + P::OF_LAGS) + C;  // the decay by i - j [-C, C], 0 if i does not see j
  uint64_t* const turns = (uint64_t*)(shared_memory + P::of_turns(F));  // angles of features
  float* const state = (float*)shared_memory;  // [f c], while it is read or written
  float* const z = state + ROWS * BE;          // [f]
  const uint32_t x_at = place(X) + 16 * warp * PITCH + Op::upright(lane, PITCH);
  const uint32_t y_at = place(Y) + Op::beside(lane, PITCH), y_across = place(Y) + Op::left_across(lane, PITCH);
  const uint32_t w_at = place(W) + Op::right_across(lane, W_PITCH);
  const uint32_t copy_at = place(copy) + Op::right_across(lane, W_PITCH);
  int parity = 0;  // of two tables: this step's

  __device__ __forceinline__ explicit Block(const Arguments& arguments) : a(arguments) {
    find_tokens(*this);
    steps = (int)((tokens + C - 1) / C);
  }

  __device__ __forceinline__ int turned() const { return O::ANGLES < 2 ? O::ANGLES : OUTER ? 32 : D; }
  __device__ __forceinline__ char* slot(int of) const {
    return shared_memory + P::OF_SLOTS + (of * P::THREADS + thread) * 16;
  }
  __device__ __forceinline__ float* of(int table, int other = 0) const {
    return (float*)(shared_memory + P::OF_TABLES) + ((parity ^ other) * TABLES + table) * C;
  }
  __device__ __forceinline__ Pieces of_xy() const {
    return {thread / D_GROUPS, P::THREADS / D_GROUPS, P::ROWS_XY / parts};
  }
  __device__ __forceinline__ Pieces of_w() const {
    return {thread / E_GROUPS, P::THREADS / E_GROUPS, P::ROWS_W / w_parts};
  }
  __device__ __forceinline__ int64_t line(const Span& span, int i, int64_t count) const {  // of arrays [B count H]
    return (row * count + begin + span.t + i) * a.H + h;
  }
  __device__ __forceinline__ uint64_t step_of(int feature, int features) const {
    return fraction(O::ANGLES == 1 ? a.angle : ((const double*)a.theta)[h * features + feature]);
  }
  __device__ __forceinline__ Rows<T> rows(
      const Span& span, void* array, int64_t b, int64_t n, int64_t head, int64_t d) const {
    const bool together = d == 1 && ((uint64_t)array | (b | n | head) * sizeof(T)) % sizeof(Line) == 0;
    return {(T*)array + row * b + (begin + span.t) * n + h * head, n, d, together};
  }
  __device__ __forceinline__ bool shown(int i) const { return of(SHOWN)[i] != 0; }
  __device__ __forceinline__ bool in_x(const Span& span, int i) const {
    return O::MASK == 2 ? shown(i) : i < span.here_x;
  }
  __device__ __forceinline__ bool in_y(const Span& span, int j) const {
    return O::MASK == 1 ? shown(j) : j < span.here_y;
  }

  // Of the next step after `done` ones; behind the last one no token is there.
  __device__ __forceinline__ Span span(int done) const {
    const int64_t t = (int64_t)(O::REVERSE ? steps - 1 - done : done) * C;
    const int64_t end = done < steps ? tokens - t : 0;
    return {t, (int)clamped(end, 0, C), (int)clamped(a.N - begin - t, 0, clamped(end, 0, C)),
            (int)clamped(a.M - begin - t, 0, clamped(end, 0, C))};
  }

  // What belongs to a block: the decay by distance, angles of features, ones beside w.
  __device__ __forceinline__ void prepare() {
    const double g = O::DECAY == 1 ? summable(((const float*)a.log_decay)[h * a.g_h]) : 0;
    for (int i = thread - C; i <= C; i += P::THREADS) {
      const int lag = O::REVERSE ? -i : i;
      lags[i] = lag > 0 ? exponential((float)(g * lag)) : lag == 0 && !O::STRICT ? 1.0f : 0.0f;
    }
    for (int i = thread; i < turned(); i += P::THREADS) {
      const int feature = OUTER ? slice * SLICE + i : i, features = OUTER ? E : D;
      turns[i] = feature < features ? step_of(feature, features) : 0;
    }
    if (thread < C) Op::lay(W + thread * W_PITCH + BE * Op::SIZE, 1, 0);
  }

  // What belongs to the tokens of the next step, whichever feature: a warp's work, two tokens a lane.
  __device__ __forceinline__ void know_tokens(const Span& next) {
    float highs = 0, lows = 0;  // sums of log decays: multiples of 1/64, which add up exactly, and the rest
    UNROLL for (int half = 0; half < 2; ++half) {
      const int i = half * 32 + lane;
      const int in_do = O::DO == 1 ? next.here_x : next.here_y, in_keys = O::MASK == 2 ? next.here_x : next.here_y;
      const int in_more = O::EXTRA == 1 ? next.here_x : next.here_y;
      if (O::MASK) {
        const bool* const mask = (const bool*)a.mask + row * a.mask_b + (begin + next.t) * a.mask_n;
        of(SHOWN, 1)[i] = i < in_keys && mask[i * a.mask_n] ? 1 : 0;
      }
      if (O::DO && i < in_do) {
        const float den = a.den ? ((const float*)a.den)[line(next, i, O::DO == 1 ? a.N : a.M)] : 1;
        of(FACTOR, 1)[i] = (float)a.do_scale / (a.den && den <= (float)a.eps ? (float)a.eps : den);
      }
      if (O::EXTRA) {
        const float* const more = (const float*)a.extra + (row * a.H + h) * a.extra_n + begin + next.t;
        const float one = (O::EXTRA == 1 ? O::OUTPUT : ADDS) && i < in_more ? more[i] : 0.0f;
        of(MORE, 1)[i] = O::DO ? one * (float)a.do_scale : one;
      }
      if (O::ANGLES == 1)
        quick_cos_sin(turns[0] * (uint64_t)(next.t + i + 1), of(COSINE, 1) + i, of(SINE, 1) + i);
      if (O::DECAY == 1) {
        const int before = i + 1, after = i < next.here ? next.here - 1 - i : 0;
        const float of_before = lags[O::REVERSE ? -before : before];
        const float of_after = after ? lags[O::REVERSE ? -after : after] : 1.0f;
        of(NEAR, 1)[i] = O::REVERSE ? of_after : of_before;
        of(FAR, 1)[i] = O::REVERSE ? of_before : of_after;
      }
      if (O::DECAY == 2) {
        const float* const log_decay = (const float*)a.log_decay + row * a.g_b + (begin + next.t) * a.g_n + h * a.g_h;
        const float given = i < next.here ? log_decay[i * a.g_n] : 0.0f, one = given < -128 ? -128.0f : given;
        float high = floorf(one * 64 + 0.5f) * 0.015625f, low = one - high;
        UNROLL for (int reach = 1; reach < 32; reach *= 2) {
          const float more_high = __shfl_up_sync(~0u, high, reach), more_low = __shfl_up_sync(~0u, low, reach);
          if (lane >= reach) high += more_high, low += more_low;
        }
        of(HIGH, 1)[i] = high += highs, of(LOW, 1)[i] = low += lows;
        highs = __shfl_sync(~0u, high, 31), lows = __shfl_sync(~0u, low, 31);
      }
    }
    if (O::DECAY == 2) UNROLL for (int half = 0; half < 2; ++half) {
        const int i = half * 32 + lane;
        const float high = of(HIGH, 1)[i], low = of(LOW, 1)[i];
        const float before = exponential(high + low), after = exponential(fminf(highs - high + (lows - low), 0));
        of(NEAR, 1)[i] = O::REVERSE ? after : before;
        of(FAR, 1)[i] = O::REVERSE ? before : after;
      }
  }

  // The decay between two tokens of a block, 0 where i does not see j.
  __device__ __forceinline__ float between(int i, int j) const {
    if (O::DECAY != 2 || i == j) return lags[i - j];
    const float span = (of(HIGH)[i] - of(HIGH)[j]) + (of(LOW)[i] - of(LOW)[j]);
    return (O::REVERSE ? j > i : i > j) ? quick_exponential(fminf(O::REVERSE ? -span : span, 0)) : 0.0f;
  }

  // The state between shared memory and sums: rows 16 warp + group and 8 below of a chunk.
  __device__ __forceinline__ void pass_sums(bool store, float (&sums)[COLUMNS][4], int chunk) const {
    UNROLL for (int n = 0; n < COLUMNS; ++n)
      UNROLL for (int v = 0; v < 4; ++v) {
        const int f = chunk * C + 16 * warp + group + v / 2 * 8;
        float* const own = n == ONES ? z + f : state + f * BE + 8 * n + first + v % 2;
        const bool there = n < ONES || (O::NORMALIZE && first == 0 && v % 2 == 0);
        if (store && there) *own = sums[n][v];
        if (!store) sums[n][v] = there ? *own : 0.0f;
      }
  }

  // Sums that are not held, in places of this thread.
  __device__ __forceinline__ void move_sums(bool store, float (&sums)[COLUMNS][4], int chunk) const {
    const int groups = O::NORMALIZE ? COLUMNS : ONES;
    char* const own = shared_memory + P::of_sums(F, turned()) + (chunk * groups * P::THREADS + thread) * 16;
    UNROLL for (int n = 0; n < COLUMNS; ++n) {
      if (n >= groups) continue;
      Piece<float>& at = *(Piece<float>*)(own + n * P::THREADS * 16);
      UNROLL for (int v = 0; v < 4; ++v) {
        if (store) at.v[v] = sums[n][v];
        else sums[n][v] = at.v[v];
      }
    }
  }

  // The state, rounded, for everybody.
  __device__ __forceinline__ void lay(const float (&sums)[COLUMNS][4], int chunk) const {
    UNROLL for (int below = 0; below < 2; ++below) {
      char* const at = copy + (chunk * C + 16 * warp + Op::row_of(group) + 8 * below) * W_PITCH;
      UNROLL for (int n = 0; n < ONES; ++n)
        Op::lay(at + (8 * n + first) * Op::SIZE, sums[n][2 * below], sums[n][2 * below + 1]);
      if (O::NORMALIZE && first == 0) {
        const float sum = sums[ONES][2 * below], most = Op::what_stays(sum);
        Op::lay(at + BE * Op::SIZE, most, sum - most);
      }
    }
  }

  // sums += a b, of 16 rows and all columns; `at`: of a right operand with K rows.
  __device__ __forceinline__ void add_columns(
      float (&sums)[COLUMNS][4], const uint32_t (&left)[4], uint32_t at) const {
    UNROLL for (int n = 0; n < ONES; n += 2) {
      uint32_t right[4];
      Op::load_right(right, at + 8 * n * Op::SIZE, W_PITCH);
      Op::add(sums[n], left, right[0], right[1]);
      Op::add(sums[n + 1], left, right[2], right[3]);
    }
    if (O::NORMALIZE) {
      uint32_t right[2];
      Op::load_few(right, at + BE * Op::SIZE, W_PITCH);
      Op::add(sums[ONES], left, right[0], right[1]);
    }
  }

  // The state's part of out, and pairs, as far as a chunk's features go.
  __device__ __forceinline__ void read(float (&out)[COLUMNS][4], float (&pairs)[C / 8][4], int chunk) const {
    UNROLL for (int from = 0; from < STEPS; from += 4) {
      uint32_t x[4][4];
      UNROLL for (int k = 0; k < 4; ++k) load_4(x[k], x_at + 32 * (from + k));
      if (PAIRED) UNROLL for (int m = 0; m < C / 16; ++m) {
          if (O::REVERSE ? m < warp : m > warp) continue;  // none of these rows sees them
          UNROLL for (int k = 0; k < 4; ++k) {
            uint32_t y[4];
            load_4(y, y_at + 16 * m * PITCH + 32 * (from + k));
            Op::add(pairs[2 * m], x[k], y[0], y[1]);
            Op::add(pairs[2 * m + 1], x[k], y[2], y[3]);
          }
        }
      UNROLL for (int k = 0; k < 4; ++k)
        add_columns(out, x[k], copy_at + (chunk * C + (from + k) * Op::K) * W_PITCH);
    }
  }

  // The state goes on to the block's other end.
  __device__ __forceinline__ void add(float (&sums)[COLUMNS][4], const Span& span) const {
    if (O::DECAY) {
      const float whole = of(O::REVERSE ? FAR : NEAR)[span.here - 1];
      if (whole != 0) {
        UNROLL for (int n = 0; n < COLUMNS; ++n) UNROLL for (int v = 0; v < 4; ++v) sums[n][v] *= whole;
      } else {
        UNROLL for (int n = 0; n < COLUMNS; ++n) UNROLL for (int v = 0; v < 4; ++v) sums[n][v] = 0;
      }
    }
    UNROLL for (int k = 0; k < STEPS; ++k) {
      uint32_t y[4];
      Op::load_left(y, y_across + k * Op::K * PITCH + 16 * warp * Op::SIZE, PITCH);
      if (O::DECAY) Op::weigh(y, of(FAR) + k * Op::K, lane);
      add_columns(sums, y, w_at + k * Op::K * W_PITCH);
    }
  }

  __device__ __forceinline__ void ask(int done) const {
    const Span next = span(done);
    ask_xy(*this, next, 0);
    if (ADDS) ask_w(*this, next);
  }

  // One chunk of a step, whose sums of the state are `sums`.
  __device__ __forceinline__ void go_through(
      float (&sums)[COLUMNS][4], float (&out)[COLUMNS][4], float (&pairs)[C / 8][4], int chunk, int done, bool adds) {
    const Span now = span(done);
    __syncthreads();
    wait_for_copies();
    put_xy(*this, now, chunk);
    if (ADDS && chunk == 0) put_w(*this, now);
    if (O::OUTPUT && ADDS) lay(sums, chunk);
    if (chunk + 1 < chunks) {
      ask_xy(*this, now, chunk + 1);
    } else {
      ask(done + 1);
    }
    __syncthreads();
    if (O::OUTPUT) read(out, pairs, chunk);
    if (adds) add(sums, now);
  }

  // Read the state, go through the tokens block by block, write the state.
  __device__ __forceinline__ void run() {
    float held[O::HELD ? O::HELD : 1][COLUMNS][4];
    read_state(*this);
    __syncthreads();
    UNROLL for (int k = 0; k < O::HELD; ++k) pass_sums(false, held[k], k);
    if (!O::HELD)
      for (int k = 0; k < chunks; ++k) pass_sums(false, held[0], k), move_sums(true, held[0], k);
    __syncthreads();
    if (!ADDS) {  // it stays as it is
      UNROLL for (int k = 0; k < O::HELD; ++k) lay(held[k], k);
      if (!O::HELD)
        for (int k = 0; k < chunks; ++k) move_sums(false, held[0], k), lay(held[0], k);
    }
    const int keeper = O::REVERSE ? 3 : 0;  // the warp with the fewest pairs
    prepare();
    ask(0);
    __syncthreads();
    if (warp == keeper) know_tokens(span(0));
    for (int done = 0; done < steps; ++done) {
      const bool adds = ADDS && (done + 1 < steps || a.final || a.final_z);
      parity ^= 1;
      float out[COLUMNS][4] = {}, pairs[C / 8][4] = {};
      UNROLL for (int k = 0; k < O::HELD; ++k) go_through(held[k], out, pairs, k, done, adds);
      if (!O::HELD)
        for (int k = 0; k < chunks; ++k) {
          if (ADDS) move_sums(false, held[0], k);
          go_through(held[0], out, pairs, k, done, adds);
          if (adds) move_sums(true, held[0], k);
        }
      if (O::OUTPUT) finish(*this, out, pairs, span(done));
      if (warp == keeper) know_tokens(span(done + 1));
    }
    if (!ADDS) return;
    __syncthreads();
    UNROLL for (int k = 0; k < O::HELD; ++k) pass_sums(true, held[k], k);
    if (!O::HELD)
      for (int k = 0; k < chunks; ++k) move_sums(false, held[0], k), pass_sums(true, held[0], k);
    __syncthreads();
    write_state(*this);
  }
};

// Blocks for which shared memory and registers of a multiprocessor suffice, without spilling.
template <class O> __host__ __device__ constexpr int resident() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (O::HELD == 1 && Operand<typename O::T>::SIZE == 2 && O::ANGLES != 2 && !O::DO && !O::BORDERS) return 3;
#endif
  return 2;
}

template <class O> __global__ void __launch_bounds__(128, resident<O>()) tensor(Arguments a) {
  Block<O>(a).run();
}
