// Rows of features between memory and shared memory: a thread takes V neighbours of several rows.
//
// They are asked for at once, so that they are waited for once. Rows that are not there are read as the last
// one that is, and selected to zero later, as those are that a mask hides.
#pragma once

// Rows of an array from a step's first token on; together: V neighbours can be moved by one instruction.
template <class T> struct Rows {
  T* at;
  int64_t n, d;
  bool together;
};

template <int V, class T>
__device__ __forceinline__ Piece<T, V> ask(const Rows<T>& rows, int i, int here, int d, int count) {
  const T* const from = rows.at + (i < here ? i : here - 1) * rows.n + d * rows.d;
  if (here == 0) count = 0;
  if (rows.together && count >= V) return *(const Piece<T, V>*)from;
  Piece<T, V> line;
  UNROLL for (int v = 0; v < V; ++v) line.v[v] = v < count ? from[v * rows.d] : narrowed<T>(0.0f);
  return line;
}

// Every `apart`th row from i on.
template <int V, class T, int ROWS>
__device__ __forceinline__ void ask_all(
    Piece<T, V> (&lines)[ROWS], int used, const Rows<T>& rows, int i, int apart, int here, int d, int count) {
  const T* const from = rows.at + d;
  i = anew(i);
  if (rows.together && count >= V && here > 0) {
    UNROLL for (int u = 0; u < ROWS; ++u) {
      const int at = i + u * apart < here ? i + u * apart : here - 1;
      if (u < used) lines[u] = *(const Piece<T, V>*)(from + at * rows.n);
    }
  } else {
    UNROLL for (int u = 0; u < ROWS; ++u)
      if (u < used) lines[u] = ask<V>(rows, i + u * apart, here, d, count);
  }
}

template <class T, class A, int V>
__device__ __forceinline__ void give(const Rows<T>& rows, int i, int d, int count, const A (&x)[V]) {
  T* const to = rows.at + i * rows.n + d * rows.d;
  Piece<T, V> line;
  UNROLL for (int v = 0; v < V; ++v) line.v[v] = narrowed<T>(x[v]);
  if (rows.together && count >= V) {
    *(Piece<T, V>*)to = line;
  } else {
    UNROLL for (int v = 0; v < V; ++v)
      if (v < count) to[v * rows.d] = line.v[v];
  }
}

// As numbers: phi of features times a factor of the token; behind the last one the extra one.
template <class T, class A, int V>
__device__ __forceinline__ void map(
    A (&out)[V], const Piece<T, V>& line, int count, int feature, A by, A extra) {
  UNROLL for (int v = 0; v < V; ++v) {
    const A x = phi(feature, widened<A>(line.v[v])) * by;
    out[v] = v < count ? x : v == count ? extra : A(0);
  }
}

// To shared memory: as they are, or cosine and sine parts side by side.
template <class A, int V>
__device__ __forceinline__ void put(A* to, const A (&x)[V], bool both, const A (&c)[V], const A (&s)[V]) {
  Piece<A> low, high;
  UNROLL for (int v = 0; v < V; ++v) {
    low.v[v] = both ? x[v / 2] * (v % 2 ? s : c)[v / 2] : x[v];
    high.v[v] = both ? x[(V + v) / 2] * (v % 2 ? s : c)[(V + v) / 2] : A(0);
  }
  *(Piece<A>*)to = low;
  if (both) *(Piece<A>*)(to + V) = high;
}

// Some rows of x and y: of C contracted features and parts from f0 on.
template <class B, class Line, int ROWS>
__device__ __forceinline__ void ask_xy(const B& b, Line (&x)[ROWS], Line (&y)[ROWS], int f0, int first) {
  const Arguments& a = b.a;
  const auto of_x = b.rows(a.x, a.x_b, a.x_n, a.x_h, a.x_d), of_y = b.rows(a.y, a.y_b, a.y_n, a.y_h, a.y_d);
  const int d = f0 / b.parts + b.c_d;
  const int apart = B::THREADS / b.D_GROUPS, j = b.thread / b.D_GROUPS + first * apart, used = B::ALL_XY / b.parts;
  if (B::Flags::OUTPUT) ask_all(x, used, of_x, j, apart, b.here_x, d, b.D - d);
  if (b.ADDS) ask_all(y, used, of_y, j, apart, b.here_y, d, b.D - d);
}

