// What a launch of the product is told: arrays and numbers when it runs, options when it is compiled.
#pragma once

#ifdef __CUDACC_RTC__
typedef long long int64_t;
#else
#include <cstdint>
#endif

// Fields of 8 bytes each: arrays (null where a launch has none), strides in elements, sizes, numbers.
struct Arguments {
  void *x, *y, *w, *raw, *out;
  int64_t x_b, x_n, x_h, x_d;
  int64_t y_b, y_n, y_h, y_d;
  int64_t w_b, w_n, w_h, w_d;
  int64_t raw_b, raw_n, raw_h, raw_d;
  int64_t out_b, out_n, out_h, out_d;
  void *log_decay;
  int64_t g_b, g_n, g_h;
  void *theta;
  double angle;
  void *mask;
  int64_t mask_b, mask_n;
  void *borders;
  void *den, *extra;
  int64_t extra_n;
  void *start, *start_z, *final, *final_z;
  void *slots;
  int64_t pool;
  void *partial, *partial_den;
  void *rows, *turn;
  int64_t B, N, M, H, D, E;
  double scale, do_scale, eps;
};

__host__ __device__ constexpr int threads_of(int C, int BE) { return C * BE > 2048 ? C * BE / 16 : 128; }

// Blocks for which the registers of a multiprocessor suffice without spilling.
__host__ __device__ constexpr int blocks_of(int threads) { return threads > 128 ? 1 : 2; }

// x, y, w, raw, out: T [B N H features]; y and w have M tokens, x, raw and out N (another number only with
// TOTAL or SUMS). Of x and y D features are contracted, besides the extra one; w, raw and out have E. log_decay S [H]
// or [B N H]; theta float64 [H features]; mask bool [B keys]; borders int64 [S] or [S + 1]; den S [B tokens
// H] and extra S [B H extra_n], of the tokens of the gradient of the output; start and final S [S H F E],
// their z [S H F]; slots int64 [S]; partial S [B N H E], partial_den S [B N H]; rows S [slices B N H], with
// NORMALIZE [B N H]; turn float64 [S H E].
template <
    class T_, class A_, int C_, int BE_, int FEATURE_, int ANGLES_, int DECAY_, int REVERSE_, int STRICT_,
    int GRADIENT_, int NORMALIZE_, int EXTRA_, int MASK_, int BORDERS_, int TOTAL_, int OUTPUT_, int SUMS_,
    int ROWS_, int TURN_, int DO_>
struct Options {
  typedef T_ T;  // of inputs and results
  typedef A_ A;  // of arithmetic
  static constexpr int C = C_;                  // tokens of a block: 32 or 64
  static constexpr int BE = BE_;                // columns of a slice: 16, 32 or 64
  static constexpr int FEATURE = FEATURE_;      // of x and y, of w with GRADIENT
  static constexpr int ANGLES = ANGLES_;        // 0 none, 1 one for all, 2 one for each head and feature
  static constexpr int DECAY = DECAY_;          // 0 none, 1 per head, 2 per token
  static constexpr int REVERSE = REVERSE_;      // j >= i instead of j <= i
  static constexpr int STRICT = STRICT_;        // i is not its own j
  static constexpr int GRADIENT = GRADIENT_;    // of w's features: times phi'(raw)
  static constexpr int NORMALIZE = NORMALIZE_;  // divided by the sum of weights; not with EXTRA
  static constexpr int EXTRA = EXTRA_;          // one more contracted feature: extra in x (1) or y (2)
  static constexpr int MASK = MASK_;            // hides keys among y and w (1), among x and out (2)
  static constexpr int BORDERS = BORDERS_;      // 1 lengths, 2 sequences back to back
  static constexpr int TOTAL = TOTAL_;          // all read one whole state; without OUTPUT it is formed
  static constexpr int OUTPUT = OUTPUT_;        // 0: only the state
  static constexpr int SUMS = SUMS_;            // two directions: 1 keeps bare sums, 2 adds them
  static constexpr int ROWS = ROWS_;            // keeps phi(raw) . gradient, or the sums of weights
  static constexpr int TURN = TURN_;            // the gradient of angles, from the sequence's beginning
  static constexpr int DO = DO_;                // which of x (1), y (2), w (3) is the gradient of the output

  // A block that is alone on a multiprocessor asks for lines while it computes with those before.
  static constexpr bool AHEAD = blocks_of(threads_of(C, BE)) == 1;
};

// Features that are read one after the other without asking how many there are, and rows of a state, in whole ones.
constexpr int AT_ONCE = 16;
__host__ __device__ constexpr int64_t rows_of(int64_t F) { return (F + AT_ONCE - 1) / AT_ONCE * AT_ONCE; }

// Bytes of shared memory; F contracted features, EXTRA's and both parts of each included.
__host__ __device__ constexpr int64_t shared_bytes(int64_t size, int64_t C, int64_t BE, int64_t F) {
  const int64_t rows = rows_of(F);
  return size * (C * (2 * C + BE + 5) + threads_of(C, BE) + rows * (BE + 1)) + 84 * C;
}
