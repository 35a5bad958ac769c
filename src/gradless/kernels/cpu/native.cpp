// The CPU kernels: reference.py in loops, with the noise drawn where it is used. They have the reference's bits; compile them
// with -ffp-contract=off. This is plain C++ that the compiler vectorizes: each worker is built for several instruction sets,
// and the right one is bound when the library loads.
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include "bf16.hpp"
#include "blocks.hpp"
#include "fused.hpp"
#include "int8.hpp"
#include "noise.hpp"
#include "shifts.hpp"

enum Part { NOTHING = 0, SCALE = 1, OFFSET = 2, BOTH = 3, CODE = 4 };

struct Move {
    Direction direction;
    Words rounding;
    float coefficient, decay;
};

struct Blocks {
    uint8_t *packed;
    float *values;             // the tuned values; null: none are, so the file's are read
    const int64_t *rows;       // null: rows 0, 1, ...
    int64_t blocks;            // in a row
    int64_t all_blocks;        // in the weight
    int64_t blocks_per_value;  // consecutive blocks of a row that share one tuned value
    int32_t kind;              // a Kind
    int32_t part, relative;    // a Part; whether moves are measured in each value's own unit
    int32_t clamp, lowest, highest;  // the codes' ends, and whether a query stops there
    int32_t zero;                    // the code that all-zero bits stand for
    const float *levels;             // the level of each code, from the lowest on; null: the codes are levels
    const int32_t *pieces;           // blocks.Pieces: byte, low, code_low, width, each (2, size)
    int8_t *residual;                // one a tuned code, in 1/256 steps; null: none
    int64_t stride;                  // codes are tuned in rows 0, stride, 2 * stride, ...
};

// Tuned values in a row.
INLINE int64_t values_in_row(const Blocks &t) { return (t.blocks + t.blocks_per_value - 1) / t.blocks_per_value; }
// The first block of value i.
INLINE int64_t block_of(const Blocks &t, int64_t i) {
    const int64_t values = values_in_row(t);
    return t.blocks_per_value == 1 ? i : i / values * t.blocks + i % values * t.blocks_per_value;
}

// For a run of tuned values: the unit of a move, and the range of each value. A scale keeps its sign or stays at zero.
struct Rooms {
    float unit[128], least[128], most[128];

    // For values [first, first + n).
    template <class T> INLINE void read(Rooms &r, const Blocks &t, int64_t first, int n) {
        float d[128] = {0}, base[128] = {0};
        for (int i = 0; i < n; i++) {
            const uint8_t *b = t.packed + block_of(t, first + i) * T::nbytes;
            __builtin_prefetch(b + 128 * T::nbytes);
            d[i] = scale_of<T>(b);
            base[i] = t.part == OFFSET ? half_to_float(b + T::offset_at) : d[i];
        }
        const bool by_scale = t.part == OFFSET && T::offset_unit != 0;  // such an offset may cross zero
        const float far = __builtin_inff();
        for (int i = 0; i < 128; i++) {
            const float unit = by_scale ? __builtin_fabsf(d[i]) * T::offset_unit : __builtin_fabsf(base[i]);
            r.unit[i] = t.relative ? unit : 1.0f;
            r.least[i] = by_scale || base[i] < 0 ? -far : 0;
            r.most[i] = by_scale || base[i] > 0 ? far : 0;
        }
    }
};

// reference.moved_blocks for a run of values.
INLINE void move_run(const Move &move, const Rooms &room, const float z[128], float x[128]) {
    const float coefficient = move.coefficient, decay = move.decay;
    for (int i = 0; i < 128; i++) {
        float step = coefficient * z[i];
        step = step * room.unit[i];
        float y = x[i] * decay + step;
        y = y < room.least[i] ? room.least[i] : y;
        y = y > room.most[i] ? room.most[i] : y;
        x[i] = room.least[i] < room.most[i] ? y : 0;
    }
}

// A row as a forward reads it.
struct View {
    const Move *move;  // null: the row as it is
    const View *same;  // an earlier view along the same direction, or this one
    Coordinates u;
    std::vector<float> coordinate;  // one for each tuned value or code
    std::vector<float> value;       // the tuned values
    std::vector<float> scale, offset;
    bool moves_codes;

    // The tuned values of one row, moved.
    template <class T> INLINE void read_values(View &v, const Blocks &t, int64_t row) {
        const int64_t values = values_in_row(t);
        for (int64_t first = 0; first < values; first += 128) {
            const int n = (int)std::min<int64_t>(128, values - first);
            float x[128] = {0}, z[128] = {0};
            std::memcpy(x, t.values + row * values + first, sizeof(float) * n);
            if (v.move) {
                Rooms room;
                Rooms::read<T>(room, t, row * values + first, n);
                std::memcpy(z, v.same->coordinate.data() + first, sizeof(float) * n);
                move_run(*v.move, room, z, x);
            }
            std::memcpy(v.value.data() + first, x, sizeof(float) * n);
        }
    }

