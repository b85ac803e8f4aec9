// States in and out: between memory and a block's shared memory.
//
// In memory a state is the keys', in the frame of their last token: [K V], with angles twice, cosine and
// sine, and z [K] likewise, whichever pass it is. A block has [d e]: in GRADIENT passes d is of V, e of K,
// and z an extra d.
#pragma once

// One number, or both its parts. Inside, angles count from the sequence's beginning. There forward passes
// take a state up and REVERSE ones put it down; at the other end it turns by all tokens.
template <class B>
__device__ __forceinline__ void pass(
    const B& b, bool store, typename B::S* array, int64_t at, int64_t half, typename B::A* own, int apart,
    int feature) {
  typedef typename B::A A;
  typedef typename B::S S;
  typedef typename B::Flags O;
  if (!array) return;
  if (b.parts * b.w_parts == 1) {
    if (store) array[at] = (S)*own;
    else *own = (A)array[at];
    return;
  }
  double cosines = store ? (double)own[0] : (double)array[at];
  double sines = store ? (double)own[apart] : (double)array[at + half];
  if (!O::TOTAL) {
    double c = 1, s = 0;
    if (store != (bool)O::REVERSE) cos_sin(b.step_of(feature, O::GRADIENT ? b.E : b.D) * b.tokens, &c, &s);
    const double turned = c * cosines + s * sines;  // its own inverse
    sines = s * cosines - c * sines;
    cosines = turned;
  }
  if (store) array[at] = (S)cosines, array[at + half] = (S)sines;
  else own[0] = (A)cosines, own[apart] = (A)sines;
}

template <class B>
__device__ __forceinline__ void pass_all(
    const B& b, bool store, typename B::S* kv, typename B::S* z, int64_t kv_row, int64_t z_row) {
  typedef typename B::A A;
  typedef typename B::Flags O;
  const int both = b.parts * b.w_parts, apart = b.parts == 2 ? B::BE : 1;
  const int64_t half = (int64_t)b.D * b.E;
  const int64_t kv_unit = (kv_row * b.a.H + b.h) * both * half, z_unit = (z_row * b.a.H + b.h) * both;
  for (int i = b.thread; i < b.contracted * b.SLICE; i += B::THREADS) {
    const int d = O::GRADIENT ? i % b.contracted : i / b.SLICE;
    const int c = O::GRADIENT ? i / b.contracted : i % b.SLICE;
    const int e = b.slice * b.SLICE + c;
    if (e >= b.E) continue;
    A* const own = b.state + d * b.parts * B::BE + c * b.w_parts;  // [d e]
    if (!O::GRADIENT) pass(b, store, kv, kv_unit + (int64_t)d * b.E + e, half, own, apart, d);
    else if (d < b.D) pass(b, store, kv, kv_unit + (int64_t)e * b.D + d, half, own, apart, e);
    else pass(b, store, z, z_unit * b.E + e, b.E, own, apart, e);
  }
  if (O::NORMALIZE && !(store && b.slice))
    for (int d = b.thread; d < b.D; d += B::THREADS)
      pass(b, store, z, z_unit * b.D + d, b.D, b.z + d * b.parts, 1, d);
}

template <class B> __device__ __forceinline__ void read_state(const B& b) {
  for (int i = b.thread; i < b.ROWS * (B::BE + 1); i += B::THREADS) b.state[i] = 0;
  __syncthreads();
  typedef typename B::S S;
  const int64_t from = b.a.slots ? ((const int64_t*)b.a.slots)[b.s] : b.s;
  if (!b.a.slots || (from >= 0 && from < b.a.pool))  // else padding, which has no state
    pass_all(b, false, (S*)b.a.start, (S*)b.a.start_z, from, from);
}

template <class B> __device__ __forceinline__ void write_state(const B& b) {
  typedef typename B::S S;
  const int64_t to = b.a.slots ? ((const int64_t*)b.a.slots)[b.s] : b.s;
  if (!b.a.slots || (to >= 0 && to < b.a.pool)) pass_all(b, true, (S*)b.a.final, (S*)b.a.final_z, to, b.s);
}
