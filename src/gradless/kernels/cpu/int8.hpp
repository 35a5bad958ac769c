// The integer product behind reference.linear_int8: a panel of 32 rows of codes by a tile of tokens. A lane of a vector is a row,
// so no sum runs across lanes.
//
// A code c from -32639 to 32639 is held as the two bytes of c + 32896, so each byte is 128 too large. If all codes of a group fit a
// byte, their high bytes are 128, and only the low bytes are multiplied. A sum begins at minus the products of the extra 128.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif
#include "noise.hpp"

constexpr int PANEL = 32, TILE = 6;  // rows, tokens: 2 * TILE accumulators and as many sums, in 32 registers of 16 lanes

struct Panel {
    int64_t groups, quads;                // quads: of columns, in a group
    std::shared_ptr<uint32_t[]> code[2];  // (groups, quads, PANEL), four codes' low bytes in each; and high bytes, where `wide`
    int lowest, reach;                    // codes are lowest .. lowest + reach
    std::shared_ptr<uint8_t[]> wide;      // (groups,)
    std::unique_ptr<float[]> scale;       // (groups, PANEL)
    std::unique_ptr<float[]> offset;      // the same; null: none

    // If `same` is given, this panel shares its codes.
    Panel(int64_t groups, int64_t quads, bool has_offset, int lowest, int reach, const Panel *same)
        : groups(groups), quads(quads), lowest(lowest), reach(reach), wide(same ? same->wide : std::shared_ptr<uint8_t[]>(new uint8_t[groups]())), scale(new float[groups * PANEL]) {
        for (int byte = 0; byte < 2; byte++) code[byte] = same ? same->code[byte] : std::shared_ptr<uint32_t[]>(new uint32_t[groups * quads * PANEL]);
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
                y[i][r] = __builtin_fmaf(p.scale[g * PANEL + r], (float)(int32_t)acc[r], y[i][r]);
                if (p.offset) y[i][r] = __builtin_fmaf(p.offset[g * PANEL + r], t.sum[g * TILE + i], y[i][r]);
            }
        }
}

#if defined(__x86_64__) && defined(__GNUC__)
// acc += a group's codes times its activations. This is assembly because GCC 12 copies every accumulator around the intrinsic,
// which costs a third of the speed.
__attribute__((target("avx512f,avx512vnni"))) INLINE void dots_vnni(__m512i acc[TILE][2], const uint32_t *code, const uint32_t *x, int64_t quads) {
    for (; quads > 0; quads--, code += PANEL, x += TILE) {
        const __m512i first = _mm512_loadu_si512(code), second = _mm512_loadu_si512(code + 16);
        for (int i = 0; i < TILE; i++) {
            const __m512i token = _mm512_set1_epi32((int)x[i]);
            asm("vpdpbusd %2, %1, %0" : "+v"(acc[i][0]) : "v"(first), "v"(token));
            asm("vpdpbusd %2, %1, %0" : "+v"(acc[i][1]) : "v"(second), "v"(token));
        }
    }
}
__attribute__((target("avx512f,avx512vnni"))) static void product_vnni(const Panel &p, const Tile &t, float out[TILE][PANEL]) {
    __m512 y[TILE][2];
    for (int i = 0; i < TILE; i++) y[i][0] = y[i][1] = _mm512_setzero_ps();
    for (int64_t g = 0, q = 0; g < p.groups; g++, q += p.quads) {
        const int32_t *bias = t.bias + g * TILE;
        __m512i acc[TILE][2];
        for (int i = 0; i < TILE; i++) acc[i][0] = acc[i][1] = _mm512_set1_epi32(bias[i]);
        if (p.wide[g]) {
            dots_vnni(acc, &p.code[1][q * PANEL], t.x + q * TILE, p.quads);
            for (int i = 0; i < TILE; i++)
                for (int half = 0; half < 2; half++) acc[i][half] = _mm512_add_epi32(_mm512_slli_epi32(acc[i][half], 8), _mm512_set1_epi32(bias[i]));
        }
        dots_vnni(acc, &p.code[0][q * PANEL], t.x + q * TILE, p.quads);
        for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_loadu_ps(&p.scale[g * PANEL + 16 * half]);
            for (int i = 0; i < TILE; i++) y[i][half] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(acc[i][half]), y[i][half]);
            if (!p.offset) continue;
            const __m512 offset = _mm512_loadu_ps(&p.offset[g * PANEL + 16 * half]);
            for (int i = 0; i < TILE; i++) y[i][half] = _mm512_fmadd_ps(offset, _mm512_set1_ps(t.sum[g * TILE + i]), y[i][half]);
        }
    }
    for (int i = 0; i < TILE; i++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(out[i] + 16 * half, y[i][half]);
}

