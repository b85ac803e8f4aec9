// Constants that a state is multiplied by once a token, for as long as a text goes on.
#pragma once

#include "common.cuh"

// A constant in two numbers of one sign, neither 0 unless it is: a million steps of it are exact to the state's
// own rounding, and infinity times it is no NaN.
template <class S> struct Twice;
template <> struct Twice<float> {
  float high, low;
  Twice() = default;
  __device__ __forceinline__ Twice(double x) {
    union { double number; uint64_t bits; } cut = {x};
    cut.bits &= ~0x1fffffffull;  // what float32 holds
    high = (float)cut.number, low = (float)(x - cut.number + x * 8.673617379884035e-19);  // 2^-60
  }
};
template <> struct Twice<double> {
  double high;
  Twice() = default;
  __device__ __forceinline__ Twice(double x) : high(x) {}
};

// x c + rest, and x c + y d + rest: what S does not hold of the constants first, or it would be lost in y's product.
__device__ __forceinline__ float times(float x, const Twice<float>& c, float rest) {
  return fmaf(x, c.high, fmaf(x, c.low, rest));
}
__device__ __forceinline__ float times(float x, const Twice<float>& c, float y, const Twice<float>& d, float rest) {
  return fmaf(x, c.high, fmaf(y, d.high, fmaf(x, c.low, fmaf(y, d.low, rest))));
}
__device__ __forceinline__ double times(double x, const Twice<double>& c, double rest) {
  return fma(x, c.high, rest);
}
__device__ __forceinline__ double times(
    double x, const Twice<double>& c, double y, const Twice<double>& d, double rest) {
  return fma(x, c.high, fma(y, d.high, rest));
}

// Decay times a turn by an angle. Angles around a quarter of a turn take it first, by exchange: the larger product has
// to be added last, or its rounding leans one way for as long as the state comes back to nearly the same place.
template <class S> struct alignas(16) Turn {
  Twice<S> large, small;
  bool exchanged;

  Turn() = default;
  __device__ __forceinline__ Turn(double cosine, double sine) : Turn(cosine, sine, fabs(sine) > fabs(cosine)) {}
  __device__ __forceinline__ Turn(double cosine, double sine, bool exchanged)
      : large(exchanged ? sine : cosine), small(exchanged ? -cosine : sine), exchanged(exchanged) {}
  __device__ __forceinline__ void apply(S& cosine, S& sine, S added) const {
    const S x = exchanged ? -sine : cosine, y = exchanged ? cosine : sine;
    cosine = times(x, large, -y, small, added), sine = times(y, large, x, small, S(0));
  }
};

// COUNT of them in shared memory, an array: of more than 512 its parts lie apart, as padding would not fit.
template <class S, int COUNT> struct Apart {
  Twice<S> large[COUNT], small[COUNT];
  bool exchanged[COUNT];

  struct Place {
    Apart& all;
    const int i;

    __device__ __forceinline__ void operator=(const Turn<S>& turn) const {
      all.large[i] = turn.large, all.small[i] = turn.small, all.exchanged[i] = turn.exchanged;
    }
    __device__ __forceinline__ operator Turn<S>() const {
      Turn<S> turn;
      turn.large = all.large[i], turn.small = all.small[i], turn.exchanged = all.exchanged[i];
      return turn;
    }
  };
  __device__ __forceinline__ Place operator[](int i) { return {*this, i}; }
};
template <class S, int COUNT, bool APART = (COUNT > 512)> struct Turns {
  typedef Turn<S> Array[COUNT];
};
template <class S, int COUNT> struct Turns<S, COUNT, true> {
  typedef Apart<S, COUNT> Array;
};
