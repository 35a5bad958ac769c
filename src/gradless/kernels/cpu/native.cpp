// The CPU kernels: reference.py in loops, with the noise drawn where it is used. Same bits as the reference; compile with
// -ffp-contract=off. Plain C++ that the compiler vectorizes: each worker is built for several instruction sets and the
// right one is bound when the library loads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>
#include "blocks.hpp"
#include "noise.hpp"

enum Part { NOTHING = 0, SCALE = 1, OFFSET = 2, BOTH = 3, CODE = 4 };

struct Move {
    Direction direction;
    Words rounding;
    float coefficient, decay;
};

struct Blocks {
    uint8_t *packed;
    float *master;        // null: read the file's own fields
    const int64_t *rows;  // null: rows 0, 1, ...
    int64_t blocks;       // in a row
    int64_t all_blocks;   // in the tensor
    int32_t type, part, relative;
    int32_t clamp, lowest, highest;  // the codes' ends, and whether a query stops there
    int32_t zero;                    // the code that all-zero bits stand for
    const float *levels;             // what each code stands for, from the lowest on; null: itself
    const int32_t *pieces;           // blocks.Pieces: byte, low, code_low, width, each (2, size)
    int8_t *residual;                // one a code, in 1/256 steps; null: none
};

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

// reference._moved_blocks for one block.
template <class T> INLINE float moved(const Blocks &t, const Move &move, const uint8_t *b, float x, float z) {
    float d = half_to_float(b + T::scale_at);
    float base = t.part == OFFSET ? half_to_float(b + T::offset_at) : d;
    float unit = 1.0f;
    if (t.relative) unit = t.part == OFFSET && T::offset_unit != 0 ? __builtin_fabsf(d) * T::offset_unit : __builtin_fabsf(base);
    float step = move.coefficient * z;
    step = step * unit;
    float y = x * move.decay + step;
    if (t.part != OFFSET || T::offset_unit == 0) {
        if (base > 0) y = y < 0 ? 0 : y;
        else if (base < 0) y = y > 0 ? 0 : y;
        else y = 0;
    }
    return y;
}

// What a forward reads of one row: each block's scale and offset, under the view.
template <class T>
INLINE void row_fields(const Blocks &t, const Move *view, const uint8_t *b, const float *master, const float *z, float *scale, float *offset) {
    for (int64_t k = 0; k < t.blocks; k++, b += T::nbytes) {
        float d = half_to_float(b + T::scale_at), m = T::offset_at < 0 ? 0 : half_to_float(b + T::offset_at);
        if (master) {
            float x = view ? moved<T>(t, *view, b, master[k], z[k]) : master[k];
            if (t.part == OFFSET) m = x;
            else {
                if (t.part == BOTH) m = m * (d == 0 ? 1.0f : x / d);
                d = x;
            }
        }
        scale[k] = d, offset[k] = m;
    }
}

// One row. `z` holds three values a block, and, where codes are moved, one value a weight behind them.
template <class T, class Out>
INLINE void dequantize_row(const Blocks &t, const Move *view, Coordinates *u, int64_t row, float *z, Out *out) {
    const uint8_t *b = t.packed + row * t.blocks * T::nbytes;
    float *scale = z + t.blocks, *offset = z + 2 * t.blocks, *step = z + 3 * t.blocks;
    const bool moves_codes = view && t.part == CODE;
    if (moves_codes) Coordinates::read(*u, row * t.blocks * T::size, t.blocks * T::size, step);
    else if (view) Coordinates::read(*u, row * t.blocks, t.blocks, z);
    row_fields<T>(t, view, b, t.master ? t.master + row * t.blocks : nullptr, z, scale, offset);
    constexpr int group = T::size / T::groups;
    for (int64_t k = 0; k < t.blocks; k++, b += T::nbytes, out += T::size, step += T::size) {
        alignas(64) int8_t packed_code[T::size];
        alignas(64) float code[T::size];
        float multiplier[T::groups], offset_multiplier[T::groups];
        T::unpack(b, packed_code, multiplier, offset_multiplier);
        for (int i = 0; i < T::size; i++) code[i] = (float)packed_code[i];
        if (moves_codes)
            for (int i = 0; i < T::size; i++) code[i] = code[i] + step[i] * view->coefficient;
        if ((moves_codes && t.clamp) || t.levels)
            for (int i = 0; i < T::size; i++) {
                code[i] = code[i] < (float)t.lowest ? (float)t.lowest : code[i];
                code[i] = code[i] > (float)t.highest ? (float)t.highest : code[i];
            }
        if (t.levels)
            for (int i = 0; i < T::size; i++) code[i] = t.levels[(int)code[i] - t.lowest];
        for (int g = 0; g < T::groups; g++) {
            float s = T::groups == 1 ? scale[k] : scale[k] * multiplier[g];
            float o = T::groups == 1 ? offset[k] : offset[k] * offset_multiplier[g];
            for (int i = 0; i < group; i++) {
                float w = s * code[g * group + i];
                if (T::offset_at >= 0) w = w + o;
                store(out + g * group + i, w);
            }
        }
    }
}

