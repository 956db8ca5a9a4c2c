// What this processor can do, asked of it and not of the system's files, and what the engine was made of.
#include <stdint.h>

#ifndef SOURCES
#define SOURCES 0
#endif

// The digest of the sources that this was compiled from; see build.py.
__attribute__((visibility("default"))) int64_t mtp_sources(void) { return SOURCES; }

// 0: none of the levels, 1: x86-64-v3 (AVX2, FMA, F16C), 2: x86-64-v4 (AVX512 F, BW, CD, DQ, VL); 1 on other processors.
__attribute__((visibility("default"))) int64_t mtp_level(void) {
#if defined(__x86_64__)
    uint32_t a, b, c, d, low, high;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(0), "2"(0));
    if (a < 7) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(1), "2"(0));
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
    if (!(b & 1u << 5)) return 0;
    const uint32_t wide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    return (b & wide) == wide && (low & 0xE6) == 0xE6 ? 2 : 1;
#else
    return 1;
#endif
}