    // The coordinates, scales and offsets of one row.
    template <class T> INLINE void read(View &v, const Blocks &t, int64_t row) {
        const uint8_t *b = t.packed + row * t.blocks * T::nbytes;
        v.moves_codes = v.move && t.part == CODE && row % t.stride == 0;
        if (v.same == &v && v.move && (v.moves_codes || t.part != CODE)) {
            const int64_t n = t.part == CODE ? t.blocks * T::size : values_in_row(t);
            Coordinates::read(v.u, row * n, n, v.coordinate.data());
        }
        if (t.values) read_values<T>(v, t, row);
        for (int64_t k = 0; k < t.blocks; k++, b += T::nbytes) {
            float d = scale_of<T>(b), m = T::offset_at < 0 ? 0 : half_to_float(b + T::offset_at);
            if (t.values) {
                const float x = v.value[t.blocks_per_value == 1 ? k : k / t.blocks_per_value];
                if (t.part == OFFSET) m = x;
                else {
                    if (t.part == BOTH) m = m * (d == 0 ? 1.0f : x / d);
                    d = x;
                }
            }
            v.scale[k] = d, v.offset[k] = has_zero_point<T> ? d : m;
        }
    }
};

// One block; `level` holds its codes as they are packed, or its levels.
template <class T, class Level, class Out>
INLINE void write_block(const Level *level, float scale, float offset, const float *multiplier, const float *offset_multiplier, Out *out) {
    constexpr int group = T::size / T::groups;
    for (int g = 0; g < T::groups; g++) {
        float s = T::groups == 1 ? scale : scale * multiplier[g];
        float o = T::groups == 1 && !has_zero_point<T> ? offset : offset * offset_multiplier[g];
        for (int i = g * group; i < (g + 1) * group; i++) {
            float w = s * (float)level[i];
            if (T::offset_at >= 0) w = w + o;
            store(out + i, w);
        }
    }
}

// One row under every view; a view begins `apart` values behind the one before.
template <class T, class Out> INLINE void dequantize_row(const Blocks &t, std::vector<View> &views, int64_t row, int64_t apart, Out *out) {
    const uint8_t *b = t.packed + row * t.blocks * T::nbytes;
    for (View &v : views) View::read<T>(v, t, row);
    for (int64_t k = 0; k < t.blocks; k++, b += T::nbytes, out += T::size) {
        alignas(64) int8_t packed_code[T::size];
        float multiplier[T::groups], offset_multiplier[T::groups];
        T::unpack(b, packed_code, multiplier, offset_multiplier);
        for (size_t i = 0; i < views.size(); i++) {
            const View &v = views[i];
            if (!v.moves_codes && !t.levels) {
                write_block<T>(packed_code, v.scale[k], v.offset[k], multiplier, offset_multiplier, out + i * apart);
                continue;
            }
            alignas(64) float code[T::size];
            for (int j = 0; j < T::size; j++) code[j] = (float)packed_code[j];
            if (v.moves_codes) {
                const float *step = v.same->coordinate.data() + k * T::size;
                for (int j = 0; j < T::size; j++) code[j] = code[j] + step[j] * v.move->coefficient;
            }
            if ((v.moves_codes && t.clamp) || t.levels)
                for (int j = 0; j < T::size; j++) {
                    code[j] = code[j] < (float)t.lowest ? (float)t.lowest : code[j];
                    code[j] = code[j] > (float)t.highest ? (float)t.highest : code[j];
                }
            if (t.levels)
                for (int j = 0; j < T::size; j++) code[j] = t.levels[(int)(code[j] - (float)t.lowest)];
            write_block<T>(code, v.scale[k], v.offset[k], multiplier, offset_multiplier, out + i * apart);
        }
    }
}

// The kinds of blocks, in the order of blocks.Kind (compared when the library loads): each name is a type of blocks.hpp.
#define KINDS(DO, MORE) \
    DO(Q4_0, MORE) DO(Q4_1, MORE) DO(Q5_0, MORE) DO(Q5_1, MORE) DO(Q8_0, MORE) \
    DO(Q2_K, MORE) DO(Q3_K, MORE) DO(Q4_K, MORE) DO(Q5_K, MORE) DO(Q6_K, MORE) DO(IQ4_NL, MORE) \
    DO(SIGNED_NIBBLES_64, MORE) DO(SIGNED_NIBBLES_32, MORE) \
    DO(NIBBLES_64, MORE) DO(NIBBLES_32, MORE) DO(NIBBLES_OFFSET_64, MORE) DO(NIBBLES_OFFSET_32, MORE) \
    DO(NIBBLES_ZERO_64, MORE) DO(NIBBLES_ZERO_32, MORE) DO(NIBBLES_FP32_64, MORE) DO(NIBBLES_FP32_32, MORE) \
    DO(BYTES_64, MORE) DO(BYTES_32, MORE) DO(BYTES_OFFSET_64, MORE) DO(BYTES_OFFSET_32, MORE) \
    DO(BYTES_ZERO_64, MORE) DO(BYTES_ZERO_32, MORE) DO(BYTES_FP32_64, MORE) DO(BYTES_FP32_32, MORE)
