// One text's token through all layers of a decoder, in one kernel that stays on the device.
//
//     q, k, v, u = r W x             S <- decay S + phi(k) v^T, turned by angles if there are any      o = phi(q)^T S
//     x += out (u r o)               x += l3 (r l1 x)(r l2 x)                     r = 1 / sqrt(mean of squares + eps)
//
// Weights are all that has to be moved. They come in one stream, through shared memory into registers, and a block asks
// for them as soon as it has room, whatever layer it works on. What is left are five times a layer at which blocks need
// what others computed: close to a microsecond each, for words to get to L2 and from there. All that a block then reads
// are a few kilobytes, as what waits for words asks for them again and again.
//
// 128 blocks, 16 a head, each on a multiprocessor of its own. A block has 8 rows of q, k, v and u of its head, and the
// 8 rows of the head's state that belong to them, which give its share of o. Of the 16 shares it adds up 8 columns.
// Everything else is cut by outputs: 8 rows of `out` and of l3 are a block's, and a 128th of l1 and l2. Eight warps
// share the numbers of a row among themselves, and a ninth asks for weights.
#include "persistent.cuh"

constexpr int WIDTH = 1024, HEADS = 8, D = 128, BLOCKS = 128;
constexpr int WARPS = 8, READERS = 32 * WARPS, THREADS = READERS + 128, SLOTS = 12, IN_FLIGHT = 3, MOST = 40;

struct Layer {
  void *qkvu, *out, *l1, *l2, *l3;
  void *kv, *log_decay, *theta, *length;
  double eps, gate_eps;
};
struct Token {
  void *x, *y, *exchange;
  void *head, *logits;
  int64_t layers, outputs, nothing;
  double eps;
};
struct Call {
  Token token;
  Layer layer[MOST];
};

// In memory that began as 0, and is for one stream and one INNER: of words that not every use writes, the last bit
// would say nothing.
template <int INNER> struct Exchange {
  unsigned uses, gap[31];      // how many layers have used it
  float rows[WIDTH];           // what l3 adds to x
  float shares[HEADS][16][D];  // of o, without this token
  float v[HEADS][D];
  float qk[HEADS][16];     // this token's part of o are their sum times v
  float gated[WIDTH];      // u o
  float squares[BLOCKS];   // of o
  float mixed[WIDTH];      // what `out` adds to x
  float inner[INNER];
};

struct Shared {
  float state[16][D];                // of the next layer; from 8 on the part that angles need
  float4 sums[2][64][2];             // of rows, by warps
  float4 squares[2][2];
  uint32_t parts[WARPS][PARTS / 2];  // twice
  Twice<float> decay[MOST], cosines[8], sines[8];  // the latter of the next layer
  Layer layer[MOST];
  Ring<SLOTS> ring;
};

// A row's sum over the warps.
__device__ __forceinline__ float total(const float4 (&x)[2]) { return sum_of(x[0]) + sum_of(x[1]); }
__device__ __forceinline__ void put(float4 (&x)[2], int warp, float sum) { ((float*)x)[warp] = sum; }
__device__ __forceinline__ void put_row(float4 (&x)[2], int warp, int lane, const float (&sums)[4]) {
  const float row = row_of(sums, lane);
  if (lane % 4 == 0) put(x, warp, row);
}
__device__ __forceinline__ float factor(const float4 (&squares)[2], double eps) {
  return rsqrtf(total(squares) / WIDTH + (float)eps);
}

template <int INNER> struct Sizes {
  static constexpr int OWN = INNER / BLOCKS, TILES = (OWN + 7) / 8;                         // rows of l1, and 8 of them
  static constexpr int CHUNKS = (INNER + 1023) / 1024, LAST = INNER - 1024 * (CHUNKS - 1);  // of l3's rows
  static_assert(INNER % 256 == 0 && OWN <= 24, "what registers hold");
};

struct Outputs {  // of the head, that are a block's; none without a head
  int begin, end;

  __device__ __forceinline__ Outputs(const Token& token, int c) {
    const int all = token.head ? (int)token.outputs : 0, each = (all + BLOCKS - 1) / BLOCKS;
    begin = c * each < all ? c * each : all, end = begin + each < all ? begin + each : all;
  }
};

