// The decode step as a library for the CPU: one compilation for every combination of flags.
#include "numbers.hpp"

#define __shared__ static
#include "decode.cu"

template <class T_, int W_, int WIDEST_> struct HostChoice {
  typedef T_ T;
  static constexpr int THREADS = 256, W = W_, LANES = 256 / W_, AT_ONCE = 2, WIDEST = WIDEST_;
  static constexpr int TURNS = WIDEST, FULL = 0;
  static inline int FEATURE, ANGLES, DECAY, NORMALIZE;
};

template <class O> static void body(const void* arguments) { decode<O>(*(const Step*)arguments); }

template <class O> static void run_as(const void* arguments, const int64_t* flags, int64_t grid) {
  O::FEATURE = (int)flags[0], O::ANGLES = (int)flags[1], O::DECAY = (int)flags[2], O::NORMALIZE = (int)flags[3];
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx.x = (int)i;
    fibers::block(O::THREADS, 0, body<O>, arguments);
  }
}

template <class T> static void run(const void* a, const int64_t* flags, int64_t grid) {
  if (((const Step*)a)->D > 256) run_as<HostChoice<T, 1, 1024>>(a, flags, grid);
  else run_as<HostChoice<T, 1, 256>>(a, flags, grid);
}
extern "C" void decode_f32(const void* a, const int64_t* flags, int64_t grid) { run<float>(a, flags, grid); }
extern "C" void decode_f64(const void* a, const int64_t* flags, int64_t grid) { run<double>(a, flags, grid); }
extern "C" void decode_f16(const void* a, const int64_t* flags, int64_t grid) { run<__half>(a, flags, grid); }
extern "C" void decode_bf16(const void* a, const int64_t* flags, int64_t grid) { run<__nv_bfloat16>(a, flags, grid); }
