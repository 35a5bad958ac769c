// The random words of noise.py, sixteen Philox blocks at a time, and the coordinates drawn from them.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

struct Words {
    uint64_t key;
    uint32_t step, query_and_stream;
};

INLINE void page_of_words(const Words &w, uint64_t page, uint32_t out[64]) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int i = 0; i < 16; i++) {
        c0[i] = (uint32_t)(page * 16 + i);
        c1[i] = (uint32_t)((page * 16) >> 32);
        c2[i] = w.step;
        c3[i] = w.query_and_stream;
    }
    uint32_t k0 = (uint32_t)w.key, k1 = (uint32_t)(w.key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < 16; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
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

enum Distribution { GAUSSIAN = 0, RADEMACHER = 1, INTEGERS = 2, ROUNDED = 3 };

// Which direction, and what its coordinates are drawn from.
struct Direction {
    Words words, second;  // second: of the rounding in ROUNDED
    int32_t distribution, m;
    const uint32_t *edges;  // INTEGERS: 2 m thresholds
    float eps;              // ROUNDED
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

INLINE void run_of_words(const Words &words, uint64_t run, uint32_t word[128]) {
    page_of_words(words, 2 * run, word);
    page_of_words(words, 2 * run + 1, word + 64);
}

// A drawn integer: the number of thresholds that the word reaches, less m.
INLINE void integer_run(const Direction &u, uint64_t run, int8_t value[128]) {
    uint32_t word[128];
    run_of_words(u.words, run, word);
    for (int i = 0; i < 128; i++) value[i] = (int8_t)-u.m;
    for (int k = 0; k < 2 * u.m; k++)
        for (int i = 0; i < 128; i++) value[i] += word[i] >= u.edges[k];
}

// Coordinates in runs of 128, the last run kept: consecutive reads draw each page once.
struct Coordinates {
    Direction u;
    uint64_t run = ~0ull, page = ~0ull;
    float value[128];
    uint32_t word[64];  // RADEMACHER: the page behind sixteen runs

    INLINE void fill(Coordinates &c, uint64_t run) {
        c.run = run;
        if (c.u.distribution == GAUSSIAN) {
            gaussian_run(c.u.words, run, c.value);
        } else if (c.u.distribution == RADEMACHER) {  // a page holds sixteen runs, four words each
            if (c.page != run / 16) page_of_words(c.u.words, c.page = run / 16, c.word);
            const uint32_t *w = c.word + (run % 16) * 4;
            for (int i = 0; i < 128; i++) c.value[i] = (w[i / 32] >> (i % 32)) & 1 ? 1.0f : -1.0f;
        } else if (c.u.distribution == INTEGERS) {
            int8_t drawn[128];
            integer_run(c.u, run, drawn);
            for (int i = 0; i < 128; i++) c.value[i] = (float)drawn[i];
        } else {
            uint32_t r[128];
            gaussian_run(c.u.words, run, c.value);
            run_of_words(c.u.second, run, r);
            for (int i = 0; i < 128; i++) c.value[i] = stochastic_round(c.value[i] * c.u.eps, r[i]);
        }
    }

    INLINE void read(Coordinates &c, uint64_t start, int64_t count, float *out) {
        while (count > 0) {
            if (c.run != start / 128) fill(c, start / 128);
            int64_t at = start % 128, n = count < 128 - at ? count : 128 - at;
            std::memcpy(out, c.value + at, n * sizeof(float));
            out += n, start += n, count -= n;
        }
    }
};

// Random 16-bit integers, for stochastic rounding to bf16.
INLINE void page_of_halves(const Words &w, uint64_t page, uint16_t out[128]) {
    uint32_t word[64];
    page_of_words(w, page, word);
    for (int i = 0; i < 64; i++) {
        out[i] = (uint16_t)word[i];
        out[64 + i] = (uint16_t)(word[i] >> 16);
    }
}
