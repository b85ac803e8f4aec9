// Rows of features from memory to operands of tensor.cu: a thread asks for 16 bytes of several rows, ahead of their
// use, and finds them in slots of its own; then it rounds what becomes of them, for tiles that all threads read.
#pragma once

// Tokens of a step; fewer of x or of y, where their lengths differ.
struct Span {
  int64_t t;  // the first one
  int here, here_x, here_y;
};

// What is known of each of them, whichever feature: the decay from the state to it and from it to the state, a factor
// of the gradient of the output, the one contracted feature more, one angle for all, sums of log decays, the mask.
enum Table { NEAR, FAR, FACTOR, MORE, COSINE, SINE, HIGH, LOW, SHOWN, TABLES };

// How a thread's pieces of V features lie in rows: `groups` of them in one.
struct Pieces {
  int first, step, count;  // rows: the first, how much further the next one is; how many
};

// One piece, element by element; what lies behind the last feature is 0.
template <class Line, class T>
__device__ __forceinline__ void gather(Line* to, const T* from, int64_t step, int count) {
  constexpr int V = sizeof(Line) / sizeof(T);
  ONE_BY_ONE for (int v = 0; v < V; ++v) ((T*)to)[v] = v < count ? from[v * step] : narrowed<T>(0.0f);
}

// Features from d on, of `count` that are left, to slots from `slot` on. Rows that are not there stay as they are.
template <int MOST, class B, class T>
__device__ __forceinline__ void ask_ahead(
    const B& b, int slot, const Rows<T>& rows, const Pieces& pieces, int here, int d, int count) {
  typedef typename B::Line Line;
  if (rows.together && count >= B::V) {
    const T* from = rows.at + forgotten(pieces.first) * rows.n + d;
    UNROLL for (int u = 0; u < MOST; ++u, from += pieces.step * rows.n)
      if (u < pieces.count && pieces.first + u * pieces.step < here) copy_ahead(place(b.slot(slot + u)), from);
  } else {
    ONE_BY_ONE for (int u = 0; u < pieces.count; ++u) {
      const int i = pieces.first + u * pieces.step;
      if (i < here) gather((Line*)b.slot(slot + u), rows.at + i * rows.n + d * rows.d, rows.d, count);
    }
  }
}

// Of x and y: a chunk of C contracted features and parts.
template <class B> __device__ __forceinline__ void ask_xy(const B& b, const Span& span, int chunk) {
  const Arguments& a = b.a;
  const int d = chunk * (B::C / b.parts) + b.c_d;
  if (B::Flags::OUTPUT)
    ask_ahead<B::ROWS_XY>(
        b, 0, b.rows(span, a.x, a.x_b, a.x_n, a.x_h, a.x_d), b.of_xy(), span.here_x, d, b.D - d);
  if (b.ADDS)
    ask_ahead<B::ROWS_XY>(
        b, B::ROWS_XY, b.rows(span, a.y, a.y_b, a.y_n, a.y_h, a.y_d), b.of_xy(), span.here_y, d, b.D - d);
}

template <class B> __device__ __forceinline__ void ask_w(const B& b, const Span& span) {
  const Arguments& a = b.a;
  ask_ahead<B::ROWS_W>(
      b, 2 * B::ROWS_XY, b.rows(span, a.w, a.w_b, a.w_n, a.w_h, a.w_d), b.of_w(), span.here_y, b.e, b.E - b.e);
}