// Sixteen rows by three tokens at a time, for 256-bit vectors; `dots` adds a group's products to its accumulators. If NARROW is
// not 0, groups with codes up to NARROW are multiplied by `dots_narrow`.
constexpr int HALVES = PANEL / 16, TOKENS = 3;

// Codes minus the lowest code, small enough that sums of a few pairs of products fit 16 bits.
__attribute__((target("avx2,fma"))) INLINE void dots_narrow(__m256i acc[TOKENS][2], const Panel &p, const uint32_t *code, const uint32_t *x) {
    const __m256i lift = _mm256_set1_epi8((char)(128 + p.lowest)), ones = _mm256_set1_epi16(1);
    const int64_t at_once = 32767 / (2 * 127 * p.reach);
    for (int64_t left = p.quads; left > 0; left -= at_once) {
        __m256i sum[TOKENS][2];
        for (int i = 0; i < TOKENS; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int64_t q = std::min(left, at_once); q > 0; q--, code += PANEL, x += TILE) {
            __m256i four[2];
            for (int half = 0; half < 2; half++) four[half] = _mm256_sub_epi8(_mm256_loadu_si256((const __m256i *)(code + 8 * half)), lift);
            for (int i = 0; i < TOKENS; i++)
                for (int half = 0; half < 2; half++)
                    sum[i][half] = _mm256_add_epi16(sum[i][half], _mm256_maddubs_epi16(four[half], _mm256_set1_epi32((int)x[i])));
        }
        for (int i = 0; i < TOKENS; i++)
            for (int half = 0; half < 2; half++) acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(sum[i][half], ones));
    }
}

#define PRODUCT_256(NAME, TARGET, NARROW, DOTS) \
    __attribute__((target(TARGET))) static void NAME(const Panel &p, const Tile &t, float out[TILE][PANEL]) { \
        for (int part = 0; part < TILE / TOKENS * HALVES; part++) { \
            const int first = part / HALVES * TOKENS, row = part % HALVES * 16; \
            __m256 y[TOKENS][2]; \
            for (int i = 0; i < TOKENS; i++) y[i][0] = y[i][1] = _mm256_setzero_ps(); \
            for (int64_t g = 0; g < p.groups; g++) { \
                __m256i acc[TOKENS][2]; \
                const bool narrow = p.reach <= NARROW; \
                for (int i = 0; i < TOKENS; i++) \
                    acc[i][0] = acc[i][1] = _mm256_set1_epi32(narrow ? -t.bias[g * TILE + first + i] / 128 * p.lowest : 0); \
                if (narrow) dots_narrow(acc, p, &p.code[0][g * p.quads * PANEL + row], t.x + g * p.quads * TILE + first); \
                for (int byte = narrow ? -1 : p.wide[g]; byte >= 0; byte--) { \
                    for (int i = 0; i < TOKENS; i++) \
                        for (int half = 0; half < 2; half++) { \
                            const __m256i bias = _mm256_set1_epi32(t.bias[g * TILE + first + i]); \
                            acc[i][half] = _mm256_add_epi32(_mm256_slli_epi32(acc[i][half], 8), bias); \
                        } \
                    const int64_t q = g * p.quads; \
                    DOTS(acc, &p.code[byte][q * PANEL + row], t.x + q * TILE + first, p.quads); \
                } \
                for (int i = 0; i < TOKENS; i++) \
                    for (int half = 0; half < 2; half++) { \
                        const int64_t at = g * PANEL + row + 8 * half; \
                        y[i][half] = _mm256_fmadd_ps(_mm256_loadu_ps(&p.scale[at]), _mm256_cvtepi32_ps(acc[i][half]), y[i][half]); \
                        if (!p.offset) continue; \
                        const __m256 sum = _mm256_set1_ps(t.sum[g * TILE + first + i]); \
                        y[i][half] = _mm256_fmadd_ps(_mm256_loadu_ps(&p.offset[at]), sum, y[i][half]); \
                    } \
            } \
            for (int i = 0; i < TOKENS; i++) \
                for (int half = 0; half < 2; half++) _mm256_storeu_ps(out[first + i] + row + 8 * half, y[i][half]); \
        } \
    }

__attribute__((target("avx2,fma,avxvnni"))) INLINE void dots_avx_vnni(__m256i acc[TOKENS][2], const uint32_t *code, const uint32_t *x, int64_t quads) {
    for (; quads > 0; quads--, code += PANEL, x += TILE)
        for (int i = 0; i < TOKENS; i++)
            for (int half = 0; half < 2; half++)
                acc[i][half] = _mm256_dpbusd_avx_epi32(acc[i][half], _mm256_loadu_si256((const __m256i *)(code + 8 * half)), _mm256_set1_epi32((int)x[i]));
}
PRODUCT_256(product_avx_vnni, "avx2,fma,avxvnni", 0, dots_avx_vnni)

