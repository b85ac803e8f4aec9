// One text's token through all layers of a decoder, in one kernel that stays on the device.
//
//     q, k, v, u = r W x             S <- decay S + phi(k) v^T, turned by angles if there are any      o = phi(q)^T S
//     x += out (u r o)               x += l3 (r l1 x)(r l2 x)                     r = 1 / sqrt(mean of squares + eps)
//
// Weights are all that has to be moved. They come in one stream, through shared memory into registers, and a block asks
// for them as soon as it has room, whatever layer it works on. What is left are four times a layer at which blocks need
// what others computed: about a microsecond each, for words to get to L2 and from there, past weights.
//
// 128 blocks, 16 a head, each on a multiprocessor of its own. A block has 8 rows of q, k, v and u of its head, and the
// 8 rows of the head's state that belong to them, which give its share of o. 32 blocks, with two heads, are a group:
// each of them adds up all of its shares of o, and has 32 outputs of the output projection, as far as they come from
// these two heads. So an output is four groups' sum, for whoever needs it. Everything else is cut by outputs: a block
// has 8 rows of l3, and a 128th of l1 and l2. Eight warps share the numbers of a row among themselves, and a thread of
// four more asks for weights.
#include "persistent.cuh"

constexpr int WIDTH = 1024, HEADS = 8, D = 128, BLOCKS = 128;
constexpr int GROUPS = 4, PER_GROUP = BLOCKS / GROUPS;  // of heads, two each
constexpr int WARPS = 8, READERS = 32 * WARPS, THREADS = READERS + 32 * ASKING, SLOTS = 12, IN_FLIGHT = 2, MOST = 40;

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
  float uses, gap[31];         // how many layers have used it, as bits
  float rows[WIDTH];           // what l3 adds to x
  float shares[HEADS][16][D];  // of o, without this token
  float v[HEADS][D], u[HEADS][D];
  float qk[HEADS][16];                   // this token's part of o are their sum times v
  float squares[GROUPS][PER_GROUP];      // of o, of a group's heads, once for each of 32 readers
  float mixed[GROUPS][WIDTH];            // what `out` adds to x, but for the norm's factor, by groups
  float inner[INNER];
};

struct Shared {
  float state[16][D];                // of the next layer; from 8 on the part that angles need
  float4 sums[2][64][2];             // of rows, by warps
  float4 squares[2][2];
  uint32_t parts[WARPS][PARTS / 2];  // twice
  Twice<float> decay[MOST];
  Turn<float> turns[8];  // of the next layer
  Layer layer[MOST];
  Ring<SLOTS> ring;
};

__device__ __forceinline__ float factor(const float4 (&squares)[2], double eps) {
  return rsqrtf(total(squares) / WIDTH + (float)eps);
}

template <int INNER> struct Sizes {
  static constexpr int OWN = INNER / BLOCKS, TILES = (OWN + 7) / 8;                         // rows of l1, and 8 of them
  static constexpr int CHUNKS = (INNER + 1023) / 1024, LAST = INNER - 1024 * (CHUNKS - 1);  // of l3's rows
  static_assert(INNER % 256 == 0 && OWN <= 24, "what registers hold");
};

struct Outputs {  // of the head: 8 are every BLOCKS times 8 a block's; none without a head
  const int all, tiles;

  __device__ __forceinline__ Outputs(const Token& token, int c)
      : all(token.head ? (int)token.outputs : 0), tiles(((all + 7) / 8 - c + BLOCKS - 1) / BLOCKS) {}
  static __device__ __forceinline__ int first(int tile, int c) { return (tile * BLOCKS + c) * 8; }
};

template <int INNER>
__device__ __forceinline__ void ask_for_weights(const Call& call, Shared& s, const void* stages, int who) {
  typedef Sizes<INNER> S;
  typedef const Weight* Rows;
  static_assert(IN_FLIGHT <= 5 + 2 * S::TILES + S::CHUNKS, "a helper may have missed two stages that need help");
  const int c = blockIdx.x;
  Source<SLOTS> source(s.ring, stages, who);
  for (int l = 0; l < (int)call.token.layers; ++l) {
    const Layer& a = call.layer[l];
    ONCE for (int i = 0; i < 4; ++i) source.ask((Rows)a.qkvu + (i * WIDTH + c * 8) * WIDTH, 8 * WIDTH);
    source.in_flight = IN_FLIGHT;  // from now on blocks wait for words
    source.ask_parts((Rows)a.out + c % PER_GROUP * 32 * WIDTH + c / PER_GROUP * 256, WIDTH);
    ONCE for (int i = 0; i < 2 * S::TILES; ++i) {
      const int rows = S::OWN - i / 2 * 8;
      source.ask((Rows)(i % 2 ? a.l2 : a.l1) + (c * S::OWN + i / 2 * 8) * WIDTH, (rows < 8 ? rows : 8) * WIDTH);
    }
    ONCE for (int i = 0; i < S::CHUNKS; ++i)
      source.ask((Rows)a.l3 + c * 8 * INNER + i * 8192, i + 1 < S::CHUNKS ? 8192 : S::LAST * 8);
  }
  source.in_flight = SLOTS;
  const Outputs own(call.token, c);
  for (int i = 0; i < own.tiles; ++i) {
    const int row = Outputs::first(i, c), rows = own.all - row;
    source.ask((Rows)call.token.head + (int64_t)row * WIDTH, (rows < 8 ? rows : 8) * WIDTH);
  }
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
  s.turns[lane] = Turn<float>(cosine * decay, sine * decay);
}

