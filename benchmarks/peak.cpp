// As many int8 products as this processor can: vpdpbusd on registers alone, 12 * 64 of them a round on every thread.
#include <cstdint>
#include <immintrin.h>

extern "C" __attribute__((target("avx512f,avx512vnni"))) void int8_peak(int64_t rounds) {
#pragma omp parallel
    {
        __m512i acc[12], a = _mm512_set1_epi32(1), b = _mm512_set1_epi32(2);
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < rounds; k++)
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
    }
}
