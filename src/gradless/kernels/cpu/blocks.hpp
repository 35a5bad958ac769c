// The block types as blocks.py reads them: w = (d * multiplier) * code + m * offset_multiplier. native.cpp lists them (KINDS).
#pragma once
#include <cstdint>
#include <cstring>
#include "noise.hpp"

INLINE float half_to_float(const uint8_t *p) {
#ifdef __FLT16_MANT_DIG__
#if defined(__aarch64__)
    __fp16 h;
#else
    _Float16 h;
#endif
    std::memcpy(&h, p, 2);
    return (float)h;
#else
    uint16_t h;
    std::memcpy(&h, p, 2);
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7FFF, bits;
    float f;
    if (magnitude >= 0x7C00) {  // infinities and NaNs
        bits = sign | 0x7F800000u | (magnitude & 0x3FF) << 13;
        std::memcpy(&f, &bits, 4);
    } else {  // normals and subnormals alike: shift into place, then undo the difference of the exponents' biases
        bits = magnitude << 13;
        std::memcpy(&f, &bits, 4);
        f *= 0x1p112f;
        std::memcpy(&bits, &f, 4);
        bits |= sign;
        std::memcpy(&f, &bits, 4);
    }
    return f;
#endif
}

// Sixteen bytes at once, on any target that has GCC's or clang's vector types.
typedef uint8_t Bytes __attribute__((vector_size(16)));
INLINE Bytes load_bytes(const uint8_t *p) {
    Bytes v;
    std::memcpy(&v, p, 16);
    return v;
}
// One store of 32 bytes: a wider load that follows two stores would have to wait for both.
INLINE void store_codes(int8_t *code, Bytes low, Bytes high) {
    typedef uint8_t Pair __attribute__((vector_size(32)));
    Pair v = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    std::memcpy(code, &v, 32);
}
// Each type has constants, and unpack(bytes, codes, multiplier, offset_multiplier).
template <uint8_t ZERO> struct Nibbles {
    INLINE void unpack(const uint8_t *q, int8_t *code) {
        Bytes v = load_bytes(q);
        store_codes(code, (v & 15) - ZERO, (v >> 4) - ZERO);
    }
    INLINE void unpack_fifth(const uint8_t *qh, const uint8_t *q, int8_t *code) {
        const Bytes bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const Bytes low = {qh[0], qh[0], qh[0], qh[0], qh[0], qh[0], qh[0], qh[0], qh[1], qh[1], qh[1], qh[1], qh[1], qh[1], qh[1], qh[1]};
        const Bytes high = {qh[2], qh[2], qh[2], qh[2], qh[2], qh[2], qh[2], qh[2], qh[3], qh[3], qh[3], qh[3], qh[3], qh[3], qh[3], qh[3]};
        Bytes v = load_bytes(q);
        store_codes(code, ((v & 15) | ((Bytes)((low & bit) != 0) & 16)) - ZERO, ((v >> 4) | ((Bytes)((high & bit) != 0) & 16)) - ZERO);
    }
};

struct Q4_0 {
    static constexpr int size = 32, nbytes = 18, groups = 1, scale_at = 0, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { Nibbles<8>::unpack(b + 2, code); }
};
struct Q4_1 {
    static constexpr int size = 32, nbytes = 20, groups = 1, scale_at = 0, offset_at = 2;
    static constexpr float offset_unit = 7.5f;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { Nibbles<0>::unpack(b + 4, code); }
};
struct Q5_0 {
    static constexpr int size = 32, nbytes = 22, groups = 1, scale_at = 0, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { Nibbles<16>::unpack_fifth(b + 2, b + 6, code); }
};
struct Q5_1 {
    static constexpr int size = 32, nbytes = 24, groups = 1, scale_at = 0, offset_at = 2;
    static constexpr float offset_unit = 15.5f;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { Nibbles<0>::unpack_fifth(b + 4, b + 8, code); }
};
struct Q8_0 {
    static constexpr int size = 32, nbytes = 34, groups = 1, scale_at = 0, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { std::memcpy(code, b + 2, 32); }
};