typedef GridNibbles<64, 8, false> Signed64;
typedef GridNibbles<32, 8, false> Signed32;
typedef GridNibbles<64, 0, false> Unsigned64;
typedef GridNibbles<32, 0, false> Unsigned32;
typedef GridNibbles<64, 0, true> Affine64;
typedef GridNibbles<32, 0, true> Affine32;
typedef GridBytes<64, false> Bytes64;
typedef GridBytes<32, false> Bytes32;
typedef GridBytes<64, true> AffineBytes64;
typedef GridBytes<32, true> AffineBytes32;
#define EACH_TYPE(DO) \
    switch (t.type) { \
        case 0: DO(Q4_0) break; case 1: DO(Q4_1) break; case 2: DO(Q5_0) break; case 3: DO(Q5_1) break; \
        case 4: DO(Q8_0) break; case 5: DO(Q2_K) break; case 6: DO(Q3_K) break; case 7: DO(Q4_K) break; \
        case 8: DO(Q5_K) break; case 9: DO(Q6_K) break; \
        case 10: DO(Signed64) break; case 11: DO(Signed32) break; case 12: DO(Unsigned64) break; case 13: DO(Unsigned32) break; \
        case 14: DO(Affine64) break; case 15: DO(Affine32) break; case 16: DO(Bytes64) break; case 17: DO(Bytes32) break; \
        case 18: DO(AffineBytes64) break; case 19: DO(AffineBytes32) break; \
    }

#define SIZE_OF(T) size = T::size;
static int64_t block_size(const Blocks &t) {
    int64_t size = 0;
    EACH_TYPE(SIZE_OF)
    return size;
}
static size_t buffer_size(const Blocks &t, const Move *view) {
    return t.blocks * (3 + (view && t.part == CODE ? block_size(t) : 0));
}

// A worker's loop is written out for each output type because a template cannot be cloned for instruction sets.
#define DEQUANTIZE(T) \
    for (int64_t i = begin; i < end; i++) \
        dequantize_row<T>(t, view, &u, t.rows ? t.rows[i] : i, z.data(), out + i * t.blocks * T::size);
#define WORKER(NAME, OUT) \
    CLONES void NAME(const Blocks &t, const Move *view, int64_t begin, int64_t end, OUT *out) { \
        Coordinates u; \
        std::vector<float> z(buffer_size(t, view)); \
        if (view) u.u = view->direction; \
        EACH_TYPE(DEQUANTIZE) \
    }
WORKER(dequantize_f32, float)
WORKER(dequantize_bf16, uint16_t)

#define MOVE(T) \
    for (int64_t i = begin; i < end; i++) { \
        if (i % 128 == 0 || i == begin) Coordinates::read(u, i, std::min<int64_t>(128 - i % 128, end - i), z + i % 128); \
        t.master[i] = moved<T>(t, move, t.packed + i * T::nbytes, t.master[i], z[i % 128]); \
    }
CLONES void move_range(const Blocks &t, const Move &move, int64_t begin, int64_t end) {
    Coordinates u;
    u.u = move.direction;
    float z[128];
    EACH_TYPE(MOVE)
}