#define ENUMERATOR(T, _) KIND_##T,
#define NAME_AND_SPACE(T, _) #T " "
#define CASE(T, DO) \
    case KIND_##T: { \
        DO(T) \
    } break;
enum Kind { KINDS(ENUMERATOR, _) };
// DO(T) for the type T of a tensor's blocks.
#define EACH_TYPE(DO) \
    switch (t.kind) { KINDS(CASE, DO) }

#define SIZE_OF(T) size = T::size;
static int64_t block_size(const Blocks &t) {
    int64_t size = 0;
    EACH_TYPE(SIZE_OF)
    return size;
}
#define GROUPS_OF(T) groups = T::groups;
static int64_t block_groups(const Blocks &t) {
    int64_t groups = 0;
    EACH_TYPE(GROUPS_OF)
    return groups;
}
// The views of `count` moves, or one view of the weight as it is. Each worker has its own.
static std::vector<View> views_of(const Blocks &t, const Move *moves, int64_t count) {
    std::vector<View> views(std::max<int64_t>(1, count));
    for (int64_t i = 0; i < (int64_t)views.size(); i++) {
        View &v = views[i];
        v.move = count ? moves + i : nullptr;
        v.same = &v;
        for (int64_t j = 0; j < i; j++)
            if (!std::memcmp(&moves[i].direction, &moves[j].direction, sizeof(Direction))) v.same = views[j].same;
        if (count) v.u.u = moves[i].direction;
        v.coordinate.resize(count && v.same == &v ? (t.part == CODE ? t.blocks * block_size(t) : values_in_row(t)) : 0);
        v.value.resize(t.values ? values_in_row(t) : 0);
        v.scale.resize(t.blocks), v.offset.resize(t.blocks);
    }
    return views;
}

// A worker's loop is written out for each output type because a template cannot be cloned for instruction sets.
#define DEQUANTIZE(T) \
    for (int64_t i = begin; i < end; i++) \
        dequantize_row<T>(t, views, t.rows ? t.rows[i] : i, n * t.blocks * T::size, out + (i - begin) * t.blocks * T::size);
#define WORKER(NAME, OUT) \
    CLONES void NAME(const Blocks &t, const Move *moves, int64_t count, int64_t n, int64_t begin, int64_t end, OUT *out) { \
        std::vector<View> views = views_of(t, moves, count); \
        EACH_TYPE(DEQUANTIZE) \
    }
WORKER(dequantize_f32, float)
WORKER(dequantize_bf16, uint16_t)

// Rows [begin, end) of the product of bf16, for all of m tokens: out is (m, n).
CLONES void multiply_panel(const uint32_t *panel, int64_t columns, const uint16_t *x, int64_t m, int64_t n, int64_t begin, int64_t end, uint16_t *out) {
    for (int64_t first = 0; first < m; first += BF16_TILE) {
        float y[BF16_TILE][BF16_PANEL];
        const uint32_t *token[BF16_TILE];
        for (int i = 0; i < BF16_TILE; i++) token[i] = (const uint32_t *)(x + std::min(first + i, m - 1) * columns);
        product_bf16(panel, columns / 2, token, y);
        for (int64_t i = first; i < std::min(first + BF16_TILE, m); i++)
            for (int64_t r = begin; r < end; r++) out[i * n + r] = to_bf16(y[i - first][r - begin]);
    }
}

