// From sums to results, in the warp that holds their rows: pairs times w, then whatever follows feature by feature.
//
// Rows of memory pass through the warp's own rows of X, which nobody else reads: as pieces of 16 bytes on one side,
// as sums are spread over lanes on the other.
#pragma once

// A warp's rows of features of w: a lane has V of them of several rows, from column c on.
template <class B> struct Own {
  typedef typename B::Line Line;
  static constexpr int MOST = 16 * B::BE / B::V / 32;
  const B& b;
  const int first, step, count, c, e;
  char* const at;

  __device__ __forceinline__ explicit Own(const B& of)
      : b(of), first(16 * of.warp + of.lane / of.E_GROUPS), step(32 / of.E_GROUPS), count(MOST / of.w_parts),
        c(of.lane % of.E_GROUPS * B::V), e(of.slice * of.SLICE + c),
        at(of.X + first * B::PITCH + c * sizeof(typename B::T)) {}
  __device__ __forceinline__ Line* place(int u) const { return (Line*)(at + u * step * B::PITCH); }
  __device__ __forceinline__ bool whole(const Rows<typename B::T>& rows) const {
    return rows.together && b.E - e >= B::V;
  }

  __device__ __forceinline__ void ask(Line (&lines)[MOST], const Rows<typename B::T>& rows, int here) const {
    if (whole(rows)) {
      const typename B::T* from = rows.at + first * rows.n + e;
      UNROLL for (int u = 0; u < MOST; ++u, from += step * rows.n)
        if (u < count && first + u * step < here) lines[u] = *(const Line*)from;
    } else {
      ONE_BY_ONE for (int u = 0; u < count; ++u) {
        const int i = first + u * step;
        if (i < here) gather(place(u), rows.at + i * rows.n + e * rows.d, rows.d, b.E - e);
      }
    }
  }
  __device__ __forceinline__ void keep(const Line (&lines)[MOST], const Rows<typename B::T>& rows) const {
    if (whole(rows)) UNROLL for (int u = 0; u < MOST; ++u) if (u < count) *place(u) = lines[u];
  }
  __device__ __forceinline__ void give(const Rows<typename B::T>& rows, int here) const {
    if (whole(rows)) {
      typename B::T* to = rows.at + first * rows.n + e;
      UNROLL for (int u = 0; u < MOST; ++u, to += step * rows.n)
        if (u < count && first + u * step < here) *(Line*)to = *place(u);
    } else {
      ONE_BY_ONE for (int u = 0; u < count; ++u) {
        const int i = first + u * step;
        ONE_BY_ONE for (int v = 0; v < B::V && i < here && e + v < b.E; ++v)
          rows.at[i * rows.n + (e + v) * rows.d] = ((const typename B::T*)place(u))[v];
      }
    }
  }
};

// Pairs times the decay between them, then times w: the second part of out, beside the state's.
template <class B>
__device__ __forceinline__ void add_pairs(
    const B& b, float (&out)[B::COLUMNS][4], float (&pairs)[B::C / 8][4]) {
  typedef typename B::Flags O;
  typedef typename B::Op Op;
  UNROLL for (int k = 0; k < B::STEPS; ++k) {
    if (O::REVERSE ? (k + 1) * Op::K <= 16 * b.warp : k * Op::K >= 16 * b.warp + 16) continue;
    UNROLL for (int n = k * Op::K / 8; n < (k + 1) * Op::K / 8; ++n)
      UNROLL for (int v = 0; v < 4; ++v)
        pairs[n][v] = kept(pairs[n][v], b.between(16 * b.warp + b.group + v / 2 * 8, 8 * n + b.first + v % 2));
    uint32_t left[4];
    Op::from_sums(left, pairs + k * Op::K / 8);
    b.add_columns(out, left, b.w_at + k * Op::K * B::W_PITCH);
  }
}