// A block's rows of the state, a column a thread.
struct Rows {
  float now[8], sine[8], k[8];

  // A token later, but for what this one adds.
  __device__ __forceinline__ void advance(const Shared& s, const Twice<float>& decay, bool turned, int column) {
    const bool forgets = decay.high == 0;  // whatever was there, NaN too
    UNROLL for (int i = 0; i < 8; ++i) {
      now[i] = forgets ? 0 : s.state[i][column];
      if (turned) {
        sine[i] = forgets ? 0 : s.state[8 + i][column];
        s.turns[i].apply(now[i], sine[i], 0.0f);
      } else {
        now[i] = times(now[i], decay, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void store(float* to, bool turned, float v) const {
    UNROLL for (int i = 0; i < 8; ++i) to[i * D] = fmaf(k[i], v, now[i]);
    if (turned) UNROLL for (int i = 0; i < 8; ++i) to[(D + i) * D] = sine[i];
  }
};

// 32 columns of u o, 4 a lane, and the squares of o: the shares of 16 blocks, and this token's part.
template <class E>
__device__ __forceinline__ float gated_o(const E& ex, int head, int first, int lane, uint32_t mark, float (&y)[4]) {
  const int share = lane / 8, at = first + lane % 8 * 4;
  uint4 shares[4], v = no_words(mark), u = v;
  uint32_t qk = v.x;
  UNROLL for (int i = 0; i < 4; ++i) shares[i] = v;
  bool ready;
  do {
    UNROLL for (int i = 0; i < 4; ++i) look_for(shares[i], ex.shares[head][i * 4 + share] + at, mark);
    look_for(v, ex.v[head] + at, mark), look_for(u, ex.u[head] + at, mark);
    look_for(qk, ex.qk[head] + lane % 16, mark);
    ready = there(v, mark) && there(u, mark) && there(qk, mark);
    UNROLL for (int i = 0; i < 4; ++i) ready = ready && there(shares[i], mark);
  } while (!__all_sync(~0u, ready));
  float o[4] = {}, values[4] = {};
  UNROLL for (int i = 0; i < 4; ++i) add(o, shares[i]);
  add(values, v), add(y, u);
  const float weight = sum_of_warp(number(qk), 16);
  UNROLL for (int j = 0; j < 4; ++j) {
    o[j] += __shfl_xor_sync(~0u, o[j], 8);
    o[j] += __shfl_xor_sync(~0u, o[j], 16);
    o[j] = fmaf(weight, values[j], o[j]);
    y[j] *= o[j];
  }
  return sum_of_warp(squares_of(o), 8);
}

template <int FEATURE, int INNER>
__global__ void __launch_bounds__(THREADS, 1) persistent(const __grid_constant__ Call call) {
  typedef Sizes<INNER> S;
  constexpr int TILES = S::TILES, CHUNKS = S::CHUNKS, LAST = S::LAST;
  Shared& s = *(Shared*)(shared_memory + SLOTS * STAGE);
  Exchange<INNER>& ex = *(Exchange<INNER>*)call.token.exchange;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, layers = (int)call.token.layers;
  const int c = blockIdx.x, head = c / 16, slot = c % 16, group = c / PER_GROUP, place_in_group = c % PER_GROUP;
  if (t == 0) s.ring.begin(WARPS * 32);
  __syncthreads();
  if (warp >= WARPS) {
    give_registers<40>();
    if (lane == 0) ask_for_weights<INNER>(call, s, shared_memory, warp - WARPS);
    return;
  }
  take_registers<232>();

  Reader<SLOTS> reader(s.ring, shared_memory, lane, (uint32_t)call.token.nothing);
  const uint32_t parts = place(s.parts[warp]);
  const int own = warp * 128 + lane * 4, column = t;  // this lane's numbers of x; of the state, if there is one
  const unsigned uses = look(&ex.uses) + 1;
  ask_for_state(call.layer[0], s, head, slot);
  for (int i = t; i < layers * (int)(sizeof(Layer) / 8); i += READERS)
    ((uint64_t*)s.layer)[i] = ((const uint64_t*)call.layer)[i];
  meet(1, READERS);
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
      UNROLL for (int m = 0; m < 4; ++m) reader.template take_of<4, WIDTH>(qkvu[m], m, warp * 128);
      if (t < D) state.advance(s, s.decay[l], turned, column);
      if (l) add(x, awaited(ex.rows + own, mark ^ 1));
      reader.release(4);
      lay_parts(parts, lane, x);
      __syncwarp();
      const Parts b(parts, lane);
      float sums[4][4] = {};
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int m = 0; m < 4; ++m) b.add_to(sums[m], qkvu[m][i], i);
      const float squares = sum_of_warp(squares_of(x));
      put_rows<4>(s.sums[0], warp, lane, sums);
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
        if (lane >= 16) publish((lane < 24 ? ex.v : ex.u)[head] + slot * 8 + lane % 8, row, mark);
        const float qk = sum_of_warp(row * __shfl_down_sync(~0u, row, 8), 8);
        if (lane == 0) publish(ex.qk[head] + slot, qk, mark);
      }
    }

    // the output projection
    uint4 maps[2 * TILES][4];
    {
      uint4 out[4];
      reader.arrived(1 + TILES);
      reader.template take<4, 256>(out, 0, warp * 32);
      UNROLL for (int i = 0; i < TILES; ++i) reader.template take_of<4, WIDTH>(maps[i], 1 + i, warp * 128);
      if (t < D) word_of_v = look(ex.v[head] + column);
      float y[4] = {}, sums[4][4] = {};
      meet(1, READERS);  // before this block's words are there, nobody asks for others
      const float squares = gated_o(ex, group * 2 + warp / 4, warp % 4 * 32, lane, mark, y);
      reader.release(1 + TILES);
      if (lane < 8) lay_parts(parts, lane, y);
      __syncwarp();
      const Parts b(parts, lane);
      UNROLL for (int m = 0; m < 4; ++m) b.add_to(sums[m], out[m], 0);
      put_rows<4>(s.sums[1], warp, lane, sums);
      if (lane == 0) put(s.squares[1], warp, squares);
    }
    meet(1, READERS);
    if (warp == 0) publish(ex.mixed[group] + place_in_group * 32 + lane, total(s.sums[1][lane]), mark);
    if (t == 32) publish(ex.squares[group] + place_in_group, total(s.squares[1]), mark);
    if (t < D) {
      while (!__all_sync(~0u, there(word_of_v, mark))) look_for(word_of_v, ex.v[head] + column, mark);
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
      UNROLL for (int i = 0; i < TILES; ++i) reader.template take_of<4, WIDTH>(maps[TILES + i], i, warp * 128);
      uint4 mixed[GROUPS];
      UNROLL for (int i = 0; i < GROUPS; ++i) mixed[i] = no_words(mark);
      uint32_t of_group = mixed[0].x;
      bool ready;
      do {
        UNROLL for (int i = 0; i < GROUPS; ++i) look_for(mixed[i], ex.mixed[i] + own, mark);
        look_for(of_group, ex.squares[lane % GROUPS] + place_in_group, mark);
        ready = there(of_group, mark);
        UNROLL for (int i = 0; i < GROUPS; ++i) ready = ready && there(mixed[i], mark);
      } while (!__all_sync(~0u, ready));
      reader.release(TILES);
      float added[4] = {};
      UNROLL for (int i = 0; i < GROUPS; ++i) add(added, mixed[i]);
      const float by = rsqrtf(sum_of_warp(number(of_group), GROUPS) / WIDTH + (float)a.gate_eps);
      UNROLL for (int i = 0; i < 4; ++i) x[i] = fmaf(by, added[i], x[i]);
      lay_parts(parts, lane, x);
      __syncwarp();
      const Parts b(parts, lane);
      float sums[2 * TILES][4] = {};
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int m = 0; m < 2 * TILES; ++m) b.add_to(sums[m], maps[m][i], i);
      const float squares = sum_of_warp(squares_of(x));
      UNROLL for (int m = 0; m + 4 <= 2 * TILES; m += 4) put_rows<4>(s.sums[0] + m * 8, warp, lane, sums + m);
      if (TILES % 2) put_rows<2>(s.sums[0] + (TILES - 1) * 16, warp, lane, sums + 2 * (TILES - 1));
      if (lane == 0) put(s.squares[0], warp, squares);
    }
    meet(1, READERS);
    if (warp == 0 && lane < S::OWN) {
      const float r = factor(s.squares[0], a.eps);
      const float4(*sums)[2] = s.sums[0] + lane / 8 * 16 + lane % 8;  // of l1, and of l2 behind 8 of them
      publish(ex.inner + c * S::OWN + lane, total(sums[0]) * r * (total(sums[8]) * r), mark);
    }