// One row of each view's panel.
template <class T> INLINE void pack_row(const Blocks &t, std::vector<View> &views, int64_t row, std::vector<Panel> &panels, int r) {
    const uint8_t *b = t.packed + row * t.blocks * T::nbytes;
    const float lowest = t.clamp ? (float)t.lowest : -32639, highest = t.clamp ? (float)t.highest : 32639;
    for (View &v : views) View::read<T>(v, t, row);
    constexpr int group = T::size / T::groups;
    for (int64_t k = 0; k < t.blocks; k++, b += T::nbytes) {
        alignas(64) int8_t code[T::size];
        alignas(64) uint8_t low[T::size], high[T::size];
        float multiplier[T::groups], offset_multiplier[T::groups];
        T::unpack(b, code, multiplier, offset_multiplier);
        for (int i = 0; i < T::size; i++) low[i] = (uint8_t)(code[i] + 128);
        for (size_t i = 0; i < views.size(); i++) {
            const View &v = views[i];
            Panel &p = panels[i];
            const bool shown = i > 0 && p.code[0] == panels[0].code[0];
            if (v.moves_codes) {
                const float *step = v.same->coordinate.data() + k * T::size;
                for (int j = 0; j < T::size; j++) {
                    float moved = (float)code[j] + step[j] * v.move->coefficient;
                    moved = moved < lowest ? lowest : moved;
                    moved = moved > highest ? highest : moved;
                    int bytes = (int)moved + 32896;
                    low[j] = (uint8_t)bytes, high[j] = (uint8_t)(bytes >> 8);
                }
            }
            for (int64_t j = 0, g = k * T::groups; j < T::size; j += group, g++) {
                p.scale[g * PANEL + r] = T::groups == 1 ? v.scale[k] : v.scale[k] * multiplier[j / group];
                if (T::offset_at >= 0) p.offset[g * PANEL + r] = T::groups == 1 && !has_zero_point<T> ? v.offset[k] : v.offset[k] * offset_multiplier[j / group];
                if (shown) continue;
                uint32_t *at[2] = {&p.code[0][g * group / 4 * PANEL], &p.code[1][g * group / 4 * PANEL]};
                for (int i = 0; i < group; i += 4) std::memcpy(at[0] + i / 4 * PANEL + r, low + j + i, 4);
                int wide = 0;
                if (v.moves_codes)
                    for (int i = 0; i < group; i++) wide |= high[j + i] ^ 128;
                if (!wide) continue;
                if (!p.wide[g]) std::memset(at[1], 128, group * PANEL);
                p.wide[g] = 1;
                for (int i = 0; i < group; i += 4) std::memcpy(at[1] + i / 4 * PANEL + r, high + j + i, 4);
            }
        }
    }
}

// Rows [begin, end) as a panel for each view; the last one stands in for those that are missing. Views of block values show the same
// codes.
#define PACK(T) \
    { \
        std::vector<Panel> panels; \
        const bool counted = t.lowest >= t.zero && !(t.part == CODE && count); /* upwards from all-zero bits */ \
        const int reach = counted ? std::max(15, t.highest - t.zero) : 65535; \
        for (size_t i = 0; i < views.size(); i++) { \
            const Panel *same = i > 0 && t.part != CODE ? &panels[0] : nullptr; \
            panels.emplace_back(t.blocks * T::groups, T::size / T::groups / 4, T::offset_at >= 0, t.zero, reach, same); \
        } \
        for (int r = 0; r < PANEL; r++) { \
            int64_t i = std::min(begin + r, end - 1); \
            pack_row<T>(t, views, t.rows ? t.rows[i] : i, panels, r); \
        } \
        return panels; \
    }
CLONES static std::vector<Panel> panels_of(const Blocks &t, const Move *moves, int64_t count, int64_t begin, int64_t end) {
    std::vector<View> views = views_of(t, moves, count);
    EACH_TYPE(PACK)
    __builtin_unreachable();
}

// Quantized activations, in tiles of tokens.
struct Tokens {
    int64_t columns, groups;
    std::unique_ptr<uint32_t[]> x;
    std::unique_ptr<float[]> sum, scale;  // scale: (tokens,)
    std::unique_ptr<int32_t[]> bias;

    Tokens(int64_t tiles, int64_t columns, int64_t groups)
        : columns(columns), groups(groups), x(new uint32_t[tiles * columns / 4 * TILE]), sum(new float[tiles * groups * TILE]),
          scale(new float[tiles * TILE]), bias(new int32_t[tiles * groups * TILE]) {}
    Tile tile(int64_t k) const { return {&x[k * columns / 4 * TILE], &sum[k * groups * TILE], &bias[k * groups * TILE]}; }
};