// Write one code into its block.
INLINE void write_code(const Blocks &t, int size, uint8_t *b, int i, int code) {
    uint32_t raw = (uint32_t)(code - t.zero);
    for (int piece = 0; piece < 2; piece++) {
        const int32_t *at = t.pieces + piece * size + i;
        int32_t low = at[2 * size], width = at[6 * size];
        uint32_t mask = ((1u << width) - 1) << low;
        b[at[0]] = (uint8_t)((b[at[0]] & ~mask) | (raw >> at[4 * size] << low & mask));
    }
}

// reference.whole_steps for one run of 128 codes, the last of n; whether any is not zero.
CLONES static bool steps_of(const Move &move, Coordinates &u, uint64_t run, int8_t *residual, int64_t n, float step[128]) {
    const float coefficient = residual ? move.coefficient * 256 : move.coefficient;
    Coordinates::read(u, run * 128, 128, step);
    int any = 0;
    for (int i = 0; i < 128; i++) {
        step[i] = step[i] * coefficient;
        any |= step[i] != 0;
    }
    if (!any) return false;
    if (coefficient != __builtin_floorf(coefficient)) {
        uint32_t random[128];
        run_of_words(move.rounding, run, random);
        any = 0;
        for (int i = 0; i < 128; i++) {
            step[i] = stochastic_round(step[i], random[i]);
            any |= step[i] != 0;
        }
    }
    if (!residual || !any) return any;
    int8_t left[128] = {0};
    residual += run * 128, n = std::min<int64_t>(128, n - (int64_t)run * 128);
    std::memcpy(left, residual, n);
    any = 0;
    for (int i = 0; i < 128; i++) {
        float owed = (float)left[i] + step[i];
        step[i] = __builtin_floorf(owed * 0x1p-8f + 0.5f);
        left[i] = (int8_t)(owed - step[i] * 256.0f);
        any |= step[i] != 0;
    }
    std::memcpy(residual, left, n);
    return any;
}

// reference.move_codes for runs [begin, end) of 128 codes: how many changed. Most steps of a sparse move are zero.
template <class T> INLINE int64_t move_codes_range(const Blocks &t, const Move &move, int64_t begin, int64_t end) {
    constexpr int part = T::size < 128 ? T::size : 128;  // a run holds several blocks, or is half of one
    int64_t moved = 0, blocks = t.all_blocks;
    Coordinates u;
    u.u = move.direction;
    for (int64_t run = begin; run < end; run++) {
        float step[128];
        if (!steps_of(move, u, run, t.residual, blocks * T::size, step)) continue;
        for (int from = 0; from < 128; from += part) {
            const float *s = step + from;
            int any = 0;
            for (int i = 0; i < part; i++) any |= s[i] != 0;
            int64_t at = run * 128 + from, k = at / T::size, first = at % T::size;
            if (!any || k >= blocks) continue;
            int8_t code[T::size];
            float multiplier[T::groups], offset_multiplier[T::groups];
            uint8_t *b = t.packed + k * T::nbytes;
            T::unpack(b, code, multiplier, offset_multiplier);
            for (int i = 0; i < part; i++) {
                if (s[i] == 0) continue;
                int c = code[first + i];
                float to = (float)c + s[i];
                to = to < (float)t.lowest ? (float)t.lowest : to > (float)t.highest ? (float)t.highest : to;
                if ((int)to == c) continue;
                write_code(t, T::size, b, (int)first + i, (int)to);
                moved++;
            }
        }
    }
    return moved;
}
#define MOVE_CODES(T) moved = move_codes_range<T>(t, move, begin, end);
int64_t move_codes(const Blocks &t, const Move &move, int64_t begin, int64_t end) {
    int64_t moved = 0;
    EACH_TYPE(MOVE_CODES)
    return moved;
}

