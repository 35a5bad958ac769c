// Every path of int8.hpp that runs here against the portable one, on random panels: prints the paths that agree to the bit.
// Built and run by test_kernels.py for processors that are not here, under an emulator.
#include <cstdio>
#include <random>
#include <vector>
#include "int8.hpp"

int main() {
    std::mt19937 random(0);
    for (const Path *each = paths(); each->name; each++) {
        if (!each->runs) continue;
        for (int trial = 0; trial < 200; trial++) {
            const int64_t groups = 1 + random() % 5, quads = 4 << random() % 3;
            Panel p(groups, quads, trial % 2, nullptr);
            std::vector<uint32_t> x(groups * quads * TILE);
            std::vector<float> sum(groups * TILE);
            std::vector<int32_t> bias(groups * TILE);
            for (auto &four : x) four = random();
            for (int64_t g = 0; g < groups; g++) {
                p.wide[g] = random() % 2;
                for (int64_t i = g * quads * PANEL; i < (g + 1) * quads * PANEL; i++) p.code[0][i] = random(), p.code[1][i] = random();
                for (int r = 0; r < PANEL; r++) {
                    p.scale[g * PANEL + r] = (float)(int32_t)random() * 0x1p-40f;
                    if (p.offset) p.offset[g * PANEL + r] = (float)(int32_t)random() * 0x1p-38f;
                }
                for (int i = 0; i < TILE; i++) {
                    int32_t total = 0;
                    for (int64_t q = g * quads; q < (g + 1) * quads; q++)
                        for (int at = 0; at < 32; at += 8) total += (int8_t)(x[q * TILE + i] >> at);
                    sum[g * TILE + i] = (float)total, bias[g * TILE + i] = -128 * total;
                }
            }
            float ours[TILE][PANEL], portable[TILE][PANEL];
            const Tile tile = {x.data(), sum.data(), bias.data()};
            each->product(p, tile, ours), product_portable(p, tile, portable);
            if (std::memcmp(ours, portable, sizeof ours)) {
                std::printf("%s differs\n", each->name);
                return 1;
            }
        }
        std::printf("%s\n", each->name);
    }
}
