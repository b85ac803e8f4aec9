// The kernels as a library for the CPU: one compilation for every combination of flags.
#include "numbers.hpp"

#include "product.cu"

template <class T_, class A_> struct HostOptions : HostFlags<HostOptions<T_, A_>> {
  typedef T_ T;
  typedef A_ A;
  static constexpr int C = 32, BE = 16;
  static constexpr bool AHEAD = sizeof(T) == 4;  // one dtype each way
};

template <class O> static void body(const void* arguments) { product<O>(*(const Arguments*)arguments); }

template <class T, class A> static void run(const Arguments* arguments, const int64_t* flags, int64_t grid) {
  typedef HostOptions<T, A> O;
  O::set(flags);
  const int64_t parts = O::ANGLES == 1 || (O::ANGLES == 2 && !O::GRADIENT) ? 2 : 1;
  const int64_t shared = shared_bytes(sizeof(A), O::C, O::BE, parts * (arguments->D + (O::EXTRA ? 1 : 0)));
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx.x = (int)i;
    fibers::block(threads_of(O::C, O::BE), shared, body<O>, arguments);
  }
}

#ifdef NARROW
extern "C" void product_f16_f64(const Arguments* a, const int64_t* flags, int64_t grid) {
  run<__half, double>(a, flags, grid);
}
extern "C" void product_bf16_f64(const Arguments* a, const int64_t* flags, int64_t grid) {
  run<__nv_bfloat16, double>(a, flags, grid);
}
#else
extern "C" void product_f32(const Arguments* a, const int64_t* flags, int64_t grid) {
  run<float, float>(a, flags, grid);
}
extern "C" void product_f64(const Arguments* a, const int64_t* flags, int64_t grid) {
  run<double, double>(a, flags, grid);
}
extern "C" void product_f32_f64(const Arguments* a, const int64_t* flags, int64_t grid) {
  run<float, double>(a, flags, grid);
}
#endif
extern "C" int64_t arguments_size() { return sizeof(Arguments); }
extern "C" int64_t shared_bytes_of(int64_t size, int64_t C, int64_t BE, int64_t F) { return shared_bytes(size, C, BE, F); }
