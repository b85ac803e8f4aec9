// The kernel for tensor cores as a library for the CPU: a compilation for a dtype and a shape of blocks.
#include "warps.hpp"

#include "tensor.cu"

template <class T_, int BE_, int HELD_> struct HostWarps : HostFlags<HostWarps<T_, BE_, HELD_>> {
  typedef T_ T;
  typedef float A;
  static constexpr int C = 64, BE = BE_, HELD = HELD_;
};

typedef HostWarps<HOST_T, HOST_BE, HOST_HELD> Chosen;
static void body(const void* arguments) { tensor<Chosen>(*(const Arguments*)arguments); }

extern "C" int64_t tensor_bytes(int64_t F, int64_t turns, int64_t normalize) {
  return Places<HOST_T, HOST_BE, HOST_HELD>::bytes(F, turns, normalize);
}
extern "C" void tensor_chosen(const Arguments* a, const int64_t* flags, int64_t grid) {
  typedef Chosen O;
  O::set(flags);
  const bool outer = O::ANGLES == 2 && O::GRADIENT;
  const int64_t parts = O::ANGLES && !outer ? 2 : 1, turns = O::ANGLES < 2 ? O::ANGLES : outer ? 32 : a->D;
  const int64_t shared = tensor_bytes(parts * (a->D + (O::EXTRA ? 1 : 0)), turns, O::NORMALIZE);
  warps::reachable = shared;
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx.x = (int)i;
    fibers::block(128, shared, body, a);
  }
}