// 256 two-bit codes in 64 bytes: each half of 32 bytes holds four planes of 32.
INLINE void two_bits(const uint8_t *q, int8_t *code) {
    for (int half = 0; half < 2; half++)
        for (int plane = 0; plane < 4; plane++)
            for (int i = 0; i < 32; i++) code[half * 128 + plane * 32 + i] = q[half * 32 + i] >> (2 * plane) & 3;
}
// 256 four-bit codes in 128 bytes: every 32 bytes hold 32 low nibbles, then 32 high ones.
INLINE void four_bits(const uint8_t *q, int8_t *code) {
    for (int run = 0; run < 4; run++)
        for (int i = 0; i < 32; i++) {
            code[run * 64 + i] = q[run * 32 + i] & 15;
            code[run * 64 + 32 + i] = q[run * 32 + i] >> 4;
        }
}
// The eight 6-bit scales and minima that Q4_K and Q5_K keep in 12 bytes.
INLINE void k_scales(const uint8_t *s, float *multiplier, float *offset_multiplier) {
    for (int j = 0; j < 4; j++) {
        multiplier[j] = (float)(s[j] & 63);
        multiplier[j + 4] = (float)((s[8 + j] & 15) | (s[j] >> 6) << 4);
        offset_multiplier[j] = -(float)(s[4 + j] & 63);
        offset_multiplier[j + 4] = -(float)((s[8 + j] >> 4) | (s[4 + j] >> 6) << 4);
    }
}

struct Q2_K {
    static constexpr int size = 256, nbytes = 84, groups = 16, scale_at = 80, offset_at = 82;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *multiplier, float *offset_multiplier) {
        two_bits(b + 16, code);
        for (int j = 0; j < 16; j++) {
            multiplier[j] = (float)(b[j] & 15);
            offset_multiplier[j] = -(float)(b[j] >> 4);
        }
    }
};
struct Q3_K {
    static constexpr int size = 256, nbytes = 110, groups = 16, scale_at = 108, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *multiplier, float *) {
        two_bits(b + 32, code);
        for (int plane = 0; plane < 8; plane++)
            for (int i = 0; i < 32; i++) code[plane * 32 + i] += (int8_t)(((b[i] >> plane & 1) << 2) - 4);
        const uint8_t *s = b + 96;
        for (int j = 0; j < 16; j++)
            multiplier[j] = (float)(((j < 8 ? s[j] & 15 : s[j - 8] >> 4) | (s[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32);
    }
};
struct Q4_K {
    static constexpr int size = 256, nbytes = 144, groups = 8, scale_at = 0, offset_at = 2;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *multiplier, float *offset_multiplier) {
        four_bits(b + 16, code);
        k_scales(b + 4, multiplier, offset_multiplier);
    }
};
struct Q5_K {
    static constexpr int size = 256, nbytes = 176, groups = 8, scale_at = 0, offset_at = 2;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *multiplier, float *offset_multiplier) {
        four_bits(b + 48, code);
        for (int plane = 0; plane < 8; plane++)
            for (int i = 0; i < 32; i++) code[plane * 32 + i] |= (int8_t)((b[16 + i] >> plane & 1) << 4);
        k_scales(b + 4, multiplier, offset_multiplier);
    }
};
struct Q6_K {
    static constexpr int size = 256, nbytes = 210, groups = 16, scale_at = 208, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *multiplier, float *) {
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 32; i++) {
                const uint8_t *low = b + half * 64 + i;
                uint8_t high = b[128 + half * 32 + i];
                int8_t *c = code + half * 128 + i;
                c[0] = (int8_t)(((low[0] & 15) | (high & 3) << 4) - 32);
                c[32] = (int8_t)(((low[32] & 15) | (high >> 2 & 3) << 4) - 32);
                c[64] = (int8_t)(((low[0] >> 4) | (high >> 4 & 3) << 4) - 32);
                c[96] = (int8_t)(((low[32] >> 4) | (high >> 6) << 4) - 32);
            }
        for (int j = 0; j < 16; j++) multiplier[j] = (float)(int8_t)b[192 + j];
    }
};