template <int INNER>
__device__ __forceinline__ void ask_for_weights(const Token& token, Shared& s, const void* stages) {
  typedef Sizes<INNER> S;
  typedef const Weight* Rows;
  const int c = blockIdx.x;
  Source<SLOTS, IN_FLIGHT> source(s.ring, stages);
  for (int l = 0; l < (int)token.layers; ++l) {
    const Layer& a = s.layer[l];
    ONCE for (int i = 0; i < 4; ++i) source.ask((Rows)a.qkvu + (i * WIDTH + c * 8) * WIDTH, 8, WIDTH, WIDTH);
    source.ask((Rows)a.out + c * 8 * WIDTH, 8, WIDTH, WIDTH);
    ONCE for (int i = 0; i < 2 * S::TILES; ++i) {
      const int rows = S::OWN - i / 2 * 8;
      source.ask((Rows)(i % 2 ? a.l2 : a.l1) + (c * S::OWN + i / 2 * 8) * WIDTH, rows < 8 ? rows : 8, WIDTH, WIDTH);
    }
    ONCE for (int i = 0; i < S::CHUNKS; ++i)
      source.ask((Rows)a.l3 + c * 8 * INNER + i * 1024, 8, i + 1 < S::CHUNKS ? 1024 : S::LAST, INNER);
  }
  const Outputs own(token, c);
  for (int row = own.begin; row < own.end; row += 8)
    source.ask((Rows)token.head + (int64_t)row * WIDTH, own.end - row < 8 ? own.end - row : 8, WIDTH, WIDTH);
}

// The next layer's state is on its way to shared memory.
__device__ __forceinline__ void ask_for_state(const Layer& a, Shared& s, int head, int slot) {
  const float* from = (const float*)a.kv + (head * (a.theta ? 2 * D : D) + slot * 8) * D + threadIdx.x * 4;
  const uint32_t to = place(s.state) + threadIdx.x * 16;
  copy_late(to, from);
  if (a.theta) copy_late(to + 8 * D * 4, from + D * D);
}
__device__ __forceinline__ double decay_of(const Layer& a, int head) {
  return a.log_decay ? exp((double)((const float*)a.log_decay)[head]) : 1.0;
}
// Its angles, by a warp.
__device__ __forceinline__ void find_angles(const Layer& a, Shared& s, int head, int slot, int lane) {
  if (!a.theta || lane >= 8) return;
  const double decay = decay_of(a, head);
  double cosine, sine;
  cos_sin(fraction((double)((const float*)a.theta)[head * D + slot * 8 + lane]), &cosine, &sine);
  s.cosines[lane] = Twice<float>(cosine * decay), s.sines[lane] = Twice<float>(sine * decay);
}

// A block's rows of the state, a column a thread.
struct Rows {
  float now[8], sine[8], k[8];

