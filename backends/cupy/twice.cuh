// Constants that a state is multiplied by once a token, for as long as a text goes on.
#pragma once

#include "common.cuh"

// A constant in two numbers of one sign, neither 0 unless it is: a million steps of it are exact to the state's
// own rounding, and infinity times it is no NaN.
template <class S> struct Twice;
template <> struct Twice<float> {
  float high, low;
  __device__ __forceinline__ Twice() {}
  __device__ __forceinline__ Twice(double x) {
    union { double number; uint64_t bits; } cut = {x};
    cut.bits &= ~0x1fffffffull;  // what float32 holds
    high = (float)cut.number, low = (float)(x - cut.number + x * 8.673617379884035e-19);  // 2^-60
  }
};
template <> struct Twice<double> {
  double high;
  __device__ __forceinline__ Twice() {}
  __device__ __forceinline__ Twice(double x) : high(x) {}
};

// x c + rest.
__device__ __forceinline__ float times(float x, const Twice<float>& c, float rest) {
  return fmaf(x, c.high, fmaf(x, c.low, rest));
}
__device__ __forceinline__ double times(double x, const Twice<double>& c, double rest) {
  return fma(x, c.high, rest);
}
