// What a kernel that stays on the device is made of: weights that stream through shared memory, products of them with
// one row of numbers, and words that blocks leave for each other.
#pragma once

#define WITHOUT_NARROW_TYPES  // NVRTC has to find no header
#include "twice.cuh"
#include "hopper.cuh"

typedef unsigned short Weight;  // bfloat16, of which only tensor cores make numbers

#ifdef __CUDACC__
extern __shared__ __align__(128) char shared_memory[];

// 16 bytes to shared memory, for this thread to wait for.
__device__ __forceinline__ void copy_late(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void late_copies_are_there() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Bytes to shared memory, which a barrier counts; of L2 they make room first.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_bytes(
    uint32_t to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(place(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ uint4 read_16(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ void write_4(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

// sums [16 8] += weights [16 16] numbers [16 8], by a warp.
__device__ __forceinline__ void add_weights(float (&s)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// What other blocks read, and what they wrote.
__device__ __forceinline__ void tell(float* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t look(const float* at) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint4 look_4(const float* at) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ void pause(unsigned clocks) {  // NVRTC's clock() has 64 bits
  for (const unsigned begun = (unsigned)clock(); (unsigned)clock() - begun < clocks;) {}
}
#endif

// Weights, up to 16 KB a stage. Where a row is copied by itself, the second one of a pair begins half a line of banks
// later, so that threads which read 16 bytes of both do not meet. Stages are released in the order in which they were
// asked for.
constexpr int PIECE = 8 * 2048, PAIR = 2 * 2048 + 64, SECOND = 2048 + 64, STAGE = 4 * PAIR;

template <int SLOTS> struct Ring {
  uint64_t full[SLOTS], empty[SLOTS];
  uint64_t help, gap;  // the first thread has room for rows that others ask for with it

  __device__ __forceinline__ void begin(int readers) {
    for (int i = 0; i < SLOTS; ++i) barrier_begin(full + i, 1), barrier_begin(empty + i, readers);
    barrier_begin(&help, 1);
    barriers_are_seen();
  }
};

// A thread that asks for weights: the first one, or one of those that help it with rows which are not behind each
// other. At most `in_flight` stages are under way, as what blocks tell each other waits behind them.
//
// A barrier says no more than whether the number of its uses is odd. Of stages that need no help, a helper may have
// missed two uses, or be one ahead; so it waits for the first thread alone, which cannot go on without it for long.
constexpr int ASKING = 4;
template <int SLOTS> struct Source {
  Ring<SLOTS>& ring;
  const uint32_t stages;
  const uint64_t policy;
  const int who;
  int in_flight, at, turn, behind, behind_turn, asked, turn_of_help;

  __device__ __forceinline__ Source(Ring<SLOTS>& ring, const void* stages, int who)
      : ring(ring), stages(place(stages)), policy(read_once()), who(who), in_flight(SLOTS), at(0), turn(0),
        behind(0), behind_turn(0), asked(0), turn_of_help(0) {}

  // A stage: numbers behind each other, which come faster in one piece.
  __device__ __forceinline__ void ask(const Weight* from, int numbers) {
    if (who == 0) copy_bytes(begin(numbers * 2), from, numbers * 2, ring.full + at, policy);
    end();
  }
  // 32 rows of 256 numbers; behind each other as if 8 rows were 1024 long.
  __device__ __forceinline__ void ask_parts(const Weight* from, int apart) {
    if (who == 0) begin(8 * 2048), arrive(&ring.help);
    else wait(&ring.help, turn_of_help++ & 1);
    const uint32_t to = stages + at * STAGE;
    ONCE for (int r = who; r < 32; r += ASKING)
      copy_bytes(
          to + r % 8 / 2 * PAIR + r % 2 * SECOND + r / 8 * 512, from + (int64_t)r * apart, 512, ring.full + at, policy);
    end();
  }

 private:
  __device__ __forceinline__ uint32_t begin(int bytes) {
    // an error is better than a GPU that hangs: wherever blocks stand still, there is no more room after a while
    for (int looked = 0; !is_over(ring.empty + at, turn & 1 ^ 1); ++looked)
      if (looked == 1 << 22) __trap();
    for (; asked >= in_flight; --asked) {
      wait(ring.full + behind, behind_turn & 1);
      if (++behind == SLOTS) behind = 0, ++behind_turn;
    }
    ++asked;
    arrive_expecting(ring.full + at, bytes);
    return stages + at * STAGE;
  }
  __device__ __forceinline__ void end() {
    if (++at == SLOTS) at = 0, ++turn;
  }
};

// A warp that reads them. `nothing` is 0, which the compiler does not know.
template <int SLOTS> struct Reader {
  Ring<SLOTS>& ring;
  const uint32_t place_of_stages, rows, nothing;  // rows: where this thread's 16 bytes of a first stage are
  const int lane;
  int at, turn;
  uint32_t read;

  __device__ __forceinline__ Reader(Ring<SLOTS>& ring, const void* stages, int lane, uint32_t nothing)
      : ring(ring), place_of_stages(place(stages)),
        rows(place(stages) + lane / 8 * PAIR + lane / 4 % 2 * SECOND + lane % 4 * 16), nothing(nothing), lane(lane),
        at(0), turn(0), read(0) {}

  __device__ __forceinline__ int slot(int stage) const { return at + stage - (at + stage >= SLOTS) * SLOTS; }

  // The next stages are there.
  __device__ __forceinline__ void arrived(int stages) {
    for (int i = 0; i < stages; ++i) wait(ring.full + slot(i), turn + (at + i >= SLOTS) & 1);
    read = 0;
  }
  // Of row lane / 4 of a stage, numbers 8 (lane % 4) to 8 (lane % 4) + 7 of COUNT times 32, the first from `first` on.
  template <int COUNT, int APART = 32> __device__ __forceinline__ void take(uint4 (&a)[4], int stage, int first) {
    const uint32_t from = rows + slot(stage) * STAGE + first * 2;
    UNROLL for (int i = 0; i < COUNT; ++i) a[i] = read_16(from + i * APART * 2), read ^= a[i].x;
  }
  // The same of 8 rows of LENGTH numbers behind each other, over several stages. All rows begin in one bank: half of
  // the threads read the other one of two pieces first.
  template <int COUNT, int LENGTH> __device__ __forceinline__ void take_of(uint4 (&a)[4], int stage, int first) {
    const int odd = lane / 4 % 2, from = lane / 4 * LENGTH * 2 + lane % 4 * 16 + first * 2;
    UNROLL for (int i = 0; i < COUNT; ++i) {
      const int other = i + 1 < COUNT || i % 2 ? i ^ 1 : i, at = from + (odd ? other : i) * 64;
      const int piece = LENGTH > 1024 ? at / PIECE : 0;
      a[i] = read_16(place_of_stages + slot(stage + piece) * STAGE + at - piece * PIECE), read ^= a[i].x;
    }
    UNROLL for (int i = 0; i + 1 < COUNT; i += 2) {
      const uint4 x = a[i], y = a[i + 1];
      a[i] = odd ? y : x, a[i + 1] = odd ? x : y;
    }
  }
  // They may be overwritten. Each lane says so of what it has read, once that is in its registers, for which the barrier
  // by itself would not wait.
  __device__ __forceinline__ void release(int stages) {
    for (int i = 0; i < stages; ++i) arrive((uint64_t*)((char*)(ring.empty + slot(i)) + (read & nothing)));
    at += stages;
    if (at >= SLOTS) at -= SLOTS, ++turn;
  }
};

// A row of numbers in float32 times weights in bfloat16, exactly but for the sums: three bfloat16 add up to a number.
//
// A product has 8 weights of a thread at once, of row lane / 4, as if pairs 0 and 2 of them were of one row and pairs 1
// and 3 of another one. Columns 0, 1, 2 of the other operand are a number's three parts, for pairs 0 and 2; columns 3,
// 4, 5 those for pairs 1 and 3. So columns 0, 1, 2 of the first row count, and 3, 4, 5 of the second.
__device__ __forceinline__ float part_of_row(const float (&s)[4], int lane) {  // the four lanes of a row have its parts
  const int quarter = lane % 4;
  float x = quarter < 2 ? s[0] : s[2];
  x += quarter == 0 ? s[1] : s[3];
  return quarter == 3 ? 0 : x;
}
// Of two numbers, the one that `mine` says, with the part of it that the lane has which is `by` apart.
__device__ __forceinline__ float joined(float first, float second, bool mine, int by) {
  return (mine ? second : first) + __shfl_xor_sync(~0u, mine ? first : second, by);
}
// Rows of one, two or four tiles; of four lanes, lane q has the row of tile q % TILES.
template <int TILES> __device__ __forceinline__ float row_of(const float (*s)[4], int lane) {
  static_assert(TILES == 1 || TILES == 2 || TILES == 4, "lanes that share a row");
  float x[TILES];
  UNROLL for (int m = 0; m < TILES; ++m) x[m] = part_of_row(s[m], lane);
  const bool odd = lane % 2, high = lane % 4 / 2;
  if (TILES == 4)
    return joined(joined(x[0], x[TILES / 2 - 1], odd, 1), joined(x[TILES / 2], x[TILES - 1], odd, 1), high, 2);
  const float sum = TILES == 2 ? joined(x[0], x[TILES - 1], odd, 1) : x[0] + __shfl_xor_sync(~0u, x[0], 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

__device__ __forceinline__ float cut(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000); }
__device__ __forceinline__ uint32_t cut(float low, float high) {  // both as bfloat16
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// 128 numbers of a warp, 4 of each lane, in parts: [3][pairs 0 and 2, pairs 1 and 3][64]. Of 128 numbers a lane later
// wants 8 times 4; 16 bytes have its pairs of 32 numbers and of the next 32.
constexpr int PARTS = 3 * 2 * 128;  // bytes
__device__ __forceinline__ void lay_parts(uint32_t parts, int lane, const float (&x)[4]) {
  const int step = lane / 8;
  const uint32_t to = parts + (step / 2 * 4 + lane % 8 / 2) * 16 + step % 2 * 8 + lane % 2 * 4;
  float rest[4] = {x[0], x[1], x[2], x[3]};
  UNROLL for (int n = 0; n < 3; ++n) {
    write_4(to + n * 256, cut(rest[0], rest[1]));
    write_4(to + n * 256 + 128, cut(rest[2], rest[3]));
    UNROLL for (int i = 0; i < 4; ++i) rest[i] -= cut(rest[i]);
  }
}
struct Parts {  // of column lane / 4
  uint4 b[2];

  __device__ __forceinline__ Parts(uint32_t parts, int lane) {
    const int column = lane / 4;
    const uint32_t from = parts + column % 3 * 256 + column / 3 * 128 + lane % 4 * 16;
    b[0] = b[1] = make_uint4(0, 0, 0, 0);
    if (column < 6) b[0] = read_16(from), b[1] = read_16(from + 64);
  }
  // sums += the i-th 32 numbers times weights of 8 rows.
  __device__ __forceinline__ void add_to(float (&sums)[4], const uint4& weights, int i) const {
    add_weights(sums, weights, i % 2 ? b[i / 2].z : b[i / 2].x, i % 2 ? b[i / 2].w : b[i / 2].y);
  }
};

__device__ __forceinline__ float sum_of_warp(float x, int lanes = 32) {
  UNROLL for (int o = lanes / 2; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
__device__ __forceinline__ float squares_of(const float (&x)[4]) {
  return x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
}
__device__ __forceinline__ float sum_of(const float4& x) { return (x.x + x.y) + (x.z + x.w); }

// A row's sum over eight warps, which have a part each.
__device__ __forceinline__ float total(const float4 (&x)[2]) { return sum_of(x[0]) + sum_of(x[1]); }
__device__ __forceinline__ void put(float4 (&x)[2], int warp, float sum) { ((float*)x)[warp] = sum; }
template <int TILES>
__device__ __forceinline__ void put_rows(float4 (*x)[2], int warp, int lane, const float (*sums)[4]) {
  const float row = row_of<TILES>(sums, lane);
  if (lane % 4 < TILES) put(x[lane % 4 * 8 + lane / 4], warp, row);
}

// Words for other blocks. A word's lowest bit says which use of its place it is of, so nobody waits for more than the
// words, and none has to be taken back. The number has a bit less.
__device__ __forceinline__ void publish(float* to, float x, uint32_t mark) {
  tell(to, (__float_as_uint(x) & ~1u) | mark);
}
__device__ __forceinline__ float number(uint32_t word) { return from_bits(word & ~1u); }
__device__ __forceinline__ bool there(uint32_t word, uint32_t mark) { return (word & 1) == mark; }
__device__ __forceinline__ bool there(const uint4& words, uint32_t mark) {
  return there(mark ? words.x & words.y & words.z & words.w : words.x | words.y | words.z | words.w, mark);
}

// Words that are not there, and another look for them if so: late words come sooner where fewer others are asked for.
__device__ __forceinline__ uint4 no_words(uint32_t mark) { return make_uint4(~mark, ~mark, ~mark, ~mark); }
__device__ __forceinline__ void look_for(uint4& words, const float* at, uint32_t mark) {
  if (!there(words, mark)) words = look_4(at);
}
__device__ __forceinline__ void look_for(uint32_t& word, const float* at, uint32_t mark) {
  if (!there(word, mark)) word = look(at);
}

// What a warp waits for is there for all of its lanes at once. Where lanes leave a loop one by one, those that are
// through may begin to wait for the next words, and it takes microseconds until the others have their turn.
__device__ __forceinline__ uint4 awaited(const float* at, uint32_t mark) {
  uint4 words = no_words(mark);
  do look_for(words, at, mark);
  while (!__all_sync(~0u, there(words, mark)));
  return words;
}
__device__ __forceinline__ void add(float (&x)[4], const uint4& words) {
  x[0] += number(words.x), x[1] += number(words.y), x[2] += number(words.z), x[3] += number(words.w);
}