    // and back
    {
      constexpr int LANES = LAST / 32;  // with numbers of the last chunk
      uint4 back[CHUNKS][4], words[CHUNKS];
      reader.arrived(CHUNKS);
      UNROLL for (int i = 0; i + 1 < CHUNKS; ++i)
        reader.template take_of<4, INNER>(back[i], 0, i * 1024 + warp * 128);
      reader.template take_of<LAST / 256, INNER>(back[CHUNKS - 1], 0, (CHUNKS - 1) * 1024 + warp * (LAST / 8));
      late_copies_are_there();
      pause(400);  // of four places at which blocks wait, it is worth it at this one
      const auto look_from = [&](int first) {
        UNROLL for (int i = first; i < CHUNKS; ++i)
          look_for(words[i], ex.inner + i * 1024 + (i + 1 < CHUNKS ? own : warp * (LAST / 8) + lane % LANES * 4), mark);
      };
      UNROLL for (int i = 0; i < CHUNKS; ++i) words[i] = no_words(mark);
      look_from(0);
      float sums[4][4] = {};
      UNROLL for (int i = 0; i < CHUNKS; ++i) {
        const uint32_t here = parts + i % 2 * PARTS;
        float p[4] = {};
        while (!__all_sync(~0u, there(words[i], mark))) look_from(i);
        add(p, words[i]);
        if (i + 1 < CHUNKS || lane < LANES) lay_parts(here, lane, p);
        __syncwarp();
        const Parts b(here, lane);
        UNROLL for (int j = 0; j < 4; ++j)
          if (i + 1 < CHUNKS || j < LAST / 256) b.add_to(sums[j], back[i][j], j);
      }
      reader.release(CHUNKS);
      UNROLL for (int i = 0; i < 4; ++i) sums[0][i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      put_rows<1>(s.sums[1], warp, lane, sums);
    }
    meet(1, READERS);
    if (warp == 0 && lane < 8) publish(ex.rows + c * 8 + lane, total(s.sums[1][lane]), mark);
  }