template <class B, class Line, int ROWS>
__device__ __forceinline__ void put_xy(
    const B& b, const Line (&x)[ROWS], const Line (&y)[ROWS], int f0, int first) {
  typedef typename B::A A;
  typedef typename B::Flags O;
  constexpr int V = B::V;
  const int d = f0 / b.parts + b.c_d, feature = O::GRADIENT ? NONE : O::FEATURE;
  const int count = O::EXTRA || O::DO || feature == ELU ? b.D - d : V;  // others come as zeros, and stay so
  uint64_t step[V] = {};
  if (b.INNER && O::ANGLES == 2)
    UNROLL for (int v = 0; v < V; ++v) step[v] = d + v < b.D ? b.step_of(d + v, b.D) : 0;
  UNROLL for (int u = 0; u < ROWS; ++u) {
    if (u * b.parts >= B::ALL_XY) continue;
    const int j = b.thread / b.D_GROUPS + (first + u) * (B::THREADS / b.D_GROUPS);
    A of_x[V] = {}, of_y[V] = {}, c[V] = {}, s[V] = {};
    const A one = O::EXTRA ? 1 : 0;
    if (O::OUTPUT && b.in_x(j))
      map(of_x, x[u], count, feature, O::DO == 1 ? b.factor[j] : A(1), O::EXTRA == 1 ? b.extra[j] : one);
    if (b.ADDS && b.in_y(j))
      map(of_y, y[u], count, feature, O::DO == 2 ? b.factor[j] : A(1), O::EXTRA == 2 ? b.extra[j] : one);
    if (b.INNER) {
      UNROLL for (int v = 0; v < V; ++v) {
        if (O::ANGLES == 1) c[v] = b.cosine[j], s[v] = b.sine[j];
        else cos_sin(step[v] * (b.t + j + 1), c + v, s + v);
      }
    }
    put(b.X + j * B::PITCH + b.c_d * b.parts, of_x, b.INNER, c, s);
    put(b.Y + j * B::PITCH + b.c_d * b.parts, of_y, b.INNER, c, s);
  }
}

// Rows of w's features, of w itself or whatever else has them.
template <class B, class Line, int ROWS, class T>
__device__ __forceinline__ void ask_columns(const B& b, Line (&lines)[ROWS], const Rows<T>& rows, int here) {
  const int apart = B::THREADS / b.E_GROUPS, used = ROWS > b.w_parts ? ROWS / b.w_parts : 1;
  ask_all(lines, used, rows, b.thread / b.E_GROUPS, apart, here, b.e, b.E - b.e);
}

template <class B, class Line, int ROWS>
__device__ __forceinline__ void put_w(const B& b, const Line (&w)[ROWS]) {
  typedef typename B::A A;
  typedef typename B::Flags O;
  constexpr int V = B::V;
  const int feature = O::GRADIENT ? O::FEATURE : NONE, count = O::DO == 3 || feature == ELU ? b.E - b.e : V;
  UNROLL for (int u = 0; u < ROWS; ++u) {
    const int j = b.thread / b.E_GROUPS + u * (B::THREADS / b.E_GROUPS);
    if (j >= B::C) continue;
    A of_w[V] = {}, c[V] = {}, s[V] = {};
    if (b.in_y(j))
      map(of_w, w[u], count, feature, O::DO == 3 ? b.factor[j] : A(1), A(0));
    if (b.OUTER) UNROLL for (int v = 0; v < V; ++v) cos_sin(b.e_step[v] * (b.t + j + 1), c + v, s + v);
    put(b.W + j * B::W_PITCH + b.c_e * b.w_parts, of_w, b.OUTER, c, s);
  }
}
