// Philox4x32-10 in the layout of noise.py: page p holds the 64 words of blocks 16 p .. 16 p + 15, counter word by counter word.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

struct Words {
    uint64_t key;
    uint32_t step, query_and_stream;
};

static const uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u, WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;

static void page_portable(const Words &w, uint64_t page, uint32_t out[64]) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int i = 0; i < 16; i++) {
        c0[i] = (uint32_t)(page * 16 + i);
        c1[i] = (uint32_t)((page * 16) >> 32);
        c2[i] = w.step;
        c3[i] = w.query_and_stream;
    }
    uint32_t k0 = (uint32_t)w.key, k1 = (uint32_t)(w.key >> 32);
    for (int round = 0; round < 10; round++, k0 += WEYL_0, k1 += WEYL_1)
        for (int i = 0; i < 16; i++) {
            uint64_t p0 = (uint64_t)c0[i] * PHILOX_M0, p1 = (uint64_t)c2[i] * PHILOX_M1;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
    std::memcpy(out, c0, 64);
    std::memcpy(out + 16, c1, 64);
    std::memcpy(out + 32, c2, 64);
    std::memcpy(out + 48, c3, 64);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The high halves of sixteen products: of the even lanes, and of the odd ones shifted into even place.
#define HIGH_512(a, m) _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(_mm512_mul_epu32(a, m), 32), _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m))
#define HIGH_256(a, m) _mm256_blend_epi32(_mm256_srli_epi64(_mm256_mul_epu32(a, m), 32), _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m), 0xAA)

__attribute__((target("avx512f"))) static void page_avx512(const Words &w, uint64_t page, uint32_t out[64]) {
    const __m512i m0 = _mm512_set1_epi32((int)PHILOX_M0), m1 = _mm512_set1_epi32((int)PHILOX_M1);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32((int)(uint32_t)(page * 16)), lanes), c1 = _mm512_set1_epi32((int)(uint32_t)((page * 16) >> 32));
    __m512i c2 = _mm512_set1_epi32((int)w.step), c3 = _mm512_set1_epi32((int)w.query_and_stream);
    uint32_t k0 = (uint32_t)w.key, k1 = (uint32_t)(w.key >> 32);
    for (int round = 0; round < 10; round++, k0 += WEYL_0, k1 += WEYL_1) {
        __m512i high_0 = HIGH_512(c0, m0), low_0 = _mm512_mullo_epi32(c0, m0), high_1 = HIGH_512(c2, m1), low_1 = _mm512_mullo_epi32(c2, m1);
        c0 = _mm512_xor_si512(_mm512_xor_si512(high_1, c1), _mm512_set1_epi32((int)k0)), c1 = low_1;
        c2 = _mm512_xor_si512(_mm512_xor_si512(high_0, c3), _mm512_set1_epi32((int)k1)), c3 = low_0;
    }
    _mm512_storeu_si512(out, c0), _mm512_storeu_si512(out + 16, c1), _mm512_storeu_si512(out + 32, c2), _mm512_storeu_si512(out + 48, c3);
}

__attribute__((target("avx2"))) static void page_avx2(const Words &w, uint64_t page, uint32_t out[64]) {
    const __m256i m0 = _mm256_set1_epi32((int)PHILOX_M0), m1 = _mm256_set1_epi32((int)PHILOX_M1);
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    for (int half = 0; half < 16; half += 8) {
        __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32((int)(uint32_t)(page * 16 + half)), lanes), c1 = _mm256_set1_epi32((int)(uint32_t)((page * 16) >> 32));
        __m256i c2 = _mm256_set1_epi32((int)w.step), c3 = _mm256_set1_epi32((int)w.query_and_stream);
        uint32_t k0 = (uint32_t)w.key, k1 = (uint32_t)(w.key >> 32);
        for (int round = 0; round < 10; round++, k0 += WEYL_0, k1 += WEYL_1) {
            __m256i high_0 = HIGH_256(c0, m0), low_0 = _mm256_mullo_epi32(c0, m0), high_1 = HIGH_256(c2, m1), low_1 = _mm256_mullo_epi32(c2, m1);
            c0 = _mm256_xor_si256(_mm256_xor_si256(high_1, c1), _mm256_set1_epi32((int)k0)), c1 = low_1;
            c2 = _mm256_xor_si256(_mm256_xor_si256(high_0, c3), _mm256_set1_epi32((int)k1)), c3 = low_0;
        }
        _mm256_storeu_si256((__m256i *)(out + half), c0), _mm256_storeu_si256((__m256i *)(out + 16 + half), c1);
        _mm256_storeu_si256((__m256i *)(out + 32 + half), c2), _mm256_storeu_si256((__m256i *)(out + 48 + half), c3);
    }
}
#endif

typedef void (*Page)(const Words &, uint64_t, uint32_t *);
static Page fastest_page() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return page_avx512;
    if (__builtin_cpu_supports("avx2")) return page_avx2;
#endif
    return page_portable;
}
static const Page page_of_words = fastest_page();
