// From a block's sums to results in memory: divided, mapped back, weighed, feature by feature.
#pragma once

// What sums of weights come to, in front of `share`.
template <class B> __device__ __forceinline__ void divide_by(const B& b, typename B::A weights) {
  typedef typename B::A A;
  typedef typename B::S S;
  typedef typename B::Flags O;
  constexpr int C = B::C, PART = C * C / B::THREADS;
  const int i = b.thread % C, first = b.thread / C * PART;
  if (O::DECAY) weights = kept(weights, b.near[i]);
  if (b.PAIRED)
    for (int j = first; j < first + PART; ++j) weights += b.X[i * B::PITCH + j];
  b.share[b.thread] = weights;
  __syncthreads();
  if (b.thread >= b.here_x) return;
  A sum = 0;
  for (int part = 0; part < B::THREADS; part += C) sum += b.share[part + i];
  const int64_t line = b.line(i, b.a.N);
  if (O::SUMS == 1 && b.slice == 0) ((S*)b.a.partial_den)[line] = (S)sum;
  if (O::SUMS == 2) sum += (A)((S*)b.a.partial_den)[line];
  sum *= (A)b.a.scale;
  if (O::ROWS && O::SUMS != 1 && b.slice == 0) ((S*)b.a.rows)[line] = (S)sum;
  b.share[i] = sum <= (A)b.a.eps ? (A)b.a.eps : sum;
}

// Some features of one row: what another direction has left, factors, the sum of weights.
template <class B, int V>
__device__ __forceinline__ void write(
    const B& b, const Rows<typename B::T>& out, int i, int e, typename B::A (&found)[V]) {
  typedef typename B::S S;
  typedef typename B::Flags O;
  if (i >= b.here_x) return;
  const int count = b.E - e;
  S* const partial = (S*)b.a.partial + b.line(i, b.a.N) * b.E + e;
  UNROLL for (int v = 0; v < V; ++v) {
    if (O::SUMS == 1 && v < count) partial[v] = (S)found[v];
    if (O::SUMS == 2 && v < count) found[v] += (typename B::A)partial[v];
    found[v] *= (typename B::A)b.a.scale;
    if (O::NORMALIZE) found[v] /= b.share[i];
  }
  if (O::SUMS != 1) give(out, i, e, count, found);
}

// Gradients of one thread's features of one row: turned back, times phi'.
template <class B>
__device__ __forceinline__ void write_line(
    B& b, const Rows<typename B::T>& out, int i, const typename B::Line& raw) {
  typedef typename B::A A;
  typedef typename B::Flags O;
  constexpr int V = B::V;
  const int count = b.E - b.e;
  const bool there = b.in_x(i);
  A* const own = b.W + i * B::W_PITCH + b.c_e * b.w_parts;
  A found[V], before[V] = {}, product = 0;
  UNROLL for (int v = 0; v < V; ++v) found[v] = there ? own[v * b.w_parts] : A(0);
  if (there) map(before, raw, count, NONE, A(1), A(0));
  UNROLL for (int v = 0; v < V; ++v) {
    const A mapped = there && v < count ? phi(O::FEATURE, before[v]) : A(0);
    if (b.OUTER && there) {
      A c, s;
      cos_sin(b.e_step[v] * (b.t + i + 1), &c, &s);
      const A across = c * own[v * 2 + 1] - s * found[v];
      found[v] = c * found[v] + s * own[v * 2 + 1];
      if (O::TURN && v < count) b.torque[v] += (double)(b.t + i + 1) * mapped * across * b.a.scale;
    }
    if (O::ROWS && v < count && there) product += mapped * found[v];
  }
  if (O::ROWS) own[0] = product * (A)b.a.scale;
  UNROLL for (int v = 0; v < V; ++v)
    if (O::FEATURE) found[v] *= slope(O::FEATURE, before[v]);
  write(b, out, i, b.e, found);
}

// Results are written from where they are; gradients line by line, from where w was.
template <class B> __device__ __forceinline__ void finish(B& b, typename B::A (&o)[4][B::COLUMNS]) {
  typedef typename B::A A;
  typedef typename B::Flags O;
  const Arguments& a = b.a;
  const auto out = b.rows(a.out, a.out_b, a.out_n, a.out_h, a.out_d);
  if (!O::GRADIENT) {
    if (O::NORMALIZE) __syncthreads();
    UNROLL for (int m = 0; m < 4; ++m) UNROLL for (int c = 0; c < B::COLUMNS; c += B::WIDTH) {
      A found[B::WIDTH];
      UNROLL for (int v = 0; v < B::WIDTH; ++v) found[v] = b.in_x(b.first_i + B::BAND * m) ? o[m][c + v] : A(0);
      write(b, out, b.first_i + B::BAND * m, b.slice * b.SLICE + b.first_c + c * 8, found);
    }
    return;
  }
  typename B::Line raw[B::ROWS_W];
  ask_columns(b, raw, b.rows(a.raw, a.raw_b, a.raw_n, a.raw_h, a.raw_d), b.here_x);
  __syncthreads();
  UNROLL for (int m = 0; m < 4; ++m)
    lay<8, B::WIDTH>(b.W + (b.first_i + B::BAND * m) * B::W_PITCH + b.first_c, o[m]);
  __syncthreads();
  const int first = anew(b.thread / b.E_GROUPS);
  UNROLL for (int u = 0; u < B::ROWS_W; ++u) {
    const int i = first + u * (B::THREADS / b.E_GROUPS);
    if (i < B::C) write_line(b, out, i, raw[u]);
  }
  if (!O::ROWS) return;
  __syncthreads();
  if (b.thread >= b.here_x) return;
  A sum = 0;
  for (int c = 0; c < b.SLICE; c += B::V) sum += b.W[b.thread * B::W_PITCH + c * b.w_parts];
  ((typename B::S*)a.rows)[b.slice * a.B * a.N * a.H + b.line(b.thread, a.N)] = (typename B::S)sum;
}

template <class B> __device__ __forceinline__ void write_turn(const B& b) {
  double* const all = (double*)b.X;  // [V threads]
  UNROLL for (int v = 0; v < B::V; ++v) all[v * B::THREADS + b.thread] = b.torque[v];
  __syncthreads();
  if (b.thread >= b.E_GROUPS) return;
  UNROLL for (int v = 0; v < B::V; ++v) {
    double sum = 0;
    for (int i = b.thread; i < B::THREADS; i += b.E_GROUPS) sum += all[v * B::THREADS + i];
    if (b.e + v < b.E) ((double*)b.a.turn)[(b.s * b.a.H + b.h) * b.E + b.e + v] = sum;
  }
}
