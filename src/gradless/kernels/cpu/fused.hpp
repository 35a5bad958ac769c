// The passes between the linear layers, each fused into one over bf16 values and computed in fp32. They approximate reference.py
// within a stated bound; no replay depends on their bits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#include "noise.hpp"

// e^x for x <= 0, to three parts in a million, far below a bf16's rounding: 2^n 2^f, where 2^f is its Taylor series to the fifth
// power.
INLINE float exp_negative(float x) {
    const float t = x < -87.0f ? -125.5f : x * 1.44269504f;
    const float n = t + 0x1.8p23f, f = t - (n - 0x1.8p23f);  // n's lowest bits are the integer nearest to t
    uint32_t bits;
    std::memcpy(&bits, &n, 4);
    bits = (bits + 127) << 23;
    float power, y = 1.3333558e-3f;
    std::memcpy(&power, &bits, 4);
    y = __builtin_fmaf(y, f, 9.6181291e-3f);
    y = __builtin_fmaf(y, f, 5.5504109e-2f);
    y = __builtin_fmaf(y, f, 2.4022651e-1f);
    y = __builtin_fmaf(y, f, 6.9314718e-1f);
    return power * __builtin_fmaf(y, f, 1.0f);
}
// fp32 to bf16, if the only NaNs are the processor's default NaN.
INLINE uint16_t rounded(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

CLONES void rms_norm(const uint16_t *x, const uint16_t *weight, int64_t d, float eps, float plus, int64_t begin, int64_t end, uint16_t *out) {
    for (int64_t i = begin; i < end; i++) {
        const uint16_t *row = x + i * d;
        float part[64] = {0};
        int64_t j = 0;
        for (; j + 64 <= d; j += 64)
            for (int l = 0; l < 64; l++) part[l] += from_bf16(row[j + l]) * from_bf16(row[j + l]);
        for (int l = 0; j < d; j++, l++) part[l] += from_bf16(row[j]) * from_bf16(row[j]);
        float sum = 0;
        for (int l = 0; l < 64; l++) sum += part[l];
        const float factor = 1 / __builtin_sqrtf(sum / (float)d + eps);
        for (j = 0; j < d; j++) out[i * d + j] = rounded(from_bf16(row[j]) * factor * (plus + from_bf16(weight[j])));
    }
}

// act(gate) * up; act is x / (1 + e^-s), s being x (SiLU) or sqrt(8 / pi) * (x + 0.044715 x^3) (GELU's tanh form).
CLONES void gate(const uint16_t *gates, const uint16_t *up, int32_t gelu, int64_t begin, int64_t end, uint16_t *out) {
    const float cubic = gelu ? 0.044715f : 0.0f, slope = gelu ? 1.59576912f : 1.0f;
    for (int64_t j = begin; j < end; j++) {
        const float x = from_bf16(gates[j]), s = slope * (x + cubic * x * x * x), e = exp_negative(-__builtin_fabsf(s));
        out[j] = rounded(x * (s < 0 ? e : 1.0f) / (1.0f + e) * from_bf16(up[j]));
    }
}

// Two bf16 of a pair: the first in the low half.
INLINE float first_of(uint32_t pair) {
    uint32_t bits = pair << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
INLINE float second_of(uint32_t pair) {
    uint32_t bits = pair & 0xFFFF0000u;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// y[i][0 .. 32) = the sum over k of the pairs a[i][k] times the pairs b[k][0 .. 32), for QUERIES rows i.
constexpr int QUERIES = 4;
typedef void (*Pairs)(const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, int64_t n, float *y, int64_t y_row);
CLONES static void pairs_portable(const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, int64_t n, float *y, int64_t y_row) {
    for (int i = 0; i < QUERIES; i++) {
        float acc[32] = {0};
        for (int64_t k = 0; k < n; k++) {
            const float one = first_of(a[i * a_row + k]), two = second_of(a[i * a_row + k]);
            for (int l = 0; l < 32; l++) acc[l] += one * first_of(b[k * b_row + l]) + two * second_of(b[k * b_row + l]);
        }
        std::memcpy(y + i * y_row, acc, sizeof acc);
    }
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bf16"))) static void pairs_bf16(const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, int64_t n, float *y, int64_t y_row) {
    __m512 acc[QUERIES][2];
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k++) {
        const __m512i left = _mm512_loadu_si512(b + k * b_row), right = _mm512_loadu_si512(b + k * b_row + 16);
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; i++) {
            const __m512i both = _mm512_set1_epi32((int)a[i * a_row + k]);
            asm("vdpbf16ps %2, %1, %0" : "+v"(acc[i][0]) : "v"(left), "v"(both));
            asm("vdpbf16ps %2, %1, %0" : "+v"(acc[i][1]) : "v"(right), "v"(both));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; i++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(y + i * y_row + 16 * half, acc[i][half]);
}
static const Pairs multiply_pairs = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16") != 0) ? pairs_bf16 : pairs_portable;
#else
static const Pairs multiply_pairs = pairs_portable;
#endif

// How the heads of one attention lie in memory, in elements: from token to token, from head to head, from sequence to sequence.
struct Heads {
    int64_t row, head, batch;
};
struct Attention {
    int64_t shared, length, size;  // heads that share one head of keys and values; tokens of a sequence; of a head, a multiple of 32
    Heads q, k, v, out, mask;      // mask: bool, (batch, 1, length, length)
    float scale;
};

// The scores of queries i, i + 1, ... -> their weights in bf16, up to a factor of 1 / total.
CLONES static void weigh(const uint8_t *mask, int64_t mask_row, int64_t i, int64_t rows, int64_t length, int64_t width, float scale, float *score, uint16_t *weight, float total[QUERIES]) {
    constexpr float NONE = -1e30f, BEYOND = -2e30f;  // the score of a key that a query does not see; of a place beyond the last key
    for (int64_t r = 0; r < rows; r++, score += width, weight += width) {
        const int64_t seen = mask ? length : i + r + 1;
        const uint8_t *sees = mask + r * mask_row;
        if (mask)
            for (int64_t j = 0; j < seen; j++) score[j] = sees[j] ? score[j] * scale : NONE;
        else
            for (int64_t j = 0; j < seen; j++) score[j] = score[j] * scale;
        for (int64_t j = seen; j < width; j++) score[j] = mask ? BEYOND : NONE;
        float top[16], sum[16] = {0};
        for (int l = 0; l < 16; l++) top[l] = NONE;
        for (int64_t j = 0; j < width; j += 16)
            for (int l = 0; l < 16; l++) top[l] = score[j + l] > top[l] ? score[j + l] : top[l];
        for (int l = 1; l < 16; l++) top[0] = top[l] > top[0] ? top[l] : top[0];
        const float most = top[0];
        for (int64_t j = 0; j < width; j += 16)
            for (int l = 0; l < 16; l++) {
                const float e = exp_negative(score[j + l] - most);
                sum[l] += e;
                weight[j + l] = rounded(e);
            }
        total[r] = 0;
        for (int l = 0; l < 16; l++) total[r] += sum[l];
    }
}

// One head of keys and values, for all the queries that share it.
CLONES static void attend(const Attention &a, const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint8_t *mask, uint16_t *out) {
    const int64_t width = (a.length + 31) / 32 * 32, half = a.size / 2;
    std::vector<uint32_t> keys(half * width), values(width / 2 * a.size), query(QUERIES * half), weight(QUERIES * width / 2);
    std::vector<float> score(QUERIES * width), result(QUERIES * a.size);
    for (int64_t j = 0; j < a.length; j++) {
        for (int64_t n = 0; n < half; n++) std::memcpy(&keys[n * width + j], k + j * a.k.row + 2 * n, 4);
        uint16_t *pair = (uint16_t *)&values[j / 2 * a.size] + j % 2;
        for (int64_t n = 0; n < a.size; n++) pair[2 * n] = v[j * a.v.row + n];
    }
    for (int64_t h = 0; h < a.shared; h++)
        for (int64_t i = 0; i < a.length; i += QUERIES) {
            const int64_t rows = std::min<int64_t>(QUERIES, a.length - i), reach = mask ? width : (i + rows + 31) / 32 * 32;
            for (int64_t r = 0; r < rows; r++) std::memcpy(&query[r * half], q + h * a.q.head + (i + r) * a.q.row, 2 * a.size);
            for (int64_t j = 0; j < reach; j += 32) multiply_pairs(query.data(), half, &keys[j], width, half, &score[j], reach);
            float total[QUERIES];
            const uint8_t *sees = mask ? mask + i * a.mask.row : nullptr;
            weigh(sees, a.mask.row, i, rows, a.length, reach, a.scale, score.data(), (uint16_t *)weight.data(), total);
            for (int64_t n = 0; n < a.size; n += 32) multiply_pairs(weight.data(), reach / 2, &values[n], a.size, reach / 2, &result[n], a.size);
            for (int64_t r = 0; r < rows; r++) {
                uint16_t *to = out + h * a.out.head + (i + r) * a.out.row;
                const float *from = &result[r * a.size], share = 1 / total[r];
                for (int64_t n = 0; n < a.size; n++) to[n] = rounded(from[n] * share);
            }
        }
}
