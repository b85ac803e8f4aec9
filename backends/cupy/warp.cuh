// What kernels for tensor cores share: pieces of shared memory in a warp, roundings, feature maps as exact as operands
// need.
#pragma once

#ifdef __CUDACC__
typedef unsigned int uint32_t;

__device__ __forceinline__ uint32_t place(const void* in_shared_memory) {
  return (uint32_t)__cvta_generic_to_shared(in_shared_memory);
}

// 8 x 8 pieces of 16-bit numbers from shared memory: lane l has the address of row l % 8 of piece l / 8. Of a
// piece, or (turned) of its transpose, a lane gets columns 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_4(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_4_turned(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

// Numbers rounded to nearest: two bfloat16 in one register, or one tf32.
__device__ __forceinline__ uint32_t rounded_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t rounded_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t relu_of_both(uint32_t both) {  // of two bfloat16; a NaN stays one
  uint32_t found;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(both), "r"(0));
  return found;
}

// As exact as operands need.
__device__ __forceinline__ float quick_exponential(float x) { return __expf(x); }
__device__ __forceinline__ float quick_quotient(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ void quick_cos_sin(uint64_t phase, float* c, float* s) {
  __sincosf((float)(int)(phase >> 32) * 1.4629180792671596e-09f, s, c);  // pi 2^-31
}
#endif

// Of two bfloat16 in one register.
__device__ __forceinline__ float low_of(uint32_t both) { return from_bits(both << 16); }
__device__ __forceinline__ float high_of(uint32_t both) { return from_bits(both & 0xffff0000u); }

__device__ __forceinline__ float quick_phi(int feature, float x) {
  if (feature == RELU) return x <= 0 ? 0.0f : x;  // a NaN stays one
  if (feature == SILU) return quick_quotient(x, 1 + quick_exponential(-x));
  if (feature == ELU) return x > 0 ? x + 1 : quick_exponential(x);
  return x;
}
__device__ __forceinline__ float quick_slope(int feature, float x) {
  if (feature == RELU) return x > 0 ? 1.0f : 0.0f;
  if (feature == SILU) {
    const float s = quick_quotient(1, 1 + quick_exponential(-x));
    return s * (1 + x * (1 - s));
  }
  if (feature == ELU) return x > 0 ? 1.0f : quick_exponential(x);
  return 1;
}