// The i-th token, from its activations.
template <class In> INLINE void quantize(const In *in, int64_t i, Tokens &tokens, int8_t *quantized) {
    uint32_t top = 0;  // the bits of the largest magnitude: a NaN is larger than any number
    for (int64_t j = 0; j < tokens.columns; j++) {
        float value = load(in + j);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        top = std::max(top, bits & 0x7FFFFFFF);
    }
    float scale;
    std::memcpy(&scale, &top, 4);
    scale = scale / 127;
    scale = scale < 0x1p-126f ? 1 : scale;
    tokens.scale[i] = scale;
    const float per_step = 1 / scale;
    for (int64_t j = 0; j < tokens.columns; j++) {
        float rounded = load(in + j) * per_step + 0x1.8p23f;  // to nearest even: its lowest bits are the integer's
        uint32_t bits;
        std::memcpy(&bits, &rounded, 4);
        quantized[j] = (int8_t)bits;
    }
    const int64_t tile = i / TILE, slot = i % TILE, group = tokens.columns / tokens.groups;
    uint32_t *x = &tokens.x[tile * tokens.columns / 4 * TILE + slot];
    for (int64_t j = 0; j < tokens.columns; j += 4, x += TILE) std::memcpy(x, quantized + j, 4);
    for (int64_t g = 0; g < tokens.groups; g++, quantized += group) {
        int32_t sum = 0;
        for (int64_t j = 0; j < group; j++) sum += quantized[j];
        const int64_t at = (tile * tokens.groups + g) * TILE + slot;
        tokens.sum[at] = (float)sum, tokens.bias[at] = -128 * sum;
    }
}
// Tokens [begin, end) of m; the last one stands in for those that are missing.
#define QUANTIZE(NAME, IN) \
    CLONES void NAME(const IN *x, int64_t m, int64_t begin, int64_t end, Tokens &tokens) { \
        std::vector<int8_t> row(tokens.columns); \
        for (int64_t i = begin; i < end; i++) quantize(x + std::min(i, m - 1) * tokens.columns, i, tokens, row.data()); \
    }
QUANTIZE(quantize_f32, float)
QUANTIZE(quantize_bf16, uint16_t)

// Rows [begin, end) of the product, for all of m tokens: out is (m, n).
#define MULTIPLY(NAME, OUT) \
    CLONES void NAME(const Panel &panel, const Tokens &tokens, int64_t m, int64_t n, int64_t begin, int64_t end, OUT *out) { \
        for (int64_t i = 0; i < m; i += TILE) { \
            float y[TILE][PANEL]; \
            product(panel, tokens.tile(i / TILE), y); \
            for (int64_t k = i; k < std::min(i + TILE, m); k++) \
                for (int64_t r = begin; r < end; r++) store(out + k * n + r, y[k - i][r - begin] * tokens.scale[k]); \
        } \
    }
MULTIPLY(multiply_f32, float)
MULTIPLY(multiply_bf16, uint16_t)

// The change of each group of some rows by a shift of 1: (groups, SHIFT_ROWS), for types whose offset is a field of its own.
#define UNITS(T) \
    if constexpr (T::offset_at >= 0 && !has_zero_point<T>) \
        for (int r = 0; r < SHIFT_ROWS; r++) { \
            const uint8_t *row = t.packed + rows[std::min(begin + r, end - 1)] * t.blocks * T::nbytes; \
            for (int64_t k = 0; k < t.blocks; k++) { \
                const uint8_t *b = row + k * T::nbytes, *first = row + k / t.blocks_per_value * t.blocks_per_value * T::nbytes; \
                float by = T::offset_unit != 0 ? __builtin_fabsf(scale_of<T>(first)) * T::offset_unit : __builtin_fabsf(half_to_float(first + T::offset_at)); \
                by = t.relative ? by : 1; \
                alignas(64) int8_t code[T::size]; \
                float multiplier[T::groups], offset_multiplier[T::groups]; \
                if (T::groups > 1) T::unpack(b, code, multiplier, offset_multiplier); \
                for (int64_t g = 0; g < T::groups; g++) \
                    unit[(k * T::groups + g) * SHIFT_ROWS + r] = T::groups == 1 ? by : by * offset_multiplier[g]; \
            } \
        }
CLONES static void units_of(const Blocks &t, const int64_t *rows, int64_t begin, int64_t end, float *unit) {
    EACH_TYPE(UNITS)
}
SHIFT(shift_f32, float)
SHIFT(shift_bf16, uint16_t)

// The moves of block values [begin, end), one after the other.
#define MOVE(T) \
    for (int64_t first = begin; first < end; first = (first / 128 + 1) * 128) { \
        const int64_t n = std::min(end, (first / 128 + 1) * 128) - first; \
        Rooms room; \
        Rooms::read<T>(room, t, first, (int)n); \
        float x[128] = {0}, z[128] = {0}; \
        std::memcpy(x, t.values + first, sizeof(float) * n); \
        for (int64_t k = 0; k < count; k++) { \
            Coordinates::read(u[k], first, n, z); \
            move_run(moves[k], room, z, x); \
        } \
        std::memcpy(t.values + first, x, sizeof(float) * n); \
    }