// 4-bit codes that stand for levels (blocks.py has them).
struct IQ4_NL {
    static constexpr int size = 32, nbytes = 18, groups = 1, scale_at = 0, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { Nibbles<0>::unpack(b + 2, code); }
};

// Our own types: d, then m if there is one, then the codes of any grid, two in a byte or one.
template <int SIZE, int ZERO, bool OFFSET> struct GridNibbles {
    static constexpr int at = OFFSET ? 4 : 2, size = SIZE, nbytes = at + SIZE / 2, groups = 1, scale_at = 0, offset_at = OFFSET ? 2 : -1;
    static constexpr float offset_unit = OFFSET ? 7.5f : 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) {
        for (int i = 0; i < SIZE / 32; i++) Nibbles<ZERO>::unpack(b + at + 16 * i, code + 32 * i);
    }
};
template <int SIZE, bool OFFSET> struct GridBytes {
    static constexpr int at = OFFSET ? 4 : 2, size = SIZE, nbytes = at + SIZE, groups = 1, scale_at = 0, offset_at = OFFSET ? 2 : -1;
    static constexpr float offset_unit = OFFSET ? 127.5f : 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) { std::memcpy(code, b + at, SIZE); }
};

// With a zero point: m is d, and its multiplier minus the zero point.
template <int SIZE, bool BYTES> struct Zeroed {
    static constexpr int size = SIZE, nbytes = 4 + (BYTES ? SIZE : SIZE / 2), groups = 1, scale_at = 0, offset_at = 0;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *offset_multiplier) {
        int16_t zero;
        std::memcpy(&zero, b + 2, 2);
        offset_multiplier[0] = -(float)zero;
        if (BYTES) std::memcpy(code, b + 4, SIZE);
        else
            for (int i = 0; i < SIZE / 32; i++) Nibbles<0>::unpack(b + 4 + 16 * i, code + 32 * i);
    }
};
// With d in fp32.
template <int SIZE, bool BYTES> struct Wide {
    static constexpr int size = SIZE, nbytes = 4 + (BYTES ? SIZE : SIZE / 2), groups = 1, scale_at = 0, offset_at = -1;
    static constexpr float offset_unit = 0;
    INLINE void unpack(const uint8_t *b, int8_t *code, float *, float *) {
        if (BYTES) std::memcpy(code, b + 4, SIZE);
        else
            for (int i = 0; i < SIZE / 32; i++) Nibbles<0>::unpack(b + 4 + 16 * i, code + 32 * i);
    }
};

#define BOTH_SIZES(NAME, TEMPLATE, ...) \
    typedef TEMPLATE<64, __VA_ARGS__> NAME##_64; \
    typedef TEMPLATE<32, __VA_ARGS__> NAME##_32;
BOTH_SIZES(SIGNED_NIBBLES, GridNibbles, 8, false)
BOTH_SIZES(NIBBLES, GridNibbles, 0, false)
BOTH_SIZES(NIBBLES_OFFSET, GridNibbles, 0, true)
BOTH_SIZES(NIBBLES_ZERO, Zeroed, false)
BOTH_SIZES(NIBBLES_FP32, Wide, false)
BOTH_SIZES(BYTES, GridBytes, false)
BOTH_SIZES(BYTES_OFFSET, GridBytes, true)
BOTH_SIZES(BYTES_ZERO, Zeroed, true)
BOTH_SIZES(BYTES_FP32, Wide, true)

template <class T> constexpr bool has_zero_point = T::offset_at == T::scale_at;
template <class T> constexpr bool has_wide_scale = false;
template <int SIZE, bool BYTES> constexpr bool has_wide_scale<Wide<SIZE, BYTES>> = true;

template <class T> INLINE float scale_of(const uint8_t *b) {
    if (!has_wide_scale<T>) return half_to_float(b + T::scale_at);
    float d;
    std::memcpy(&d, b + T::scale_at, 4);
    return d;
}
