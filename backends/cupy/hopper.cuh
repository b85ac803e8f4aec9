// What Hopper has for matrix products, a function each: bulk copies of tiles, barriers in shared memory that
// count them, and products of a warpgroup (four warps), whose sums are spread over its threads' registers.
//
// A tile is 64 features wide, 128 bytes a row, and any number of rows high; its 16-byte pieces are swizzled
// (piece p of row r lies at p ^ r % 8), as the copies leave it and the products read it. An operand of more
// features is several tiles, one behind the other.
#pragma once

#include "warp.cuh"

#ifdef __CUDACC__
struct alignas(64) Map {  // of an array, as the driver encodes it
  char bytes[128];
};

// Barriers: a phase ends when `count` have arrived and all bytes that were announced are there.
__device__ __forceinline__ void barrier_begin(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(place(barrier)), "r"(count));
}
__device__ __forceinline__ void barriers_are_seen() {  // by copies
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(place(barrier)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool is_over(uint64_t* barrier, int phase) {  // looks for a while
  int over;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.s32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(place(barrier)), "r"(phase)
      : "memory");
  return over;
}
__device__ __forceinline__ void wait(uint64_t* barrier, int phase) {
  while (!is_over(barrier, phase)) {}
}

// Copies of a tile at (feature, head, token, sequence): what lies outside of the array is read as 0, and not
// written.
__device__ __forceinline__ void load_tile(
    void* to, const Map* from, uint64_t* barrier, int feature, int head, int token, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5, %6}], [%2];" ::"r"(place(to)),
      "l"(from), "r"(place(barrier)), "r"(feature), "r"(head), "r"(token), "r"(sequence)
      : "memory");
}
__device__ __forceinline__ void store_tile(
    const Map* to, const void* from, int feature, int head, int token, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(place(from)), "r"(feature), "r"(head), "r"(token), "r"(sequence)
      : "memory");
}
__device__ __forceinline__ void stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void stores_are_over() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void written_for_copies() {  // and for products: what this thread has stored
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of some of the block's threads.
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void let_in(int number, int threads) {  // arrive there, and go on
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// 8 x 8 pieces from a warp to shared memory, as `load_4` takes them up.
__device__ __forceinline__ void store_pieces(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// sums [8 8] += weights [8 16] features [16 8], by a warp; a thread has columns 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void add_rows(float (&sums)[2], const uint32_t (&a)[2], uint32_t low, uint32_t high) {
  float below[2];  // of rows that are all 0
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %8, %5, %8}, {%6, %7}, {%0, %1, "
      "%9, %9};"
      : "+f"(sums[0]), "+f"(sums[1]), "=f"(below[0]), "=f"(below[1])
      : "r"(a[0]), "r"(a[1]), "r"(low), "r"(high), "r"(0), "f"(0.0f));
}

// Products are asked for in groups, and waited for later; until then their operands and sums are not touched.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int GROUPS> __device__ __forceinline__ void all_but() {  // the last GROUPS groups
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
template <int N> __device__ __forceinline__ void hold(float (&sums)[N]) {  // the compiler moves none past this
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(uint32_t (&operand)[N]) {  // until here it is being read
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+r"(operand[i])::"memory");
}

// An operand in shared memory, for the product's 16 contracted numbers; both are swizzled tiles.
// contracted along rows: [rows, 64 contracted]; `at` moves by 32 bytes for the next 16, then to the next tile.
__device__ __forceinline__ uint64_t along_rows(uint32_t at) {
  return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
// contracted across rows: [contracted, 64 columns]; `at` moves by 2048 bytes for the next 16; `tile` bytes lie
// between the tiles of 64 columns.
__device__ __forceinline__ uint64_t across_rows(uint32_t at, int tile) {
  return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(tile >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

// sums [64 N] (+)= a [64 16] b [16 N]; ACROSS: whether b is contracted across rows. Thread t has of sums the
// columns 8 j + 2 (t % 4) and the next, of rows 16 (t / 32) + t % 32 / 4 in sums[4 j], sums[4 j + 1], and of
// the rows 8 below in the next two; of an a in registers likewise, two numbers a register.
#define SUMS_8(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), \
                     "+f"(s[i + 6]), "+f"(s[i + 7])
#define SUMS_32(s, i) SUMS_8(s, i), SUMS_8(s, i + 8), SUMS_8(s, i + 16), SUMS_8(s, i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
                 "%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
                 "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PRODUCT(N, NAMES, A, B, ADD, TURN, LAST) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" NAMES \
  "}, " A ", " B ", p, 1, 1" TURN ", " LAST ";\n}"

template <bool ACROSS>
__device__ __forceinline__ void product(float (&s)[4], uint64_t a, uint64_t b, bool add) {
  asm volatile(PRODUCT("8", "%0,%1,%2,%3", "%4", "%5", "%6", ", 0", "%7")
               : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
               : "l"(a), "l"(b), "r"((int)add), "n"(ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void product(float (&s)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(PRODUCT("64", NAMES_32, "%32", "%33", "%34", ", 0", "%35")
               : SUMS_32(s, 0)
               : "l"(a), "l"(b), "r"((int)add), "n"(ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void product(float (&s)[32], const uint32_t* a, uint64_t b, bool add) {
  asm volatile(PRODUCT("64", NAMES_32, "{%32,%33,%34,%35}", "%36", "%37", "", "%38")
               : SUMS_32(s, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void product(float (&s)[64], const uint32_t* a, uint64_t b, bool add) {
  asm volatile(PRODUCT("128", NAMES_64, "{%64,%65,%66,%67}", "%68", "%69", "", "%70")
               : SUMS_32(s, 0), SUMS_32(s, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(ACROSS));
}
#endif