CLONES void move_range(const Blocks &t, const Move *moves, int64_t count, int64_t begin, int64_t end) {
    std::vector<Coordinates> u(count);
    for (int64_t k = 0; k < count; k++) u[k].u = moves[k].direction;
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

// reference.whole_steps for codes [first, last) of a run of 128, zero for its others; whether any is not zero. `residual` is
// that of the first one, or null.
CLONES static bool steps_of(const Move &move, Coordinates &u, uint64_t run, int first, int last, int8_t *residual, float step[128]) {
    const float coefficient = residual ? move.coefficient * 256 : move.coefficient;
    Coordinates::read(u, run * 128, 128, step);
    int any = 0;
    for (int i = 0; i < 128; i++) {
        step[i] = i >= first && i < last ? step[i] * coefficient : 0;
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
    std::memcpy(left + first, residual, last - first);
    any = 0;
    for (int i = 0; i < 128; i++) {
        float owed = (float)left[i] + step[i];
        step[i] = __builtin_floorf(owed * 0x1p-8f + 0.5f);
        left[i] = (int8_t)(owed - step[i] * 256.0f);
        any |= step[i] != 0;
    }
    std::memcpy(residual, left + first, last - first);
    return any;
}

// Codes are updated in stretches: a tuned row, or, if every row is tuned, 2^15 codes, so that noise is drawn once.
INLINE int64_t stretch_length(const Blocks &t, int size) { return t.stride == 1 ? 1 << 15 : t.blocks * size; }

// reference.move_codes for stretches [begin, end): how many codes changed. Most steps of a sparse move are zero.
template <class T> INLINE int64_t move_codes_range(const Blocks &t, const Move &move, int64_t begin, int64_t end) {
    constexpr int part = T::size < 128 ? T::size : 128;  // a run holds several blocks, or is half of one
    const int64_t length = stretch_length(t, T::size), runs_in = length / 128 + 2;
    int64_t moved = 0;
    Coordinates u;
    u.u = move.direction;
    for (int64_t i = begin * runs_in; i < end * runs_in; i++) {
        const int64_t stretch = i / runs_in, from_code = stretch * t.stride * length;
        const int64_t to_code = std::min(from_code + length, t.all_blocks * T::size), run = from_code / 128 + i % runs_in;
        const int64_t lowest = std::max(from_code, run * 128), highest = std::min(to_code, run * 128 + 128);
        if (lowest >= highest) continue;
        int8_t *residual = t.residual ? t.residual + stretch * length + (lowest - from_code) : nullptr;
        float step[128];
        if (!steps_of(move, u, run, lowest - run * 128, highest - run * 128, residual, step)) continue;
        for (int from = 0; from < 128; from += part) {
            const float *s = step + from;
            int any = 0;
            for (int i = 0; i < part; i++) any |= s[i] != 0;
            if (!any) continue;
            int64_t at = run * 128 + from, k = at / T::size, first = at % T::size;
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

// reference.vectors for sums [begin, end).
#define VECTORS(NAME, CODE, OUT) \
    CLONES void NAME(const CODE *codes, const float *table, int64_t codebooks, int64_t entries, int64_t size, int64_t begin, int64_t end, OUT *out) { \
        for (int64_t i = begin; i < end; i++) \
            for (int64_t from = 0; from < size; from += 8) { \
                float sum[8]; \
                for (int64_t k = 0; k < codebooks; k++) { \
                    const float *vector = table + (k * entries + ((int64_t)codes[i * codebooks + k] & (entries - 1))) * size + from; \
                    for (int j = 0; j < 8; j++) sum[j] = k ? sum[j] + vector[j] : vector[j]; \
                } \
                for (int j = 0; j < 8; j++) store(out + i * size + from + j, sum[j]); \
            } \
    }
VECTORS(vectors_i8_f32, int8_t, float)
VECTORS(vectors_i8_bf16, int8_t, uint16_t)
VECTORS(vectors_i16_f32, int16_t, float)
VECTORS(vectors_i16_bf16, int16_t, uint16_t)

// Calls worker(begin, end) on shares of [0, n), each a multiple of `grain` but for the last.
template <class Worker> static void in_shares(int64_t n, int64_t grain, Worker worker) {
#pragma omp parallel for schedule(static)
    for (int64_t share = 0; share < (n + grain - 1) / grain; share++)
        worker(share * grain, std::min(n, (share + 1) * grain));
}

// reference.linear_int8; `quantize` and `multiply` are the functions for the type of x and out.
template <class Value, class Quantize, class Multiply>
static void linear_int8(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, const Value *x, Value *out, Quantize quantize, Multiply multiply) {
    const int64_t tiles = (m + TILE - 1) / TILE, columns = t->blocks * block_size(*t), views = std::max<int64_t>(1, count);
    std::vector<Tokens> tokens;
    for (int64_t v = 0; v < views; v++) tokens.emplace_back(tiles, columns, t->blocks * block_groups(*t));
    in_shares(views * tiles, 1, [&](int64_t tile, int64_t) {
        const int64_t v = tile / tiles, begin = tile % tiles * TILE;
        quantize(x + v * m * columns, m, begin, begin + TILE, tokens[v]);
    });
    in_shares(n, PANEL, [&](int64_t begin, int64_t end) {
        const std::vector<Panel> panels = panels_of(*t, moves, count, begin, end);
        for (int64_t v = 0; v < views; v++) multiply(panels[v], tokens[v], m, n, begin, end, out + v * m * n);
    });
}

// reference.add_shifts; `shift` is the function for its type.
template <class Value, class Shift>
static void add_shifts(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, const Value *x, const int64_t *example_of_token, Value *out, Shift shift) {
    const int64_t groups_each = block_groups(*t), groups = t->blocks * groups_each, columns = t->blocks * block_size(*t), group = columns / groups;
    Pooled p{groups, std::vector<float>(m * groups)};
    in_shares(m, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            for (int64_t g = 0; g < groups; g++) {
                float sum = 0;
                for (int64_t j = g * group; j < (g + 1) * group; j++) sum += load(x + i * columns + j);
                p.sum[i * groups + g] = moves[example_of_token[i]].coefficient * sum;
            }
    });
    for (int64_t v = 0; v < count; v++) {
        auto along = [&](int64_t other) { return !std::memcmp(&moves[v].direction, &moves[other].direction, sizeof(Direction)); };
        int64_t same = 0;
        while (!along(same)) same++;
        if (same < v) continue;
        p.first.push_back((int64_t)p.token.size());
        p.u.emplace_back(), p.u.back().u = moves[v].direction;
        for (int64_t i = 0; i < m; i++)
            if (along(example_of_token[i])) p.token.push_back(i);
    }
    p.first.push_back((int64_t)p.token.size());
    in_shares(n, SHIFT_ROWS, [&](int64_t begin, int64_t end) {
        std::vector<float> unit(groups * SHIFT_ROWS);
        units_of(*t, t->rows, begin, end, unit.data());
        shift(p, unit.data(), t->rows, values_in_row(*t), groups_each * t->blocks_per_value, n, begin, end, out);
    });
}

extern "C" {
// What the caller must agree with: the kinds of blocks in order, and the sizes of the structs.
const char *gradless_kinds() { return KINDS(NAME_AND_SPACE, _); }

const int64_t *gradless_sizes() {
    static const int64_t sizes[] = {sizeof(Words), sizeof(Direction), sizeof(Move), sizeof(Blocks), sizeof(Heads), sizeof(Attention)};
    return sizes;
}

void gradless_add_shifts(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, int32_t bf16, const void *x, const int64_t *example_of_token, void *out) {
    if (bf16) add_shifts(t, moves, count, n, m, (const uint16_t *)x, example_of_token, (uint16_t *)out, shift_bf16);
    else add_shifts(t, moves, count, n, m, (const float *)x, example_of_token, (float *)out, shift_f32);
}

void gradless_linear_int8_f32(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, const float *x, float *out) {
    linear_int8(t, moves, count, n, m, x, out, quantize_f32, multiply_f32);
}
void gradless_linear_int8_bf16(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, const uint16_t *x, uint16_t *out) {
    linear_int8(t, moves, count, n, m, x, out, quantize_bf16, multiply_bf16);
}

// Freed memory stays with the process: forwards ask for the same sizes again and again, and pages that were given back would have
// to be cleared and mapped anew.
void gradless_keep_freed_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that it takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

void gradless_set_normal_table(const uint16_t *table) { set_normal_table(table); }

void gradless_coordinates(const Direction *direction, int64_t n, float *out) {
    in_shares(n, 1 << 14, [&](int64_t begin, int64_t end) {
        Coordinates u;
        u.u = *direction;
        Coordinates::read(u, begin, end - begin, out + begin);
    });
}

// The first n of each of `count` tensors, whose names are in the keys alone.
void gradless_coordinates_of_each(const Direction *direction, const uint64_t *keys, int64_t count, int64_t n, float *out) {
    in_shares(count, 1, [&](int64_t i, int64_t) {
        Coordinates u;
        u.u = *direction;
        u.u.words.key = u.u.second.key = keys[i];
        Coordinates::read(u, 0, n, out + i * n);
    });
}

void gradless_whole_steps(const Move *move, int64_t n, int8_t *residual, float *out) {
    in_shares((n + 127) / 128, 1 << 8, [&](int64_t begin, int64_t end) {
        Coordinates u;
        u.u = move->direction;
        for (int64_t run = begin; run < end; run++) {
            float step[128];
            const size_t bytes = sizeof(float) * std::min<int64_t>(128, n - run * 128);
            int8_t *left = residual ? residual + run * 128 : nullptr;
            if (steps_of(*move, u, run, 0, (int)std::min<int64_t>(128, n - run * 128), left, step)) std::memcpy(out + run * 128, step, bytes);
            else std::memset(out + run * 128, 0, bytes);
        }
    });
}

void gradless_dequantize(const Blocks *t, const Move *moves, int64_t count, int64_t n, int32_t bf16, void *out) {
    in_shares(n, 32, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * t->blocks * block_size(*t);
        if (bf16) dequantize_bf16(*t, moves, count, n, begin, end, (uint16_t *)out + at);
        else dequantize_f32(*t, moves, count, n, begin, end, (float *)out + at);
    });
}

// Whether gradless_linear_bf16 is there on this processor.
int32_t gradless_multiplies_bf16() { return multiplies_bf16(); }

void gradless_linear_bf16(const Blocks *t, const Move *moves, int64_t count, int64_t n, int64_t m, const uint16_t *x, uint16_t *out) {
    const int64_t columns = t->blocks * block_size(*t), views = std::max<int64_t>(1, count);
    in_shares(n, BF16_PANEL, [&](int64_t begin, int64_t end) {
        std::vector<uint16_t> rows(views * BF16_PANEL * columns);
        std::vector<uint32_t> panel(BF16_PANEL * columns / 2);
        dequantize_bf16(*t, moves, count, BF16_PANEL, begin, end, rows.data());
        for (int64_t v = 0; v < views; v++) {
            interleave((const uint32_t *)(rows.data() + v * BF16_PANEL * columns), columns / 2, panel.data());
            multiply_panel(panel.data(), columns, x + v * m * columns, m, n, begin, end, out + v * m * n);
        }
    });
}

// Multiply by the fastest path of this processor, once `slower` of them are passed over; its name, or null: there is none.
const char *gradless_choose_path(int32_t slower) {
    const Path *chosen = path(slower);
    if (chosen->name) product = chosen->product;
    return chosen->name;
}

void gradless_rms_norm(const uint16_t *x, const uint16_t *weight, int64_t n, int64_t d, float eps, float plus, uint16_t *out) {
    in_shares(n, 16, [&](int64_t begin, int64_t end) { rms_norm(x, weight, d, eps, plus, begin, end, out); });
}

void gradless_gate(const uint16_t *gates, const uint16_t *up, int32_t gelu, int64_t n, uint16_t *out) {
    in_shares(n, 1 << 14, [&](int64_t begin, int64_t end) { gate(gates, up, gelu, begin, end, out); });
}

void gradless_attention(const Attention *a, int64_t batch, int64_t heads, const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint8_t *mask, uint16_t *out) {
    in_shares(batch * heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t b = i / heads, h = i % heads, first = h * a->shared;
            attend(*a, q + b * a->q.batch + first * a->q.head, k + b * a->k.batch + h * a->k.head, v + b * a->v.batch + h * a->v.head,
                   mask ? mask + b * a->mask.batch : nullptr, out + b * a->out.batch + first * a->out.head);
        }
    });
}

void gradless_move_blocks(const Blocks *t, const Move *moves, int64_t count, int64_t n) {
    in_shares(n, 1 << 11, [&](int64_t begin, int64_t end) { move_range(*t, moves, count, begin, end); });
}

int64_t gradless_move_codes(const Blocks *t, const Move *move) {
    std::atomic<int64_t> moved{0};
    const int64_t size = block_size(*t), apart = stretch_length(*t, size) * t->stride;
    const int64_t stretches = (t->all_blocks * size + apart - 1) / apart;
    in_shares(stretches, t->stride == 1 ? 1 : 8, [&](int64_t begin, int64_t end) { moved += move_codes(*t, *move, begin, end); });
    return moved;
}

void gradless_vectors(const void *codes, int32_t wide, const float *table, int64_t codebooks, int64_t entries, int64_t size, int64_t n, int32_t bf16, void *out) {
    in_shares(n, 1 << 10, [&](int64_t begin, int64_t end) {
        if (wide && bf16) vectors_i16_bf16((const int16_t *)codes, table, codebooks, entries, size, begin, end, (uint16_t *)out);
        else if (wide) vectors_i16_f32((const int16_t *)codes, table, codebooks, entries, size, begin, end, (float *)out);
        else if (bf16) vectors_i8_bf16((const int8_t *)codes, table, codebooks, entries, size, begin, end, (uint16_t *)out);
        else vectors_i8_f32((const int8_t *)codes, table, codebooks, entries, size, begin, end, (float *)out);
    });
}

// A mapped file that somebody shortens has pages that are nowhere: reading one ends the process, which says why first.
void gradless_end_on_lost_page(const char *sentence) {
    static char said[1024];
    std::strncpy(said, sentence, sizeof said - 1);
    struct sigaction action = {};
    action.sa_handler = [](int) {
        ssize_t ignored = write(STDERR_FILENO, said, std::strlen(said));
        (void)ignored;
        _exit(1);
    };
    sigaction(SIGBUS, &action, nullptr);
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
