// The coordinates of noise.py, drawn from its random words in runs of 128.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include "philox.hpp"

#define INLINE static inline __attribute__((always_inline))
// Marks functions that are built for several instruction sets; the right one is bound when the library loads. The functions that
// draw noise are marked, not inlined, because many functions call them.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}
INLINE float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

INLINE void store(float *out, float value) { *out = value; }
INLINE void store(uint16_t *out, float value) { *out = to_bf16(value); }
INLINE float load(const float *in) { return *in; }
INLINE float load(const uint16_t *in) { return from_bf16(*in); }

enum Distribution { GAUSSIAN = 0, RADEMACHER = 1, INTEGERS = 2, ROUNDED = 3 };

// A direction, as numbers from which its coordinates are drawn.
struct Direction {
    Words words, second;  // second: rounds the values of ROUNDED
    int32_t distribution, m;
    const uint16_t *edges;  // INTEGERS: 2 m thresholds
    float eps;              // ROUNDED
    float weight;           // the factor in a sum whose signs are taken
    const Direction *next;  // the next term of that sum
    int32_t span;           // consecutive elements that share a coordinate
    int32_t signs;          // whether the coordinates are the signs of the sum that begins here
};

static uint32_t normal_bits[32768];  // magnitudes as the bits of floats

INLINE void set_normal_table(const uint16_t *table) {
    for (int i = 0; i < 32768; i++) {
        float z = (float)table[i] * 0x1p-13f;
        std::memcpy(normal_bits + i, &z, 4);
    }
}

// SR(x) = floor(x) + (r < x - floor(x)), r from the upper 24 bits of a word.
INLINE float stochastic_round(float x, uint32_t word) {
    float whole = __builtin_floorf(x), r = (float)(word >> 8) * 0x1p-24f;
    return whole + (r < x - whole ? 1.0f : 0.0f);
}

INLINE void gaussian_run(const Words &words, uint64_t run, float value[128]) {
    uint32_t word[64], bits[128];
    page_of_words(words, run, word);
    for (int i = 0; i < 64; i++) {  // without branches: a sign is never predicted
        uint32_t w = word[i];
        bits[i] = normal_bits[w & 0x7FFF] | (w & 0x8000) << 16;
        bits[64 + i] = normal_bits[w >> 16 & 0x7FFF] | (w & 0x80000000u);
    }
    std::memcpy(value, bits, sizeof bits);
}

CLONES static void run_of_words(const Words &words, uint64_t run, uint32_t word[128]) {
    page_of_words(words, 2 * run, word);
    page_of_words(words, 2 * run + 1, word + 64);
}

// Random 16-bit integers.
CLONES static void page_of_halves(const Words &w, uint64_t page, uint16_t out[128]) {
    uint32_t word[64];
    page_of_words(w, page, word);
    for (int i = 0; i < 64; i++) {
        out[i] = (uint16_t)word[i];
        out[64 + i] = (uint16_t)(word[i] >> 16);
    }
}

// A drawn integer: the number of thresholds that a random 16-bit integer reaches, minus m.
INLINE void integer_run(const Direction &u, uint64_t run, float value[128]) {
    uint16_t half[128];
    int16_t drawn[128];
    page_of_halves(u.words, run, half);
    for (int i = 0; i < 128; i++) drawn[i] = (int16_t)-u.m;
    for (int k = 0; k < 2 * u.m; k++)
        for (int i = 0; i < 128; i++) drawn[i] += half[i] >= u.edges[k];
    for (int i = 0; i < 128; i++) value[i] = (float)drawn[i];
}

// A page of random bits holds sixteen runs of them, four words each.
constexpr uint64_t RUNS_OF_BITS = 16;
INLINE void signs_of_bits(const uint32_t page[64], uint64_t run, float value[128]) {
    const uint32_t *w = page + run % RUNS_OF_BITS * 4;
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 32; i++) {
            uint32_t bits = 0x3F800000u | (~w[k] >> i) << 31;  // 1 with the sign of a bit: + where it is set
            std::memcpy(value + 32 * k + i, &bits, 4);
        }
}

INLINE void one_run(const Direction &u, uint64_t run, float value[128]) {
    if (u.distribution == GAUSSIAN) {
        gaussian_run(u.words, run, value);
    } else if (u.distribution == RADEMACHER) {
        uint32_t page[64];
        page_of_words(u.words, run / RUNS_OF_BITS, page);
        signs_of_bits(page, run, value);
    } else if (u.distribution == INTEGERS) {
        integer_run(u, run, value);
    } else {
        uint32_t r[128];
        gaussian_run(u.words, run, value);
        run_of_words(u.second, run, r);
        for (int i = 0; i < 128; i++) value[i] = stochastic_round(value[i] * u.eps, r[i]);
    }
}

INLINE void signs_run(const Direction &first, uint64_t run, float value[128]) {
    float total[128] = {0};
    for (const Direction *u = &first; u; u = u->next) {
        one_run(*u, run, value);
        for (int i = 0; i < 128; i++) {
            float term = value[i] * u->weight;
            total[i] = total[i] + term;
        }
    }
    for (int i = 0; i < 128; i++) value[i] = (float)((total[i] > 0) - (total[i] < 0));
}

CLONES static void run_of(const Direction &u, uint64_t run, float value[128]) {
    if (u.signs) signs_run(u, run, value);
    else one_run(u, run, value);
}

// u element by element. Coordinates come in runs of 128. The last run and the last page of bits are kept, so that consecutive reads
// draw each page once.
struct Coordinates {
    Direction u;
    uint64_t run = ~0ull, page = ~0ull;
    float value[128];
    uint32_t bits[64];

    INLINE void draw(Coordinates &c, uint64_t run) {
        c.run = run;
        if (c.u.distribution != RADEMACHER || c.u.signs) return run_of(c.u, run, c.value);
        if (c.page != run / RUNS_OF_BITS) page_of_words(c.u.words, c.page = run / RUNS_OF_BITS, c.bits);
        signs_of_bits(c.bits, run, c.value);
    }

    INLINE void read(Coordinates &c, uint64_t start, int64_t count, float *out) {
        const uint64_t span = (uint64_t)c.u.span;
        while (count > 0) {
            uint64_t first = start / span, in_span = start % span;
            if (c.run != first / 128) draw(c, first / 128);
            const float *value = c.value + first % 128;
            int64_t n;
            if (span == 1) {
                n = std::min<int64_t>(count, 128 - first % 128);
                std::memcpy(out, value, n * sizeof(float));
            } else {
                n = std::min<int64_t>(count, span - in_span);
                for (int64_t i = 0; i < n; i++) out[i] = *value;
            }
            out += n, start += n, count -= n;
        }
    }
};