  // A token later, but for what this one adds.
  __device__ __forceinline__ void advance(const Shared& s, const Twice<float>& decay, bool turned, int column) {
    const bool forgets = decay.high == 0;  // whatever was there, NaN too
    UNROLL for (int i = 0; i < 8; ++i) {
      const float old = forgets ? 0 : s.state[i][column];
      if (turned) {
        const float other = forgets ? 0 : s.state[8 + i][column];
        now[i] = times(old, s.cosines[i], times(-other, s.sines[i], 0.0f));
        sine[i] = times(old, s.sines[i], times(other, s.cosines[i], 0.0f));
      } else {
        now[i] = times(old, decay, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void store(float* to, bool turned, float v) const {
    UNROLL for (int i = 0; i < 8; ++i) to[i * D] = fmaf(k[i], v, now[i]);
    if (turned) UNROLL for (int i = 0; i < 8; ++i) to[(D + i) * D] = sine[i];
  }
};

// 8 columns of o: the shares of 16 blocks, and this token's part; a warp whose lanes from 16 on have v, from 24 on u.
template <class E>
__device__ __forceinline__ void publish_o(E& ex, int head, int slot, int lane, float row, uint32_t mark) {
  const int half = lane % 2 * 4;
  float o[4] = {};
  uint32_t word;
  add(o, awaited(ex.shares[head][lane / 2] + slot * 8 + half, ex.qk[head] + lane / 2, word, mark));
  float qk = number(word);
  UNROLL for (int i = 2; i < 32; i *= 2) {
    qk += __shfl_xor_sync(~0u, qk, i);
    UNROLL for (int j = 0; j < 4; ++j) o[j] += __shfl_xor_sync(~0u, o[j], i);
  }
  UNROLL for (int j = 0; j < 4; ++j) o[j] = fmaf(qk, __shfl_sync(~0u, row, 16 + half + j), o[j]);
  const float squares = sum_of_warp(squares_of(o), 2);
  UNROLL for (int j = 0; j < 4; ++j) o[j] *= __shfl_sync(~0u, row, 24 + half + j);
  if (lane < 2) UNROLL for (int j = 0; j < 4; ++j) publish(ex.gated + head * D + slot * 8 + half + j, o[j], mark);
  if (lane == 0) publish(ex.squares + head * 16 + slot, squares, mark);
}

template <int FEATURE, int INNER>
__global__ void __launch_bounds__(THREADS, 1) persistent(const __grid_constant__ Call call) {
  typedef Sizes<INNER> S;
  constexpr int TILES = S::TILES, CHUNKS = S::CHUNKS, LAST = S::LAST;
  Shared& s = *(Shared*)(shared_memory + SLOTS * STAGE);
  Exchange<INNER>& ex = *(Exchange<INNER>*)call.token.exchange;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, layers = (int)call.token.layers;
  const int c = blockIdx.x, head = c / 16, slot = c % 16;
  if (t == 0) s.ring.begin(WARPS);
  for (int i = t; i < layers * (int)(sizeof(Layer) / 8); i += THREADS)
    ((uint64_t*)s.layer)[i] = ((const uint64_t*)call.layer)[i];
  __syncthreads();
  if (warp >= WARPS) {
    give_registers<40>();
    if (t == READERS) ask_for_weights<INNER>(call.token, s, shared_memory);
    return;
  }
  take_registers<232>();

  Reader<SLOTS> reader(s.ring, shared_memory, lane, (uint32_t)call.token.nothing);
  const uint32_t parts = place(s.parts[warp]);
  const int own = warp * 128 + lane * 4, column = t;  // this lane's numbers of x; of the state, if there is one
  const unsigned uses = ex.uses + 1;
  ask_for_state(s.layer[0], s, head, slot);
  if (t < layers) s.decay[t] = Twice<float>(decay_of(s.layer[t], head));
  if (warp == 5) find_angles(s.layer[0], s, head, slot, lane);
  float x[4];
  {
    const uint2 given = *(const uint2*)((const Weight*)call.token.x + own);
    x[0] = low_of(given.x), x[1] = high_of(given.x), x[2] = low_of(given.y), x[3] = high_of(given.y);
  }
  late_copies_are_there();
  meet(1, READERS);

  for (int l = 0; l < layers; ++l) {
    const Layer& a = s.layer[l];
    const uint32_t mark = (uses + l) & 1;
    const bool turned = a.theta != nullptr;
    Rows state;
    uint32_t word_of_v = 0;

    // q, k, v and u, and what of o they are enough for
    {
      uint4 qkvu[4][4];
      reader.arrived(4);
      UNROLL for (int m = 0; m < 4; ++m) reader.template take<4>(qkvu[m], m, warp * 128);
      reader.release(4);
      if (l) add(x, awaited(ex.rows + own, mark ^ 1));
      lay_parts(parts, lane, x);
      __syncwarp();
      const Parts b(parts, lane);
      float sums[4][4] = {};
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int m = 0; m < 4; ++m) b.add_to(sums[m], qkvu[m][i], i);
      if (t < D) state.advance(s, s.decay[l], turned, column);
      const float squares = sum_of_warp(squares_of(x));
      UNROLL for (int m = 0; m < 4; ++m) put_row(s.sums[0][m * 8 + lane / 4], warp, lane, sums[m]);
      if (lane == 0) put(s.squares[0], warp, squares);
    }
    meet(1, READERS);
    if (warp < 5) {  // a lane has a row: 8 of each
      float row = total(s.sums[0][lane]) * factor(s.squares[0], a.eps);
      const float active = quick_phi(FEATURE, row);
      if (lane < 16) row = active;
      if (warp < 4) {
        float share[2] = {0, 0};
        UNROLL for (int i = 0; i < 8; ++i) share[i % 2] = fmaf(__shfl_sync(~0u, row, i), state.now[i], share[i % 2]);
        publish(ex.shares[head][slot] + column, share[0] + share[1], mark);
        UNROLL for (int i = 0; i < 8; ++i) state.k[i] = __shfl_sync(~0u, row, 8 + i);
      } else {
        if (lane >= 16 && lane < 24) publish(ex.v[head] + slot * 8 + lane % 8, row, mark);
        const float qk = sum_of_warp(row * __shfl_down_sync(~0u, row, 8), 8);
        if (lane == 0) publish(ex.qk[head] + slot, qk, mark);
        publish_o(ex, head, slot, lane, row, mark);
      }
    }

    // the output projection
    uint4 maps[2 * TILES][4];
    {
      uint4 out[4];
      reader.arrived(1 + TILES);
      reader.template take<4>(out, 0, warp * 128);
      UNROLL for (int i = 0; i < TILES; ++i) reader.template take<4>(maps[i], 1 + i, warp * 128);
      reader.release(1 + TILES);
      if (t < D) word_of_v = look(ex.v[head] + column);
      if (warp == 4) let_in(2, READERS);  // before this block's words are there, nobody asks for all
      else meet(2, READERS);
      float y[4] = {};
      uint32_t word;
      add(y, awaited(ex.gated + own, ex.squares + warp * 16 + lane % 16, word, mark));
      lay_parts(parts, lane, y);
      __syncwarp();
      const Parts b(parts, lane);
      float sums[4] = {}, others[4] = {};
      UNROLL for (int i = 0; i < 4; i += 2) b.add_to(sums, out[i], i), b.add_to(others, out[i + 1], i + 1);
      const float squares = sum_of_warp(number(word), 16);
      UNROLL for (int i = 0; i < 4; ++i) sums[i] += others[i];
      put_row(s.sums[1][lane / 4], warp, lane, sums);
      if (lane == 0) put(s.squares[1], warp, squares);
    }
    meet(1, READERS);
    if (warp == 0 && lane < 8)
      publish(ex.mixed + c * 8 + lane, total(s.sums[1][lane]) * factor(s.squares[1], a.gate_eps), mark);
    if (t < D) {
      while (!__all_sync(~0u, there(word_of_v, mark))) word_of_v = look(ex.v[head] + column);
      float* to = (float*)a.kv + (head * (turned ? 2 * D : D) + slot * 8) * D + column;
      state.store(to, turned, number(word_of_v));
    }
    if (l + 1 < layers) {
      ask_for_state(s.layer[l + 1], s, head, slot);
      if (warp == 5) find_angles(s.layer[l + 1], s, head, slot, lane);
    }

    // the channel mixer's two maps and their product
    {
      reader.arrived(TILES);
      UNROLL for (int i = 0; i < TILES; ++i) reader.template take<4>(maps[TILES + i], i, warp * 128);
      reader.release(TILES);
      add(x, awaited(ex.mixed + own, mark));
      lay_parts(parts, lane, x);
      __syncwarp();
      const Parts b(parts, lane);
      float sums[2 * TILES][4] = {};
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int m = 0; m < 2 * TILES; ++m) b.add_to(sums[m], maps[m][i], i);
      const float squares = sum_of_warp(squares_of(x));
      UNROLL for (int m = 0; m < 2 * TILES; ++m)
        put_row(s.sums[0][m % 2 * 32 + m / 2 * 8 + lane / 4], warp, lane, sums[m]);
      if (lane == 0) put(s.squares[0], warp, squares);
    }
    meet(1, READERS);
    if (warp == 0 && lane < S::OWN) {
      const float r = factor(s.squares[0], a.eps);
      publish(ex.inner + c * S::OWN + lane, total(s.sums[0][lane]) * r * (total(s.sums[0][32 + lane]) * r), mark);
    }

    // and back
    {
      constexpr int LANES = LAST / 32;  // with numbers of the last chunk
      uint4 back[CHUNKS][4], words[CHUNKS];
      reader.arrived(CHUNKS);
      UNROLL for (int i = 0; i + 1 < CHUNKS; ++i) reader.template take<4>(back[i], i, warp * 128);
      reader.template take<LAST / 256>(back[CHUNKS - 1], CHUNKS - 1, warp * (LAST / 8));
      reader.release(CHUNKS);
      late_copies_are_there();
      bool ready;
      do {
        ready = true;
        UNROLL for (int i = 0; i < CHUNKS; ++i) {
          const int at = i + 1 < CHUNKS ? own : warp * (LAST / 8) + lane % LANES * 4;
          words[i] = look_4(ex.inner + i * 1024 + at);
          ready = ready && there(words[i], mark);
        }
      } while (!__all_sync(~0u, ready));
      float sums[4][4] = {};
      UNROLL for (int i = 0; i < CHUNKS; ++i) {
        const uint32_t here = parts + i % 2 * PARTS;
        float p[4] = {};
        add(p, words[i]);
        if (i + 1 < CHUNKS || lane < LANES) lay_parts(here, lane, p);
        __syncwarp();
        const Parts b(here, lane);
        UNROLL for (int j = 0; j < 4; ++j)
          if (i + 1 < CHUNKS || j < LAST / 256) b.add_to(sums[j], back[i][j], j);
      }
      UNROLL for (int i = 0; i < 4; ++i) sums[0][i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      put_row(s.sums[1][lane / 4], warp, lane, sums[0]);
    }
    meet(1, READERS);
    if (warp == 0 && lane < 8) publish(ex.rows + c * 8 + lane, total(s.sums[1][lane]), mark);
  }

  // the norm, and outputs of the head, 64 at a time
  const Outputs of_head(call.token, c);
  float r = 1;
  if (c == 0 || of_head.begin < of_head.end) {
    add(x, awaited(ex.rows + own, (uses + layers - 1) & 1));
    lay_parts(parts, lane, x);
    __syncwarp();
    const Parts b(parts, lane);
    const float squares = sum_of_warp(squares_of(x));
    if (lane == 0) put(s.squares[0], warp, squares);
    meet(1, READERS);
    if (call.token.head) r = factor(s.squares[0], call.token.eps);
    for (int first = of_head.begin, turn = 0; first < of_head.end; first += 64, turn ^= 1) {
      const int tiles = of_head.end - first < 64 ? (of_head.end - first + 7) / 8 : 8;
      uint4 head[8][4];
      float sums[8][4] = {};
      reader.arrived(tiles);
      UNROLL for (int m = 0; m < 8; ++m)
        if (m < tiles) reader.template take<4>(head[m], m, warp * 128);
      reader.release(tiles);
      UNROLL for (int m = 0; m < 8; ++m)
        if (m < tiles) {
          UNROLL for (int i = 0; i < 4; ++i) b.add_to(sums[m], head[m][i], i);
          put_row(s.sums[turn][m * 8 + lane / 4], warp, lane, sums[m]);
        }
      meet(1, READERS);
      if (t < 64 && first + t < of_head.end) {
        const float output = total(s.sums[turn][t]) * r;
        ((Weight*)call.token.logits)[first + t] = (Weight)rounded_bf16(output, 0.0f);
      }
    }
  }

  if (c == 0) {
    *(uint2*)((Weight*)call.token.y + own) =
        make_uint2(rounded_bf16(r * x[0], r * x[1]), rounded_bf16(r * x[2], r * x[3]));
    for (int i = t; i < layers; i += READERS) *(int64_t*)s.layer[i].length += 1;
    meet(1, READERS);
    if (t == 0) ex.uses += layers;
  }
}
