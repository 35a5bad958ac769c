// The integer product behind reference.linear_int8: a panel of sixteen rows of codes by a tile of tokens. A lane of a vector is a
// row, so no sum runs across lanes.
//
// A code c, of -32639 .. 32639, is held as the two bytes of c + 32896, each of them 128 too large. Wherever c fits a byte the high one
// is just 128: a group of such codes is multiplied by its low bytes alone. What the 128 add to a sum is taken off where it begins.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include "noise.hpp"

constexpr int PANEL = 16, TILE = 12;  // rows, tokens

struct Panel {
    int64_t groups, quads;                // quads: of columns, in a group
    std::unique_ptr<uint32_t[]> code[2];  // (groups, quads, PANEL), four codes' low bytes in each; and high bytes, where `wide`
    std::unique_ptr<uint8_t[]> wide;      // (groups,)
    std::unique_ptr<float[]> scale;       // (groups, PANEL)
    std::unique_ptr<float[]> offset;      // the same; null: none

    Panel(int64_t groups, int64_t quads, bool has_offset)
        : groups(groups), quads(quads), wide(new uint8_t[groups]()), scale(new float[groups * PANEL]) {
        for (auto &bytes : code) bytes.reset(new uint32_t[groups * quads * PANEL]);
        if (has_offset) offset.reset(new float[groups * PANEL]);
    }
};

struct Tile {
    const uint32_t *x;    // (groups, quads, TILE), four signed bytes in each
    const float *sum;     // (groups, TILE): of x
    const int32_t *bias;  // (groups, TILE): -128 * sum
};

typedef void (*Product)(const Panel &, const Tile &, float[TILE][PANEL]);

static void product_portable(const Panel &p, const Tile &t, float y[TILE][PANEL]) {
    std::memset(y, 0, TILE * PANEL * sizeof(float));
    for (int64_t g = 0; g < p.groups; g++)
        for (int i = 0; i < TILE; i++) {
            uint32_t acc[PANEL] = {0};
            for (int byte = p.wide[g]; byte >= 0; byte--) {
                for (int r = 0; r < PANEL; r++) acc[r] = (acc[r] << 8) + (uint32_t)t.bias[g * TILE + i];
                for (int64_t q = g * p.quads; q < (g + 1) * p.quads; q++) {
                    const uint32_t *code = &p.code[byte][q * PANEL], x = t.x[q * TILE + i];
                    for (int at = 0; at < 32; at += 8)
                        for (int r = 0; r < PANEL; r++) acc[r] += (code[r] >> at & 255) * (uint32_t)(int8_t)(x >> at);
                }
            }
            for (int r = 0; r < PANEL; r++) {
                float term = p.scale[g * PANEL + r] * (float)(int32_t)acc[r];
                if (p.offset) {
                    float shift = p.offset[g * PANEL + r] * t.sum[g * TILE + i];
                    term = term + shift;
                }
                y[i][r] = y[i][r] + term;
            }
        }
}