  // the norm, and outputs of the head
  constexpr int TOGETHER = 8;  // times 8
  const Outputs of_head(call.token, c);
  float r = 1;
  if (c == 0 || of_head.tiles) {
    add(x, awaited(ex.rows + own, (uses + layers - 1) & 1));
    lay_parts(parts, lane, x);
    __syncwarp();
    const Parts b(parts, lane);
    const float squares = sum_of_warp(squares_of(x));
    if (lane == 0) put(s.squares[0], warp, squares);
    meet(1, READERS);
    if (call.token.head) r = factor(s.squares[0], call.token.eps);
    for (int first = 0, turn = 0; first < of_head.tiles; first += TOGETHER, turn ^= 1) {
      const int tiles = of_head.tiles - first < TOGETHER ? of_head.tiles - first : TOGETHER;
      uint4 head[TOGETHER][4];
      float sums[TOGETHER][4] = {};
      reader.arrived(tiles);
      UNROLL for (int m = 0; m < TOGETHER; ++m)
        if (m < tiles) reader.template take_of<4, WIDTH>(head[m], m, warp * 128);
      reader.release(tiles);
      UNROLL for (int m = 0; m < TOGETHER; ++m)
        if (m < tiles) UNROLL for (int i = 0; i < 4; ++i) b.add_to(sums[m], head[m][i], i);
      UNROLL for (int m = 0; m < TOGETHER; m += 4) put_rows<4>(s.sums[turn] + m * 8, warp, lane, sums + m);
      meet(1, READERS);
      const int output = Outputs::first(first + t / 8, c) + t % 8;
      if (t < tiles * 8 && output < of_head.all)
        ((Weight*)call.token.logits)[output] = (Weight)rounded_bf16(total(s.sums[turn][t]) * r, 0.0f);
    }
  }

  if (c == 0) {
    *(uint2*)((Weight*)call.token.y + own) =
        make_uint2(rounded_bf16(r * x[0], r * x[1]), rounded_bf16(r * x[2], r * x[3]));
    for (int i = t; i < layers; i += READERS) *(int64_t*)s.layer[i].length += 1;
    meet(1, READERS);
    if (t == 0) tell(&ex.uses, uses - 1 + layers);
  }
}
