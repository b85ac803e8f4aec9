// The work ahead of the consumers of hopper.cu: where things lie in shared memory, one thread that asks for
// tiles, and the warps that make of them what consumers multiply.
#pragma once

template <
    int D_, int CONSUMERS_, int STAGES_, int FEATURE_, int ANGLES_, int DECAY_, int REVERSE_, int NORMALIZE_,
    int GRADIENT_, int ROWS_, int OUTPUT_>
struct Tiled {
  static constexpr int D = D_;                  // contracted features: 64 or 128; 64 with ANGLES
  static constexpr int CONSUMERS = CONSUMERS_;  // 1 or 2
  static constexpr int STAGES = STAGES_;
  static constexpr int FEATURE = FEATURE_;      // of x and y, of w with GRADIENT
  static constexpr int ANGLES = ANGLES_;        // one angle for all
  static constexpr int DECAY = DECAY_;          // per head
  static constexpr int REVERSE = REVERSE_;      // j >= i instead of j <= i
  static constexpr int NORMALIZE = NORMALIZE_;  // divided by the sum of weights
  static constexpr int GRADIENT = GRADIENT_;    // of w's features: times phi'(raw); the state lies the other way
  static constexpr int ROWS = ROWS_;            // keeps phi(raw) . gradient
  static constexpr int OUTPUT = OUTPUT_;        // 0: only what pieces of sequences add to the state
};

// What a launch is told. Where heads are few a sequence is cut into `pieces`, of which each is a block's own: a
// launch without OUTPUT leaves what every one but the last adds to the state, the next one begins with their sum.
// partial: float [S H columns / 64, pieces - 1, state]; partial_den: [S H, pieces - 1, sums]; as threads hold them.
struct Launch {
  Map x, y, w, raw, out;
  Arguments a;
  int64_t pieces;
};

constexpr int TILE = 64 * 128, HELPERS = 96;

// Where things lie in shared memory, in bytes.
template <class O> struct Places {
  static constexpr int C = 64, TILES = O::D / 64, STATES = O::ANGLES ? 2 : 1;
  static constexpr int X = 0, Y = TILES * TILE, W = 2 * TILES * TILE;           // of a stage
  static constexpr bool READS_RAW = O::OUTPUT && O::GRADIENT && (O::FEATURE || O::ROWS);
  static constexpr int RAW = W + O::CONSUMERS * TILE;
  static constexpr int Z = RAW + (READS_RAW ? O::CONSUMERS * TILE : 0);         // [8 D]: sums, as an operand
  static constexpr int TABLES = Z + (O::NORMALIZE ? TILES * 1024 : 0);          // near and far, of each state
  static constexpr int STAGE = TABLES + (O::DECAY || O::ANGLES ? 2 * STATES * 4 * C : 0) + 1023 & ~1023;
  static constexpr int OWN = O::STAGES * STAGE;                                 // of a consumer: states, out, L
  static constexpr int STATE = 0, OUT = STATES * TILES * TILE, LAGS = OUT + TILE, EACH = LAGS + 1024;
  static constexpr int BARRIERS = OWN + O::CONSUMERS * EACH, BYTES = BARRIERS + 24 * O::STAGES;
  static constexpr bool SCALED = O::NORMALIZE || !(O::DECAY || O::ANGLES);  // results, not near and L
  static constexpr bool HELPED = O::FEATURE || O::NORMALIZE || O::DECAY || O::ANGLES;
};

extern __shared__ __align__(1024) char shared[];