// What becomes of a piece: phi times a factor, behind the last feature one more; then as it is, or cosine and sine
// parts side by side. 0 for a token that is not there.
template <class B, int V>
__device__ __forceinline__ void put(
    char* to, const char* slot, bool there, int count, int feature, bool weighed, float by, bool more, float extra,
    bool both, const float (&c)[V], const float (&s)[V]) {
  typedef typename B::Op Op;
  typename B::Line line = *(const typename B::Line*)slot;
  if (Op::maps(feature)) Op::map(line, feature), feature = NONE;
  if (Op::AS_THEY_ARE && feature == NONE && !weighed && !more && !both) {
    Op::lay_raw(to, line, there);
    return;
  }
  float x[V];
  UNROLL for (int v = 0; v < V; ++v) {
    x[v] = quick_phi(feature, widened<float>(line.v[v]));
    if (weighed) x[v] *= by;
    if (feature == ELU && v >= count) x[v] = 0;
    if (more && v == count) x[v] = extra;
  }
  if (!both) {
    Op::lay_all(to, x, there);
    return;
  }
  float low[V], high[V];
  UNROLL for (int v = 0; v < V; ++v) {
    low[v] = x[v / 2] * (v % 2 ? s : c)[v / 2];
    high[v] = x[(V + v) / 2] * (v % 2 ? s : c)[(V + v) / 2];
  }
  Op::lay_all(to, low, there);
  Op::lay_all(to + V * Op::SIZE, high, there);
}

template <class B> __device__ __forceinline__ void put_xy(const B& b, const Span& span, int chunk) {
  typedef typename B::Flags O;
  constexpr int V = B::V;
  const int d = chunk * (B::C / b.parts) + b.c_d, count = b.D - d, feature = O::GRADIENT ? NONE : O::FEATURE;
  const Pieces pieces = b.of_xy();
  uint64_t step[V];
  if (b.INNER && O::ANGLES == 2) UNROLL for (int v = 0; v < V; ++v) step[v] = v < count ? b.turns[d + v] : 0;
  UNROLL for (int u = 0; u < B::ROWS_XY; ++u) {
    if (u >= pieces.count) continue;
    const int j = pieces.first + u * pieces.step;
    float c[V] = {}, s[V] = {};
    if (b.INNER) {
      UNROLL for (int v = 0; v < V; ++v) {
        if (O::ANGLES == 1) c[v] = b.of(COSINE)[j], s[v] = b.of(SINE)[j];
        else quick_cos_sin(step[v] * (uint64_t)(span.t + j + 1), c + v, s + v);
      }
    }
    const int at = j * B::PITCH + b.c_d * b.parts * B::Op::SIZE;
    const float by = O::DO == 1 || O::DO == 2 ? b.of(FACTOR)[j] : 1.0f, extra = O::EXTRA ? b.of(MORE)[j] : 0.0f;
    if (O::OUTPUT)
      put<B>(b.X + at, b.slot(u), b.in_x(span, j), count, feature, O::DO == 1, by, O::EXTRA,
             O::EXTRA == 1 ? extra : 1.0f, b.INNER, c, s);
    if (b.ADDS)
      put<B>(b.Y + at, b.slot(B::ROWS_XY + u), b.in_y(span, j), count, feature, O::DO == 2, by, O::EXTRA,
             O::EXTRA == 2 ? extra : 1.0f, b.INNER, c, s);
  }
}

template <class B> __device__ __forceinline__ void put_w(const B& b, const Span& span) {
  typedef typename B::Flags O;
  constexpr int V = B::V;
  const Pieces pieces = b.of_w();
  UNROLL for (int u = 0; u < B::ROWS_W; ++u) {
    if (u >= pieces.count) continue;
    const int j = pieces.first + u * pieces.step;
    float c[V] = {}, s[V] = {};
    if (b.OUTER)
      UNROLL for (int v = 0; v < V; ++v)
        quick_cos_sin(b.turns[b.c_e + v] * (uint64_t)(span.t + j + 1), c + v, s + v);
    put<B>(b.W + j * B::W_PITCH + b.c_e * b.w_parts * B::Op::SIZE, b.slot(2 * B::ROWS_XY + u), b.in_y(span, j),
           b.E - b.e, O::GRADIENT ? O::FEATURE : NONE, O::DO == 3, O::DO == 3 ? b.of(FACTOR)[j] : 1.0f, false, 0,
           b.OUTER, c, s);
  }
}