// Plain tensors, a run of 128 values at a time.
template <class In, class Out>
INLINE void moved_run(const Move &move, Coordinates &u, int64_t run, int64_t n, int stochastic, const In *in, Out *out) {
    float step_of[128];
    Coordinates::read(u, run * 128, 128, step_of);
    uint16_t random[128];
    if (stochastic) page_of_halves(move.rounding, run, random);
    for (int64_t i = 0; i < n; i++) {
        float step = step_of[i] * move.coefficient;
        float y = load(in + i) * move.decay + step;
        if (stochastic) {
            uint32_t bits;
            std::memcpy(&bits, &y, 4);
            bits = (bits + random[i]) & 0xFFFF0000u;
            std::memcpy(&y, &bits, 4);
        }
        store(out + i, y);
    }
}
#define MOVED(NAME, IN, OUT) \
    CLONES void NAME(const Move &move, int64_t begin, int64_t end, int64_t n, int stochastic, const IN *in, OUT *out) { \
        Coordinates u; \
        u.u = move.direction; \
        for (int64_t run = begin; run < end; run++) \
            moved_run(move, u, run, std::min<int64_t>(128, n - run * 128), stochastic, in + run * 128, out + run * 128); \
    }
MOVED(moved_f32_f32, float, float)
MOVED(moved_f32_bf16, float, uint16_t)
MOVED(moved_bf16_f32, uint16_t, float)
MOVED(moved_bf16_bf16, uint16_t, uint16_t)

// Calls worker(begin, end) on shares of [0, n), each a multiple of `grain` but for the last.
template <class Worker> static void in_shares(int64_t n, int64_t grain, Worker worker) {
#pragma omp parallel for schedule(static)
    for (int64_t share = 0; share < (n + grain - 1) / grain; share++)
        worker(share * grain, std::min(n, (share + 1) * grain));
}

extern "C" {
void gradless_set_normal_table(const uint16_t *table) { set_normal_table(table); }

void gradless_coordinates(const Direction *direction, int64_t start, int64_t count, float *out) {
    in_shares(count, 1 << 14, [&](int64_t begin, int64_t end) {
        Coordinates u;
        u.u = *direction;
        Coordinates::read(u, start + begin, end - begin, out + begin);
    });
}

void gradless_dequantize(const Blocks *t, const Move *view, int64_t n, int32_t bf16, void *out) {
    in_shares(n, 32, [&](int64_t begin, int64_t end) {
        if (bf16) dequantize_bf16(*t, view, begin, end, (uint16_t *)out);
        else dequantize_f32(*t, view, begin, end, (float *)out);
    });
}

void gradless_move_blocks(const Blocks *t, const Move *move, int64_t n) {
    in_shares(n, 1 << 13, [&](int64_t begin, int64_t end) { move_range(*t, *move, begin, end); });
}

int64_t gradless_move_codes(const Blocks *t, const Move *move) {
    std::atomic<int64_t> moved{0};
    const int64_t runs = (t->all_blocks * block_size(*t) + 127) / 128;
    in_shares(runs, 1 << 8, [&](int64_t begin, int64_t end) { moved += move_codes(*t, *move, begin, end); });
    return moved;
}

void gradless_bytes(const Words *words, int64_t n, uint8_t *out) {
    in_shares((n + 255) / 256, 64, [&](int64_t begin, int64_t end) {
        for (int64_t page = begin; page < end; page++) {
            uint32_t word[64];
            page_of_words(*words, page, word);
            std::memcpy(out + 256 * page, word, std::min<int64_t>(256, n - 256 * page));
        }
    });
}

void gradless_moved(const Move *move, int64_t n, int32_t in_bf16, int32_t out_bf16, int32_t stochastic, const void *in, void *out) {
    in_shares((n + 127) / 128, 64, [&](int64_t begin, int64_t end) {
        if (in_bf16 && out_bf16) moved_bf16_bf16(*move, begin, end, n, stochastic, (const uint16_t *)in, (uint16_t *)out);
        else if (in_bf16) moved_bf16_f32(*move, begin, end, n, 0, (const uint16_t *)in, (float *)out);
        else if (out_bf16) moved_f32_bf16(*move, begin, end, n, stochastic, (const float *)in, (uint16_t *)out);
        else moved_f32_f32(*move, begin, end, n, 0, (const float *)in, (float *)out);
    });
}
}