// What to multiply a lane's two rows by, for their sums of weights.
template <class B>
__device__ __forceinline__ void quotients(const B& b, const Span& span, const float (&ones)[4], float (&by)[2]) {
  typedef typename B::Flags O;
  const Arguments& a = b.a;
  UNROLL for (int below = 0; below < 2; ++below) {
    const int i = 16 * b.warp + b.group + 8 * below;
    float sum = __shfl_sync(~0u, ones[2 * below] + ones[2 * below + 1], b.lane & ~3);
    if (i < span.here_x) {
      float* const partial = (float*)a.partial_den + b.line(span, i, a.N);
      const bool one_of_all = b.slice == 0 && b.first == 0;
      if (O::SUMS == 1 && one_of_all) *partial = sum;
      if (O::SUMS == 2) sum += *partial;
      sum *= (float)a.scale;
      if (O::ROWS && O::SUMS != 1 && one_of_all) ((float*)a.rows)[b.line(span, i, a.N)] = sum;
    }
    by[below] = (float)a.scale / (sum <= (float)a.eps ? (float)a.eps : sum);
  }
}

template <class B>
__device__ __forceinline__ void finish(
    const B& b, float (&out)[B::COLUMNS][4], float (&pairs)[B::C / 8][4], const Span& span) {
  typedef typename B::Flags O;
  typedef typename B::T T;
  typedef typename B::Line Line;
  const Arguments& a = b.a;
  const Rows<T> of_raw = b.rows(span, a.raw, a.raw_b, a.raw_n, a.raw_h, a.raw_d);
  Line raw[Own<B>::MOST];
  __syncwarp();
  if (O::GRADIENT) Own<B>(b).ask(raw, of_raw, span.here_x);
  if (O::DECAY) UNROLL for (int below = 0; below < 2; ++below) {
      const float near = b.of(NEAR)[16 * b.warp + b.group + 8 * below];
      UNROLL for (int n = 0; n < B::COLUMNS; ++n)
        UNROLL for (int v = 2 * below; v < 2 * below + 2; ++v) out[n][v] = kept(out[n][v], near);
    }
  if (b.PAIRED) add_pairs(b, out, pairs);
  float by[2];
  if (O::NORMALIZE) quotients(b, span, out[B::ONES], by);
  if (O::GRADIENT) {
    Own<B>(b).keep(raw, of_raw);
    __syncwarp();
  }
  UNROLL for (int below = 0; below < 2; ++below) {
    const int i = forgotten(16 * b.warp + b.group + 8 * below);
    const bool there = b.in_x(span, i);
    float product = 0;
    UNROLL for (int n = 0; n < B::ONES; ++n) {
      float found[2] = {there ? out[n][2 * below] : 0.0f, there ? out[n][2 * below + 1] : 0.0f};
      const int c = b.OUTER ? 4 * n + b.first / 2 : 8 * n + b.first, e = b.slice * b.SLICE + c;
      T* const passage = (T*)(b.X + i * B::PITCH) + c;
      if (b.OUTER) {
        float cosine, sine;
        quick_cos_sin(b.turns[c] * (uint64_t)(span.t + i + 1), &cosine, &sine);
        found[0] = cosine * found[0] + sine * found[1];
      }
      float* const partial = (float*)a.partial + b.line(span, i, a.N) * b.E + e;
      UNROLL for (int v = 0; v < 2; ++v) {
        if (b.OUTER && v) continue;
        const bool real = e + v < b.E && i < span.here_x;
        const float before = O::GRADIENT && there && e + v < b.E ? widened<float>(passage[v]) : 0.0f;
        if (O::GRADIENT && O::ROWS && there && e + v < b.E) product += quick_phi(O::FEATURE, before) * found[v];
        if (O::SUMS == 1) {
          if (real) partial[v] = found[v];
          continue;
        }
        if (O::SUMS == 2 && real) found[v] += partial[v];
        found[v] *= O::NORMALIZE ? by[below] : (float)a.scale;
        if (O::GRADIENT && O::FEATURE) found[v] *= quick_slope(O::FEATURE, before);
        passage[v] = narrowed<T>(found[v]);
      }
    }
    if (O::GRADIENT && O::ROWS) {
      product += __shfl_xor_sync(~0u, product, 1);
      product += __shfl_xor_sync(~0u, product, 2);
      if (b.first == 0 && i < span.here_x)
        ((float*)a.rows)[b.slice * a.B * a.N * a.H + b.line(span, i, a.N)] = product * (float)a.scale;
    }
  }
  __syncwarp();
  if (O::SUMS == 1) return;
  Own<B>(b).give(b.rows(span, a.out, a.out_b, a.out_n, a.out_h, a.out_d), span.here_x);
}
