// The product of product.cu on Hopper's tensor cores, for bfloat16: out_i = scale sum_j (x_i . y_j) L_ij w_j,
// with L_ij = lambda^|i - j|, times cos((i - j) theta) with ANGLES.
//
// A block of threads holds 64 columns of w for each of its CONSUMERS, warpgroups that compute; a state is kept
// by them in registers, turned: [64 columns, D]. Another warpgroup works ahead of them, through a ring of
// stages in shared memory: one thread asks for tiles of x, y and w [C features], three warps (helpers) map
// features in place, form decays and angles of tokens, and keep the normaliser's sums.
//
// A step of C tokens, in a consumer, needs four products:
//     pairs = x y^T      out = x state      state = whole state + (far w)^T y      out = near out + (L pairs) w
// near: what lies between the state and a token, far between a token and the state that follows, whole between
// both states; with ANGLES there are two states, of cosines and of sines.
#define WITHOUT_NARROW_TYPES
#include "arguments.cuh"
#include "common.cuh"
#include "hopper.cuh"
#include "stages.cuh"

// A warpgroup with 64 columns.
template <class O> struct Consumer {
  typedef Places<O> P;
  Unit<O>& unit;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the compiler sees that it is a warp's
  const int t = threadIdx.x % 128, warp = __shfl_sync(~0u, t / 32, 0), lane = t % 32;
  const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);  // of sums: the first ones
  char* const own = shared + P::OWN + group * P::EACH;
  static constexpr bool MASKED = !O::NORMALIZE && !O::ANGLES;  // these need the registers
  float state[P::STATES][O::D / 2];
  uint32_t mask[16];  // of pairs, two a number: which of them are seen

  __device__ __forceinline__ explicit Consumer(Unit<O>& of) : unit(of) {}
  __device__ __forceinline__ void meet_group() { meet(2 + group, 128); }

  // What a step keeps of the state.
  __device__ __forceinline__ float whole(int step, float full, double g) const {
    const int here = unit.here(step);
    return !O::DECAY || here == P::C ? full : exponential((float)(g * here));
  }

  // L by j - i + 64, twice: pairs that begin with an even index, and with an odd one.
  __device__ __forceinline__ void form_lags(double g) {
    float* const lags = (float*)(own + P::LAGS);
    const int lag = O::REVERSE ? t - 64 : 64 - t;
    float value = 0;
    if (lag >= 0) {
      value = exponential((float)(g * lag)) * (P::SCALED ? 1.0f : (float)unit.a.scale);
      if (O::ANGLES) {
        float c, s;
        cos_sin(fraction(unit.a.angle) * (uint64_t)lag, &c, &s);
        value *= c;
      }
    }
    lags[t] = value;
    if (t) lags[127 + t] = value;
  }

  // In memory a state is [K V], with GRADIENT here [V K].
  __device__ __forceinline__ void pass_state(bool store, void* array) {
    const Arguments& a = unit.a;
    const int64_t half = (int64_t)O::D * a.E, unit_at = (unit.s * a.H + unit.h) * P::STATES * half;
    UNROLL for (int i = 0; i < O::D / 2; ++i) {
      const int64_t d = i / 4 * 8 + column + i % 2;
      const int64_t e = (unit.slice * O::CONSUMERS + group) * 64 + row + i % 4 / 2 * 8;
      const int64_t at = unit_at + (O::GRADIENT ? e * O::D + d : d * a.E + e);
      if (array) move_state<O>(a, store, (float*)array, at, half, state[0][i], state[P::STATES - 1][i]);
      else if (!store) state[0][i] = state[P::STATES - 1][i] = 0;
    }
  }

  // What this piece adds to the state, or what those before it have added.
  __device__ __forceinline__ float4* partial(int of) const {
    const int64_t part = ((unit.s * unit.a.H + unit.h) * unit.slices() + unit.slice) * O::CONSUMERS + group;
    return (float4*)unit.a.partial + (part * (unit.launch.pieces - 1) + of) * P::STATES * O::D * 16 + t;
  }
  __device__ __forceinline__ void add_pieces(double g) {
    for (int of = 0; of < unit.piece; ++of) {
      const float whole = unit.whole(unit.border(of + 1) - unit.border(of), g);
      UNROLL for (int part = 0; part < P::STATES; ++part)
        UNROLL for (int i = 0; i < O::D / 2; i += 4) {
          const float4 added = partial(of)[(part * O::D / 2 + i) * 32];
          float* const own = state[part] + i;
          own[0] = kept(own[0], whole) + added.x, own[1] = kept(own[1], whole) + added.y;
          own[2] = kept(own[2], whole) + added.z, own[3] = kept(own[3], whole) + added.w;
        }
    }
  }
  __device__ __forceinline__ void leave_piece() const {
    UNROLL for (int part = 0; part < P::STATES; ++part)
      UNROLL for (int i = 0; i < O::D / 2; i += 4) {
        const float* const own = state[part] + i;
        partial(unit.piece)[(part * O::D / 2 + i) * 32] = float4{own[0], own[1], own[2], own[3]};
      }
  }

  // The state, rounded, for x: [64 columns, D].
  __device__ __forceinline__ void lay_state() {
    UNROLL for (int part = 0; part < P::STATES; ++part)
      UNROLL for (int j = 0; j < O::D / 8; j += 2)
        lay(own + P::STATE + (part * P::TILES + j / 8) * TILE, j % 8, state[part] + 4 * j);
  }
  // Nothing is left of it, not even a NaN.
  __device__ __forceinline__ void forget_state() {
    UNROLL for (int part = 0; part < P::STATES; ++part)
      UNROLL for (int i = 0; i < O::D / 2; ++i) state[part][i] = 0;
    for (int i = t; i < P::STATES * P::TILES * TILE / 16; i += 128) ((uint4*)(own + P::STATE))[i] = uint4{0, 0, 0, 0};
    written_for_copies();
    meet_group();
  }
  // 16 columns of sums, from group j of 8 on, to a tile.
  __device__ __forceinline__ void lay(char* tile, int j, const float* x) {
    const int r = 16 * warp + lane / 8 % 2 * 8 + lane % 8, piece = j + lane / 16;
    store_pieces(
        place(tile) + r * 128 + (piece ^ r % 8) * 16, rounded_bf16(x[0], x[1]), rounded_bf16(x[2], x[3]), rounded_bf16(x[4], x[5]),
        rounded_bf16(x[6], x[7]));
  }

  // w^T, from shared memory, times far.
  __device__ __forceinline__ void turn_w(uint32_t (&w)[16], int part) {
    const uint32_t tile = place(unit.own() + P::W + group * TILE);
    UNROLL for (int k = 0; k < 4; ++k) {
      uint32_t x[4];
      const int r = 16 * k + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
      load_4_turned(x, tile + r * 128 + (piece ^ r % 8) * 16);
      UNROLL for (int v = 0; v < 4; ++v) {
        const float2 far = O::DECAY || O::ANGLES
            ? *(const float2*)(unit.table(2 * part + 1) + 16 * k + column + v / 2 * 8)
            : float2{1, 1};
        w[4 * k + v] = O::DECAY || O::ANGLES ? rounded_bf16(low_of(x[v]) * far.x, high_of(x[v]) * far.y) : x[v];
      }
    }
  }

  // Pairs times L, rounded as an operand; what a token does not see is 0 whatever it was. Nothing branches here:
  // products are under way.
  __device__ __forceinline__ void weigh(uint32_t (&p)[16], float (&pairs)[32], float (&weights)[2]) {
    const float* const at = (const float*)(own + P::LAGS) + (row % 2 ? 127 : 64) + column - row + row % 2 * 64;
    UNROLL for (int j = 0; j < 8; ++j)
      UNROLL for (int below = 0; below < 2; ++below) {
        float left = pairs[4 * j + 2 * below], right = pairs[4 * j + 2 * below + 1];
        if (!MASKED || O::DECAY) {
          const float2 lag = *(const float2*)(at + 8 * j - 8 * below);  // of an even place, in its copy
          left = MASKED ? left * lag.x : kept(left, lag.x);
          right = MASKED ? right * lag.y : kept(right, lag.y);
        }
        if (O::NORMALIZE) weights[below] += left + right;
        p[2 * j + below] = rounded_bf16(left, right);
        if (MASKED) p[2 * j + below] &= mask[2 * j + below];
      }
  }

  __device__ __forceinline__ void keep_of_state(float whole) {
    if (O::DECAY)
      UNROLL for (int part = 0; part < P::STATES; ++part)
        UNROLL for (int i = 0; i < O::D / 2; ++i) state[part][i] *= whole;
  }
  // w is that of the first state; `other` has room for that of the second.
  __device__ __forceinline__ void add_to_state(uint32_t (&w)[16], uint32_t (&other)[16]) {
    const uint32_t y = place(unit.own() + P::Y);
    UNROLL for (int part = 0; part < P::STATES; ++part) {
      if (part) turn_w(other, part);
      hold(state[part]);
      products_begin();
      UNROLL for (int k = 0; k < 4; ++k)
        product<true>(state[part], (part ? other : w) + 4 * k, across_rows(y + 2048 * k, TILE), true);
    }
    products_end();
  }

  __device__ __forceinline__ void await() {
    wait(unit.full + unit.stage, unit.phase);
    if (P::HELPED) wait(unit.ready + unit.stage, unit.phase);
  }

  // Only the state.
  __device__ __forceinline__ void step_lightly(float whole) {
    uint32_t w[16], other[16];
    await();
    turn_w(w, 0);
    keep_of_state(whole);
    add_to_state(w, other);
    all_but<0>();
    hold(w);
    if (O::ANGLES) hold(other);
    UNROLL for (int part = 0; part < P::STATES; ++part) hold(state[part]);
    arrive(unit.empty + unit.stage);
  }

  __device__ __forceinline__ void step_wholly(int step, float whole_after) {
    float pairs[32], out[P::STATES][32], of_z[4], weights[2] = {};
    uint32_t w[16], other[16], p[16];
    const uint32_t x = place(unit.own() + P::X), y = place(unit.own() + P::Y), z = place(unit.own() + P::Z);
    turn_w(w, 0);
    if (O::CONSUMERS == 2) meet(4 + group, 256);
    products_begin();
    UNROLL for (int k = 0; k < O::D / 16; ++k) {
      const int at = k / 4 * TILE + k % 4 * 32;
      product<false>(pairs, along_rows(x + at), along_rows(y + at), k > 0);
    }
    products_end();
    UNROLL for (int part = 0; part < P::STATES; ++part)
      UNROLL for (int k = 0; k < O::D / 16; ++k) {
        const int at = k / 4 * TILE + k % 4 * 32;
        product<false>(out[part], along_rows(x + at), along_rows(place(own + P::STATE) + part * P::TILES * TILE + at), k > 0);
      }
    if (O::NORMALIZE) UNROLL for (int k = 0; k < O::D / 16; ++k)
        product<false>(of_z, along_rows(x + k / 4 * TILE + k % 4 * 32), along_rows(z + k / 4 * 1024 + k % 4 * 32), k > 0);
    products_end();
    add_to_state(w, other);
    if (O::CONSUMERS == 2) let_in(5 - group, 256);
    all_but<2>();
    hold(pairs);
    weigh(p, pairs, weights);
    all_but<1>();
    UNROLL for (int part = 0; part < P::STATES; ++part) hold(out[part]);
    if (O::NORMALIZE) hold(of_z);
    UNROLL for (int below = 0; below < 2; ++below) {
      const int i = row + 8 * below;
      const float near = O::DECAY || O::ANGLES ? unit.table(0)[i] : 1.0f;
      const float other = O::ANGLES ? unit.table(2)[i] : 0.0f;
      UNROLL for (int j = 0; j < 8; ++j)
        UNROLL for (int v = 0; v < 2; ++v) {
          float& sum = out[0][4 * j + 2 * below + v];
          if (O::DECAY || O::ANGLES) sum *= near;
          if (O::ANGLES) sum += out[P::STATES - 1][4 * j + 2 * below + v] * other;
        }
      if (O::NORMALIZE) {
        const float share = column == 0 ? near : column == 2 && O::ANGLES ? other : 0.0f;
        weights[below] += (of_z[2 * below] + of_z[2 * below + 1]) * share;
      }
    }
    hold(out[0]);
    products_begin();
    UNROLL for (int k = 0; k < 4; ++k)
      product<true>(out[0], p + 4 * k, across_rows(place(unit.own() + P::W + group * TILE) + 2048 * k, TILE), true);
    products_end();
    if (t == 0) stores_have_read();
    meet_group();  // everybody has read the state, and the copy what was to be written
    all_but<1>();
    hold(w);
    if (O::ANGLES) hold(other);
    UNROLL for (int part = 0; part < P::STATES; ++part) hold(state[part]);
    lay_state();
    keep_of_state(whole_after);
    all_but<0>();
    hold(p);
    hold(out[0]);
    if (P::READS_RAW) take_slope(step, out[0]);
    arrive(unit.empty + unit.stage);
    write(step, out[0], weights);
  }

  // From the gradient of phi(raw) to that of raw; what both come to together, row by row.
  __device__ __forceinline__ void take_slope(int step, float (&out)[32]) {
    const Arguments& a = unit.a;
    const char* const raw = unit.own() + P::RAW + group * TILE;
    float by = P::SCALED ? (float)a.scale : 1.0f;
    UNROLL for (int below = 0; below < 2; ++below) {
      const int r = row + 8 * below;
      float sum = 0;
      UNROLL for (int j = 0; j < 8; ++j) {
        const uint32_t both = *(const uint32_t*)(raw + r * 128 + (j ^ r % 8) * 16 + 2 * column);
        float &left = out[4 * j + 2 * below], &right = out[4 * j + 2 * below + 1];
        if (O::ROWS) sum += quick_phi(O::FEATURE, low_of(both)) * left + quick_phi(O::FEATURE, high_of(both)) * right;
        if (O::FEATURE) left *= quick_slope(O::FEATURE, low_of(both)), right *= quick_slope(O::FEATURE, high_of(both));
      }
      if (!O::ROWS) continue;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int64_t i = unit.token(step) + r, columns = unit.slice * O::CONSUMERS + group;
      if (column == 0 && i < a.N) ((float*)a.rows)[((columns * a.B + unit.s) * a.N + i) * a.H + unit.h] = sum * by;
    }
  }

  __device__ __forceinline__ void write(int step, float (&out)[32], float (&weights)[2]) {
    const Arguments& a = unit.a;
    const int from = unit.token(step);
    float by[2] = {(float)a.scale, (float)a.scale};
    if (O::NORMALIZE) UNROLL for (int below = 0; below < 2; ++below) {
        float sum = weights[below];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        sum *= (float)a.scale;
        const int64_t i = from + row + 8 * below;
        if (a.rows && column == 0 && unit.slice == 0 && group == 0 && i < a.N)
          ((float*)a.rows)[(unit.s * a.N + i) * a.H + unit.h] = sum;
        by[below] /= sum <= (float)a.eps ? (float)a.eps : sum;
      }
    if (P::SCALED) UNROLL for (int i = 0; i < 32; ++i) out[i] *= by[i % 4 / 2];
    UNROLL for (int j = 0; j < 8; j += 2) lay(own + P::OUT, j, out + 4 * j);
    written_for_copies();
    meet_group();
    if (t == 0)
      store_tile(
          &unit.launch.out, own + P::OUT, 64 * (unit.slice * O::CONSUMERS + group), unit.h, from, unit.s);
  }

  __device__ __forceinline__ void run() {
    if (O::CONSUMERS == 2 && group == 1) let_in(4, 256);
    UNROLL for (int i = 0; i < 16; ++i) {
      const int seen = O::REVERSE ? 8 * (i / 2) + column - row - i % 2 * 8 : row + i % 2 * 8 - 8 * (i / 2) - column;
      mask[i] = (seen >= 0 ? 0x0000ffffu : 0u) | (seen >= (O::REVERSE ? -1 : 1) ? 0xffff0000u : 0u);
    }
    for (int64_t i = blockIdx.x; i < unit.count(); i += gridDim.x) {
      unit.enter(i);
      const double g = unit.log_decay();
      const float full = O::DECAY ? exponential((float)(g * P::C)) : 1.0f;
      const bool mute = O::DECAY && exponential((float)g) == 0;
      meet_group();
      form_lags(g);
      pass_state(false, unit.piece ? nullptr : unit.a.start);
      if (!O::OUTPUT) {
        for (int step = unit.first; step < unit.last; ++step, unit.next()) step_lightly(whole(step, full, g));
        leave_piece();
        continue;
      }
      if (unit.piece) add_pieces(g);
      lay_state();
      written_for_copies();
      meet_group();
      keep_of_state(whole(unit.first, full, g));
      for (int step = unit.first; step < unit.last; ++step, unit.next()) {
        if (O::DECAY && mute && (step > 0 || !O::REVERSE)) forget_state();  // a last token hears of what comes after
        await();
        step_wholly(step, step + 1 < unit.last ? whole(step + 1, full, g) : 1.0f);
      }
      if (O::DECAY && mute && O::REVERSE) forget_state();
      if (unit.last == unit.steps && unit.a.final) pass_state(true, unit.a.final);
    }
    if (t == 0) stores_are_over();
  }
};

template <class O> __global__ void __launch_bounds__(128 * (1 + O::CONSUMERS), 1)
hopper(const __grid_constant__ Launch launch) {
  typedef Places<O> P;
  Unit<O> unit(launch);
  if (threadIdx.x == 0) {
    for (int i = 0; i < O::STAGES; ++i) {
      barrier_begin(unit.full + i, 1);
      barrier_begin(unit.ready + i, HELPERS);
      barrier_begin(unit.empty + i, 128 * O::CONSUMERS);
    }
    barriers_are_seen();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<O::CONSUMERS == 1 ? 232 : O::NORMALIZE ? 72 : 56>();
    if (threadIdx.x == 0) produce(unit);
    else if (threadIdx.x >= 32 && P::HELPED) Helper<O>(unit).run();
  } else {
    take_registers<O::CONSUMERS == 1 ? 248 : O::NORMALIZE ? 216 : 224>();
    Consumer<O>(unit).run();
  }
}
