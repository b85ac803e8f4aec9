// The kernels around the product as a library for the CPU.
#include "numbers.hpp"

#define __shared__ static
#include "between.cu"

static void run(int64_t grid, void (*kernel)(const void*), const void* arguments) {
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx.x = (int)i;
    fibers::block(THREADS, 0, kernel, arguments);
  }
}

template <class T> static void quotient(const void* a) { denominator_gradient<T>(*(const Quotient*)a); }
template <class S, int PER_TOKEN, int BORDERS> static void suffixes(const void* a) {
  suffix_sums<S, PER_TOKEN, BORDERS>(*(const Suffixes*)a);
}

extern "C" void denominator_gradient_f32(const void* a, const int64_t*, int64_t grid) { run(grid, quotient<float>, a); }
extern "C" void denominator_gradient_f64(const void* a, const int64_t*, int64_t grid) { run(grid, quotient<double>, a); }
extern "C" void denominator_gradient_f16(const void* a, const int64_t*, int64_t grid) { run(grid, quotient<__half>, a); }
extern "C" void denominator_gradient_bf16(const void* a, const int64_t*, int64_t grid) {
  run(grid, quotient<__nv_bfloat16>, a);
}

template <class S> static void suffixes_of(const void* a, const int64_t* flags, int64_t grid) {
  void (*const all[])(const void*) = {suffixes<S, 0, 0>, suffixes<S, 0, 1>, suffixes<S, 0, 2>,
                                      suffixes<S, 1, 0>, suffixes<S, 1, 1>, suffixes<S, 1, 2>};
  run(grid, all[flags[0] * 3 + flags[1]], a);
}
extern "C" void suffix_sums_f32(const void* a, const int64_t* flags, int64_t grid) { suffixes_of<float>(a, flags, grid); }
extern "C" void suffix_sums_f64(const void* a, const int64_t* flags, int64_t grid) { suffixes_of<double>(a, flags, grid); }

template <class S, int BORDERS> static void rows(const void* a) { keep_rows<S, BORDERS>(*(const Rows*)a); }
template <class S> static void rows_of(const void* a, const int64_t* flags, int64_t grid) {
  void (*const all[])(const void*) = {rows<S, 0>, rows<S, 1>, rows<S, 2>};
  run(grid, all[flags[0]], a);
}
extern "C" void keep_rows_f32(const void* a, const int64_t* flags, int64_t grid) { rows_of<float>(a, flags, grid); }
extern "C" void keep_rows_f64(const void* a, const int64_t* flags, int64_t grid) { rows_of<double>(a, flags, grid); }