// One unit of work: some columns of w of one head, of one piece of one sequence; and where its tiles are.
template <class O> struct Unit : Places<O> {
  typedef Places<O> P;
  const Launch& launch;
  const Arguments& a;
  uint64_t* const full = (uint64_t*)(shared + P::BARRIERS);
  uint64_t* const ready = full + O::STAGES;
  uint64_t* const empty = ready + O::STAGES;
  int slice, piece, h, s, steps, first, last;
  int stage = 0, phase = 0;

  __device__ __forceinline__ explicit Unit(const Launch& from) : launch(from), a(from.a) {}

  __device__ __forceinline__ int slices() const { return (int)a.E / (64 * O::CONSUMERS); }
  __device__ __forceinline__ int64_t chosen() const { return launch.pieces - (O::OUTPUT ? 0 : 1); }
  __device__ __forceinline__ int64_t count() const { return a.B * a.H * chosen() * slices(); }
  __device__ __forceinline__ int border(int64_t of) const { return (int)(steps * of / launch.pieces); }
  __device__ __forceinline__ void enter(int64_t unit) {
    slice = unit % slices(), unit /= slices();
    piece = unit % chosen(), unit /= chosen();
    h = unit % a.H, s = unit / a.H;
    steps = (int)((a.N + P::C - 1) / P::C);
    first = border(piece), last = border(piece + 1);
  }
  __device__ __forceinline__ int token(int step) const { return (O::REVERSE ? steps - 1 - step : step) * P::C; }
  __device__ __forceinline__ int here(int step) const {
    return a.N - token(step) < P::C ? (int)a.N - token(step) : P::C;
  }
  __device__ __forceinline__ char* own() const { return shared + stage * P::STAGE; }
  __device__ __forceinline__ float* table(int which) const {  // near and far of the first state, of the second
    return (float*)(own() + P::TABLES) + which * P::C;
  }
  __device__ __forceinline__ void next() {
    if (++stage == O::STAGES) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ float whole(int of_steps, double g) const {
    return O::DECAY ? exponential((float)(g * P::C * of_steps)) : 1.0f;
  }
  __device__ __forceinline__ double log_decay() const {
    return O::DECAY ? summable(((const float*)a.log_decay)[h * a.g_h]) : 0;
  }
};

// A number of a state, or both its parts, between memory and registers: as `pass` of state.cuh.
template <class O>
__device__ __forceinline__ void move_state(
    const Arguments& a, bool store, float* array, int64_t at, int64_t half, float& cosines, float& sines) {
  if (!O::ANGLES) {
    if (store) array[at] = cosines;
    else cosines = array[at];
    return;
  }
  const double c0 = store ? cosines : array[at], s0 = store ? sines : array[at + half];
  double c = 1, s = 0;
  if (store != (bool)O::REVERSE) cos_sin(fraction(a.angle) * (uint64_t)a.N, &c, &s);
  const float turned = (float)(c * c0 + s * s0), other = (float)(s * c0 - c * s0);
  if (store) array[at] = turned, array[at + half] = other;
  else cosines = turned, sines = other;
}

// The thread that asks for tiles.
template <class O> __device__ __forceinline__ void produce(Unit<O>& unit) {
  typedef Places<O> P;
  const Launch& launch = unit.launch;
  for (int64_t i = blockIdx.x; i < unit.count(); i += gridDim.x) {
    unit.enter(i);
    for (int step = unit.first; step < unit.last; ++step, unit.next()) {
      wait(unit.empty + unit.stage, unit.phase ^ 1);
      uint64_t* const full = unit.full + unit.stage;
      arrive_expecting(full, TILE * ((O::OUTPUT ? 2 : 1) * P::TILES + (P::READS_RAW ? 2 : 1) * O::CONSUMERS));
      char* const own = unit.own();
      for (int t = 0; t < P::TILES; ++t) {
        load_tile(own + P::Y + t * TILE, &launch.y, full, 64 * t, unit.h, unit.token(step), unit.s);
        if (O::OUTPUT) load_tile(own + P::X + t * TILE, &launch.x, full, 64 * t, unit.h, unit.token(step), unit.s);
      }
      for (int c = 0; c < O::CONSUMERS; ++c) {
        const int from = 64 * (unit.slice * O::CONSUMERS + c);
        load_tile(own + P::W + c * TILE, &launch.w, full, from, unit.h, unit.token(step), unit.s);
        if (P::READS_RAW)
          load_tile(own + P::RAW + c * TILE, &launch.raw, full, from, unit.h, unit.token(step), unit.s);
      }
    }
  }
}

// The warps between: features, tables, and the normaliser's sums of weights. Two of them hold those, each of
// half of the features, as a product with few rows: of cosines, of what these were rounded by, of sines likewise.
template <class O> struct Helper {
  typedef Places<O> P;
  static constexpr int GROUPS = O::D / 16;  // of 8 features, a warp's
  Unit<O>& unit;
  const int m = threadIdx.x - 32, lane = m % 32, row = lane / 4;
  float z[GROUPS][2];  // of features 2 (lane % 4) and the next

  __device__ __forceinline__ explicit Helper(Unit<O>& of) : unit(of) {}
  __device__ __forceinline__ bool sums() const { return O::NORMALIZE && m < 64; }
  __device__ __forceinline__ int piece(int group) const { return m / 32 * GROUPS + group; }  // 16 bytes of a row

  __device__ __forceinline__ void map_tiles(int from, int tiles) {
    uint4* const at = (uint4*)(unit.own() + from);
    // Pieces of a thread: one's exponentials while the other's are under way, as far as there are registers.
    constexpr int TOGETHER = O::NORMALIZE && O::CONSUMERS == 2 ? 1 : 2;
    for (int first = m; first < tiles * TILE / 16; first += TOGETHER * HELPERS) {
      uint4 x[TOGETHER];
      UNROLL for (int u = 0; u < TOGETHER; ++u)
        if (first + u * HELPERS < tiles * TILE / 16) x[u] = at[first + u * HELPERS];
      UNROLL for (int v = 0; v < 4 * TOGETHER; ++v) {
        uint32_t& both = ((uint32_t*)x)[v];
        both = O::FEATURE == RELU
            ? relu_of_both(both)
            : rounded_bf16(quick_phi(O::FEATURE, low_of(both)), quick_phi(O::FEATURE, high_of(both)));
      }
      UNROLL for (int u = 0; u < TOGETHER; ++u)
        if (first + u * HELPERS < tiles * TILE / 16) at[first + u * HELPERS] = x[u];
    }
  }

  __device__ __forceinline__ void form_tables(int step, double g) {
    const int here = unit.here(step);
    for (int i = m; i < P::C; i += HELPERS) {
      const int before = i + 1, after = i < here ? here - 1 - i : 0;
      const float by = P::SCALED ? 1.0f : (float)unit.a.scale;
      const float near = exponential((float)(g * (O::REVERSE ? after : before))) * by;
      const float far = i < here ? exponential((float)(g * (O::REVERSE ? before : after))) : 0.0f;
      float c = 1, s = 0;
      if (O::ANGLES) cos_sin(fraction(unit.a.angle) * (uint64_t)(unit.token(step) + i + 1), &c, &s);
      unit.table(0)[i] = near * c, unit.table(1)[i] = far * c;
      if (O::ANGLES) unit.table(2)[i] = near * s, unit.table(3)[i] = far * s;
    }
  }

  // Sums so far as rows of an operand, in two bfloat16 each; then those of this step join them.
  __device__ __forceinline__ void keep_sums(int step, double g) {
    char* const tiles = unit.own() + P::Z;
    const int here = unit.here(step);
    const float whole = O::DECAY ? exponential((float)(g * here)) : 1.0f;
    UNROLL for (int n = 0; n < GROUPS; ++n) {
      const float left = z[n][0] + __shfl_xor_sync(~0u, z[n][0], 4), right = z[n][1] + __shfl_xor_sync(~0u, z[n][1], 4);
      const uint32_t high = rounded_bf16(left, right), rest = rounded_bf16(left - low_of(high), right - high_of(high));
      char* const at = tiles + piece(n) / 8 * 1024 + row * 128 + (piece(n) % 8 ^ row) * 16 + lane % 4 * 4;
      if (row < 2 * P::STATES) *(uint32_t*)at = row % 2 ? rest : high;
      z[n][0] = kept(z[n][0], whole), z[n][1] = kept(z[n][1], whole);
    }
    UNROLL for (int k = 0; k < 4; ++k) {
      uint32_t far[2];
      UNROLL for (int v = 0; v < 2; ++v) {
        const int j = 16 * k + 8 * v + lane % 4 * 2;
        float2 x = {0, 0};
        if (row < 2 * P::STATES) {
          if (O::DECAY || O::ANGLES) x = *(const float2*)(unit.table(row / 2 * 2 + 1) + j);
          else x = {j < here ? 1.0f : 0.0f, j + 1 < here ? 1.0f : 0.0f};
        }
        far[v] = rounded_bf16(x.x, x.y);
        if (row % 2) far[v] = rounded_bf16(x.x - low_of(far[v]), x.y - high_of(far[v]));
      }
      UNROLL for (int n = 0; n < GROUPS; n += 2) {
        uint32_t y[4];
        const int r = 16 * k + lane / 8 % 2 * 8 + lane % 8, at = piece(n) + lane / 16;
        load_4_turned(y, place(unit.own() + P::Y) + at / 8 * TILE + r * 128 + (at % 8 ^ r % 8) * 16);
        add_rows(z[n], far, y[0], y[1]);
        add_rows(z[n + 1], far, y[2], y[3]);
      }
    }
  }

  __device__ __forceinline__ void pass_sums(bool store, void* array) {
    if (!sums() || !array) return;
    UNROLL for (int n = 0; n < GROUPS; ++n)
      UNROLL for (int v = 0; v < 2; ++v) {
        float cosines = z[n][v] + __shfl_xor_sync(~0u, z[n][v], 4), sines = __shfl_xor_sync(~0u, cosines, 8);
        const int64_t at = (unit.s * unit.a.H + unit.h) * P::STATES * O::D + 8 * piece(n) + lane % 4 * 2 + v;
        if (!store || row == 0) move_state<O>(unit.a, store, (float*)array, at, O::D, cosines, sines);
        if (!store) z[n][v] = row == 0 ? cosines : row == 2 && O::ANGLES ? sines : 0;
      }
  }

  // What this piece adds, or what those before it have added.
  __device__ __forceinline__ float* partial(int of) const {
    return (float*)unit.a.partial_den + ((unit.s * unit.a.H + unit.h) * (unit.launch.pieces - 1) + of) * GROUPS * 128;
  }
  __device__ __forceinline__ void add_pieces(double g) {
    for (int of = 0; of < unit.piece; ++of) {
      const float whole = unit.whole(unit.border(of + 1) - unit.border(of), g);
      UNROLL for (int n = 0; n < GROUPS; ++n)
        UNROLL for (int v = 0; v < 2; ++v) z[n][v] = kept(z[n][v], whole) + partial(of)[(2 * n + v) * 64 + m];
    }
  }
  __device__ __forceinline__ void leave_piece() const {
    UNROLL for (int n = 0; n < GROUPS; ++n)
      UNROLL for (int v = 0; v < 2; ++v) partial(unit.piece)[(2 * n + v) * 64 + m] = z[n][v];
  }

  __device__ __forceinline__ void run() {
    if (O::NORMALIZE)  // rows of no sums are 0
      for (int i = m; i < O::STAGES * P::TILES * 256; i += HELPERS)
        ((uint32_t*)(shared + i / (P::TILES * 256) * P::STAGE + P::Z))[i % (P::TILES * 256)] = 0;
    for (int64_t i = blockIdx.x; i < unit.count(); i += gridDim.x) {
      unit.enter(i);
      const double g = unit.log_decay();
      UNROLL for (int n = 0; n < GROUPS; ++n) z[n][0] = z[n][1] = 0;
      if (unit.piece == 0) pass_sums(false, unit.a.start_z);
      else if (O::OUTPUT && sums()) add_pieces(g);
      for (int step = unit.first; step < unit.last; ++step, unit.next()) {
        wait(unit.empty + unit.stage, unit.phase ^ 1);  // nobody reads the last tables
        wait(unit.full + unit.stage, unit.phase);
        if (O::FEATURE && O::GRADIENT) {
          map_tiles(P::W, O::CONSUMERS);
        } else if (O::FEATURE) {
          if (O::OUTPUT) map_tiles(P::X, P::TILES);
          map_tiles(P::Y, P::TILES);
        }
        if (O::DECAY || O::ANGLES) form_tables(step, g);
        if (O::NORMALIZE) meet(1, HELPERS);
        if (sums()) keep_sums(step, g);
        written_for_copies();
        arrive(unit.ready + unit.stage);
      }
      if (unit.slice != 0) continue;
      if (!O::OUTPUT && sums()) leave_piece();
      if (unit.last == unit.steps) pass_sums(true, unit.a.final_z);
    }
  }
};
