// The bf16 product behind reference.linear: a panel of 48 rows by a tile of 8 tokens, for processors that multiply pairs of bf16
// (AVX512-BF16). A lane of a vector is a row, so no sum runs across lanes.
#pragma once
#include <cstdint>
#include "noise.hpp"

constexpr int BF16_PANEL = 48, BF16_TILE = 8;  // 24 accumulators, of 32 registers

#if defined(__x86_64__) && defined(__GNUC__)
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))

static bool multiplies_bf16() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

// rows: (BF16_PANEL, pairs) -> panel: (pairs, BF16_PANEL), two columns in each word. Squares of 16 x 16 words are turned by
// swapping their quarters, then the quarters of these, down to single words.
BF16_TARGET static void interleave(const uint32_t *rows, int64_t pairs, uint32_t *panel) {
    for (int r = 0; r < BF16_PANEL; r += 16)
        for (int64_t q = 0; q < pairs; q += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(rows + (r + i) * pairs + q);
#pragma GCC unroll 4
            for (int half = 8; half > 0; half /= 2) {
                const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), distance = _mm512_set1_epi32(half);
                const __mmask16 right = _mm512_test_epi32_mask(lane, distance);
                const __m512i other = _mm512_set1_epi32(16);
                const __m512i upper = _mm512_mask_add_epi32(lane, right, _mm512_sub_epi32(lane, distance), other);
                const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, distance), right, lane, other);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    if (i & half) continue;
                    const __m512i a = v[i], b = v[i + half];
                    v[i] = _mm512_permutex2var_epi32(a, upper, b), v[i + half] = _mm512_permutex2var_epi32(a, lower, b);
                }
            }
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (q + i) * BF16_PANEL + r, v[i]);
        }
}

// x: BF16_TILE rows of `pairs` words. The accumulators have names, and their products are written in assembly: GCC 12 would keep
// an array of 24 in memory and copy it around the intrinsic.
#define EACH_TOKEN(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define BEGIN(I) __m512 first##I = _mm512_setzero_ps(), second##I = first##I, third##I = first##I;
#define ADD(I) \
    { \
        const __m512i token = _mm512_set1_epi32((int)x[I][q]); \
        asm("vdpbf16ps %2, %1, %0" : "+v"(first##I) : "v"(w0), "v"(token)); \
        asm("vdpbf16ps %2, %1, %0" : "+v"(second##I) : "v"(w1), "v"(token)); \
        asm("vdpbf16ps %2, %1, %0" : "+v"(third##I) : "v"(w2), "v"(token)); \
    }
#define END(I) _mm512_storeu_ps(y[I], first##I), _mm512_storeu_ps(y[I] + 16, second##I), _mm512_storeu_ps(y[I] + 32, third##I);
BF16_TARGET static void product_bf16(const uint32_t *panel, int64_t pairs, const uint32_t *const x[BF16_TILE], float y[BF16_TILE][BF16_PANEL]) {
    EACH_TOKEN(BEGIN)
    for (int64_t q = 0; q < pairs; q++, panel += BF16_PANEL) {
        const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 16), w2 = _mm512_loadu_si512(panel + 32);
        EACH_TOKEN(ADD)
    }
    EACH_TOKEN(END)
}
#else
static bool multiplies_bf16() { return false; }
static void interleave(const uint32_t *, int64_t, uint32_t *) {}
static void product_bf16(const uint32_t *, int64_t, const uint32_t *const[BF16_TILE], float[BF16_TILE][BF16_PANEL]) {}
#endif
