// The kernel for all layers as a library for the CPU: a compilation for a feature map and an inner width.
#include "grid.hpp"

#include "persistent.cu"

extern "C" void persistent_bytes(int64_t* found) {
  found[0] = sizeof(Call), found[1] = SLOTS * STAGE + sizeof(Shared), found[2] = sizeof(Exchange<HOST_INNER>);
}
// Words of one place come later than all others: of the `late`-th, or of none. A warp of each block may be tired. Races
// are looked for in a block that the seed says.
extern "C" void persistent_run(const Call* call, uint32_t seed, int late, int tired) {
  grid::watched = (int)(seed * 37 % BLOCKS);
  Exchange<HOST_INNER>& ex = *(Exchange<HOST_INNER>*)call->token.exchange;
  char* const places[] = {(char*)&ex,     (char*)ex.rows,    (char*)ex.shares, (char*)ex.v,     (char*)ex.u,
                          (char*)ex.qk,   (char*)ex.squares, (char*)ex.mixed,  (char*)ex.inner, (char*)(&ex + 1)};
  grid::slow_from = late ? places[late] : nullptr, grid::slow_to = late ? places[late + 1] : nullptr;
  grid::tired = tired;
  grid::launch(BLOCKS, THREADS, seed, [=] { persistent<HOST_FEATURE, HOST_INNER>(*call); });
}
