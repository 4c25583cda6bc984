// The processor's fp32 multiply-add limit: independent chains of a = a * x + y in registers, no memory.
#include <stdint.h>

#if defined(__AVX512F__)
enum { kLanes = 16 };
#elif defined(__AVX__)
enum { kLanes = 8 };
#else
enum { kLanes = 4 };
#endif
enum { kChains = 12 };  // two units with a latency of 4 to 5 cycles need 8 to 10; AVX2 has 16 registers
typedef float Vec __attribute__((vector_size(4 * kLanes)));

// One flop is a multiplication or an addition.
int64_t flops_per_iteration(void) { return 2 * kChains * kLanes; }

float run(int64_t iterations, float x, float y) {
  Vec chain[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) chain[c] = (Vec){0} + (float)c;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chain[c] = chain[c] * x + y;
  }
  Vec sum = chain[0];
#pragma GCC unroll 12
  for (int c = 1; c < kChains; ++c) sum += chain[c];
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}