#if defined(__x86_64__) && defined(__GNUC__)
// acc += a group's codes by its activations. In assembly, since GCC 12 copies every accumulator around the intrinsic, which costs a
// third of the speed.
__attribute__((target("avx512f,avx512vnni"))) INLINE void dots_vnni(__m512i acc[TILE], const uint32_t *code, const uint32_t *x, int64_t quads) {
    for (; quads > 0; quads--, code += PANEL, x += TILE) {
        const __m512i c = _mm512_loadu_si512(code);
        for (int i = 0; i < TILE; i++) asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc[i]) : "v"(c), "m"(x[i]));
    }
}
__attribute__((target("avx512f,avx512vnni"))) static void product_vnni(const Panel &p, const Tile &t, float out[TILE][PANEL]) {
    __m512 y[TILE];
    for (int i = 0; i < TILE; i++) y[i] = _mm512_setzero_ps();
    for (int64_t g = 0, q = 0; g < p.groups; g++, q += p.quads) {
        const int32_t *bias = t.bias + g * TILE;
        __m512i acc[TILE];
        for (int i = 0; i < TILE; i++) acc[i] = _mm512_set1_epi32(bias[i]);
        if (p.wide[g]) {
            dots_vnni(acc, &p.code[1][q * PANEL], t.x + q * TILE, p.quads);
            for (int i = 0; i < TILE; i++) acc[i] = _mm512_add_epi32(_mm512_slli_epi32(acc[i], 8), _mm512_set1_epi32(bias[i]));
        }
        dots_vnni(acc, &p.code[0][q * PANEL], t.x + q * TILE, p.quads);
        const __m512 scale = _mm512_loadu_ps(&p.scale[g * PANEL]);
        const __m512 offset = p.offset ? _mm512_loadu_ps(&p.offset[g * PANEL]) : _mm512_setzero_ps();
        for (int i = 0; i < TILE; i++) {
            __m512 term = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(acc[i]));
            if (p.offset) term = _mm512_add_ps(term, _mm512_mul_ps(offset, _mm512_set1_ps(t.sum[g * TILE + i])));
            y[i] = _mm512_add_ps(y[i], term);
        }
    }
    for (int i = 0; i < TILE; i++) _mm512_storeu_ps(out[i], y[i]);
}

// Pairs of products of bytes would overflow 16 bits: even and odd columns are widened and multiplied apart. Four tokens at a time.
__attribute__((target("avx2"))) static void product_avx2(const Panel &p, const Tile &t, float out[TILE][PANEL]) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int first = 0; first < TILE; first += 4) {
        __m256 y[4][2];
        for (int i = 0; i < 8; i++) y[i / 2][i % 2] = _mm256_setzero_ps();
        for (int64_t g = 0; g < p.groups; g++) {
            __m256i acc[4][2];
            for (int i = 0; i < 8; i++) acc[i / 2][i % 2] = _mm256_setzero_si256();
            for (int byte = p.wide[g]; byte >= 0; byte--) {
                for (int i = 0; i < 8; i++) {
                    const __m256i bias = _mm256_set1_epi32(t.bias[g * TILE + first + i / 2]);
                    acc[i / 2][i % 2] = _mm256_add_epi32(_mm256_slli_epi32(acc[i / 2][i % 2], 8), bias);
                }
                for (int64_t q = g * p.quads; q < (g + 1) * p.quads; q++) {
                    __m256i even[2], odd[2];
                    for (int half = 0; half < 2; half++) {
                        const __m256i code = _mm256_loadu_si256((const __m256i *)&p.code[byte][q * PANEL + 8 * half]);
                        even[half] = _mm256_and_si256(code, low), odd[half] = _mm256_srli_epi16(code, 8);
                    }
                    for (int i = 0; i < 4; i++) {
                        const __m256i x = _mm256_set1_epi32((int)t.x[q * TILE + first + i]);
                        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
                        for (int half = 0; half < 2; half++) {
                            acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(even[half], x_even));
                            acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(odd[half], x_odd));
                        }
                    }
                }
            }
            for (int i = 0; i < 8; i++) {
                const int64_t at = g * PANEL + 8 * (i % 2);
                __m256 term = _mm256_mul_ps(_mm256_loadu_ps(&p.scale[at]), _mm256_cvtepi32_ps(acc[i / 2][i % 2]));
                if (p.offset) {
                    const __m256 sum = _mm256_set1_ps(t.sum[g * TILE + first + i / 2]);
                    term = _mm256_add_ps(term, _mm256_mul_ps(_mm256_loadu_ps(&p.offset[at]), sum));
                }
                y[i / 2][i % 2] = _mm256_add_ps(y[i / 2][i % 2], term);
            }
        }
        for (int i = 0; i < 8; i++) _mm256_storeu_ps(out[first + i / 2] + 8 * (i % 2), y[i / 2][i % 2]);
    }
}
#endif

static Product fastest_product() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) return product_vnni;
    if (__builtin_cpu_supports("avx2")) return product_avx2;
#endif
    return product_portable;
}
static const Product product = fastest_product();
