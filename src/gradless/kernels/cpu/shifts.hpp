// reference.add_shifts, whose views move additive offsets: sums of a token's inputs over groups of columns, times the change of
// each group of a row by a shift of 1, times signs that are drawn here, one direction after the other.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>
#include "noise.hpp"

constexpr int SHIFT_ROWS = 32, SHIFT_TOKENS = 3;
typedef float Lanes __attribute__((vector_size(32)));
constexpr int SHIFT_LANES = SHIFT_ROWS / 8;

// Tokens' sums of inputs, times their views' coefficients; and the tokens, sorted by direction.
struct Pooled {
    int64_t groups;
    std::vector<float> sum;             // (tokens, groups)
    std::vector<int64_t> token, first;  // the sorted tokens; the first of each direction, and the end
    std::vector<Coordinates> u;         // one for each direction
};

// SHIFT_ROWS of `add` (groups, SHIFT_ROWS) by SHIFT_TOKENS rows of sums.
INLINE void shift_tile(int64_t groups, const float *add, const float *const sum[SHIFT_TOKENS], Lanes y[SHIFT_TOKENS][SHIFT_LANES]) {
    for (int i = 0; i < SHIFT_TOKENS; i++)
        for (int l = 0; l < SHIFT_LANES; l++) y[i][l] = Lanes{};
    for (int64_t g = 0; g < groups; g++, add += SHIFT_ROWS)
        for (int l = 0; l < SHIFT_LANES; l++) {
            Lanes rows;
            std::memcpy(&rows, add + 8 * l, sizeof rows);
            for (int i = 0; i < SHIFT_TOKENS; i++) y[i][l] += rows * sum[i][g];
        }
}

// Rows [begin, end) of out (tokens, n). unit: (groups, SHIFT_ROWS); rows: the file's rows; groups_each: groups of columns that
// share a value.
#define SHIFT(NAME, OUT) \
    CLONES void NAME(const Pooled &p, const float *unit, const int64_t *rows, int64_t values, int64_t groups_each, int64_t n, int64_t begin, int64_t end, OUT *out) { \
        std::vector<float> add(p.groups * SHIFT_ROWS), z(SHIFT_ROWS * values); \
        for (size_t d = 0; d + 1 < p.first.size(); d++) { \
            Coordinates u = p.u[d]; \
            for (int r = 0; r < SHIFT_ROWS; r++) Coordinates::read(u, rows[std::min(begin + r, end - 1)] * values, values, &z[r * values]); \
            for (int64_t g = 0; g < p.groups; g++) \
                for (int r = 0; r < SHIFT_ROWS; r++) add[g * SHIFT_ROWS + r] = unit[g * SHIFT_ROWS + r] * z[r * values + g / groups_each]; \
            for (int64_t first = p.first[d]; first < p.first[d + 1]; first += SHIFT_TOKENS) { \
                const float *sum[SHIFT_TOKENS]; \
                Lanes y[SHIFT_TOKENS][SHIFT_LANES]; \
                const int64_t last = std::min(first + SHIFT_TOKENS, p.first[d + 1]); \
                for (int i = 0; i < SHIFT_TOKENS; i++) sum[i] = &p.sum[p.token[std::min(first + i, last - 1)] * p.groups]; \
                shift_tile(p.groups, add.data(), sum, y); \
                for (int64_t i = first; i < last; i++) { \
                    float more[SHIFT_ROWS]; \
                    std::memcpy(more, y[i - first], sizeof more); \
                    OUT *to = out + p.token[i] * n; \
                    for (int64_t r = begin; r < end; r++) store(to + r, load(to + r) + more[r - begin]); \
                } \
            } \
        } \
    }