// Pairs of products of bytes would overflow 16 bits, so even and odd columns are widened and multiplied separately.
__attribute__((target("avx2,fma"))) INLINE void dots_avx2(__m256i acc[TOKENS][2], const uint32_t *code, const uint32_t *x, int64_t quads) {
    for (; quads > 0; quads--, code += PANEL, x += TILE) {
        __m256i even[2], odd[2];
        for (int half = 0; half < 2; half++) {
            const __m256i four = _mm256_loadu_si256((const __m256i *)(code + 8 * half));
            even[half] = _mm256_and_si256(four, _mm256_set1_epi16(255)), odd[half] = _mm256_srli_epi16(four, 8);
        }
        for (int i = 0; i < TOKENS; i++) {
            const __m256i token = _mm256_set1_epi32((int)x[i]);
            const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(token, 8), 8), x_odd = _mm256_srai_epi16(token, 8);
            for (int half = 0; half < 2; half++) {
                acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(even[half], x_even));
                acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(odd[half], x_odd));
            }
        }
    }
}
PRODUCT_256(product_avx2, "avx2,fma", 63, dots_avx2)
#endif

#if defined(__aarch64__) && defined(__GNUC__)
// Eight rows at a time. The dot product takes signed bytes, so 128 is subtracted from each code here, and sums begin at zero.
__attribute__((target("arch=armv8.2-a+dotprod"))) static void product_neon(const Panel &p, const Tile &t, float out[TILE][PANEL]) {
    for (int row = 0; row < PANEL; row += 8) {
        float32x4_t y[TILE][2];
        for (int i = 0; i < TILE; i++) y[i][0] = y[i][1] = vdupq_n_f32(0);
        for (int64_t g = 0; g < p.groups; g++) {
            int32x4_t acc[TILE][2];
            for (int i = 0; i < TILE; i++) acc[i][0] = acc[i][1] = vdupq_n_s32(0);
            for (int byte = p.wide[g]; byte >= 0; byte--) {
                for (int i = 0; i < TILE; i++)
                    for (int half = 0; half < 2; half++) acc[i][half] = vshlq_n_s32(acc[i][half], 8);
                const uint32_t *code = &p.code[byte][g * p.quads * PANEL + row], *x = t.x + g * p.quads * TILE;
                for (int64_t q = 0; q < p.quads; q++, code += PANEL, x += TILE) {
                    int8x16_t four[2];
                    for (int half = 0; half < 2; half++)
                        four[half] = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(vld1q_u32(code + 4 * half)), vdupq_n_u8(128)));
                    for (int i = 0; i < TILE; i++) {
                        const int8x16_t token = vreinterpretq_s8_u32(vdupq_n_u32(x[i]));
                        acc[i][0] = vdotq_s32(acc[i][0], four[0], token);
                        acc[i][1] = vdotq_s32(acc[i][1], four[1], token);
                    }
                }
            }
            for (int i = 0; i < TILE; i++)
                for (int half = 0; half < 2; half++) {
                    const int64_t at = g * PANEL + row + 4 * half;
                    y[i][half] = vfmaq_f32(y[i][half], vld1q_f32(&p.scale[at]), vcvtq_f32_s32(acc[i][half]));
                    if (p.offset) y[i][half] = vfmaq_f32(y[i][half], vld1q_f32(&p.offset[at]), vdupq_n_f32(t.sum[g * TILE + i]));
                }
        }
        for (int i = 0; i < TILE; i++)
            for (int half = 0; half < 2; half++) vst1q_f32(out[i] + row + 4 * half, y[i][half]);
    }
}
static bool has_dot_product() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Mac with such a processor
#endif
}
#endif

struct Path {
    const char *name;
    Product product;
    bool runs;
};
// The paths, the fastest first.
static const Path *paths() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const Path all[] = {
        {"AVX-512 VNNI", product_vnni, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")},
        {"AVX-VNNI", product_avx_vnni, avx2 && __builtin_cpu_supports("avxvnni")},
        {"AVX2", product_avx2, avx2},
        {"portable", product_portable, true},
        {nullptr, nullptr, true},
    };
#elif defined(__aarch64__) && defined(__GNUC__)
    static const Path all[] = {{"NEON dot product", product_neon, has_dot_product()}, {"portable", product_portable, true}, {nullptr, nullptr, true}};
#else
    static const Path all[] = {{"portable", product_portable, true}, {nullptr, nullptr, true}};
#endif
    return all;
}
// The fastest path that runs on this processor, or the `slower`-th after it; the end of the list if there is none.
static const Path *path(int slower) {
    const Path *each = paths();
    while (each->name && (!each->runs || slower-- > 0)) each++;
    return each;
}
static Product product = path(0)->product;
