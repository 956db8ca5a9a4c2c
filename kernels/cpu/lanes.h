// Sixteen lanes of float32: every sum of the engine is made of them, so that its bits are fixed here and not by a
// compiler or a processor. AVX512 holds the lanes in one register, AVX2 in two, NEON in four, plain C in sixteen.
//
// dot:  lane l adds x[k] w[k] for k = l, l + 16, l + 32, ... by fused multiply-add, in this order; columns beyond the
//       last count as zero; the lanes are then added by halves, (l, l + 8), (l, l + 4), (l, l + 2), (l, l + 1).
//       Of FP8, lane l takes the columns 2 l, 2 l + 1, 32 + 2 l and 33 + 2 l of each 64: so two codes are unpacked at once.
// axpy: every output has one sum of its own, over the rows in their order, by fused multiply-add.
//
// Compiled with -ffp-contract=off and without fast-math: nothing here may be reordered.
#pragma once
#include <stdint.h>
#include <string.h>

#define LANES 16
#define ALWAYS static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int8_t bytes16 __attribute__((vector_size(16), aligned(1)));
typedef int16_t shorts16 __attribute__((vector_size(32)));
typedef int16_t shorts32 __attribute__((vector_size(64), aligned(1)));
typedef uint16_t halves16 __attribute__((vector_size(32), aligned(2)));
typedef _Float16 float16s __attribute__((vector_size(32)));

// how a matrix is stored
enum { FP8 = 0, BF16 = 1, F32 = 2, F16 = 3 };
static const int64_t ITEM[4] = {1, 2, 4, 2};

// A code of e4m3, its bits moved to where float16 has them, is its value times 2^-8: every code is a float16, and sums are
// multiplied by 2^8 in the end. (Moved to where float32 has them, small codes would be subnormal numbers, over which some
// processors stumble for a hundred cycles.)
#define FP8_AFTER 0x1p8f

ALWAYS vec fused(vec a, vec b, vec c) {
#if defined(__clang__)
    return __builtin_elementwise_fma(a, b, c);
#else
    vec out;
    for (int l = 0; l < LANES; l++) out[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return out;
#endif
}

ALWAYS vec spread(float a) { return a - (vec){0}; }

ALWAYS vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

ALWAYS ivec bits_of(vec v) {
    ivec out;
    memcpy(&out, &v, sizeof out);
    return out;
}

ALWAYS vec floats_of(ivec v) {
    vec out;
    memcpy(&out, &v, sizeof out);
    return out;
}

// Of each lane a where the mask is set, else b.
ALWAYS vec pick(ivec mask, vec a, vec b) { return floats_of((mask & bits_of(a)) | (~mask & bits_of(b))); }

// Sixteen stored weights as float32; those of FP8 times 2^-8.
ALWAYS vec widen(int kind, const char *p) {
    if (kind == F32) return load((const float *)p);
    if (kind == BF16) {
        halves16 codes;
        memcpy(&codes, p, sizeof codes);
        return floats_of(__builtin_convertvector(codes, ivec) << 16);
    }
    float16s halves;
    if (kind == FP8) {
        bytes16 codes;
        memcpy(&codes, p, sizeof codes);
        shorts16 bits = (__builtin_convertvector(codes, shorts16) << 7) & (int16_t)0xBF80;
        memcpy(&halves, &bits, sizeof halves);
    } else {
        memcpy(&halves, p, sizeof halves);
    }
    return __builtin_convertvector(halves, vec);
}

#define FP8_GROUP 64

// 64 codes of FP8 as float32, times 2^-8, in the order of lanes.
ALWAYS void widen_group(const char *p, vec out[4]) {
    shorts32 codes;
    memcpy(&codes, p, sizeof codes);
    shorts32 even = ((codes << 8) >> 1) & (int16_t)0xBF80, odd = (codes >> 1) & (int16_t)0xBF80;
    float16s halves[4];
    memcpy(&halves[0], &even, 32);
    memcpy(&halves[1], &odd, 32);
    memcpy(&halves[2], (const char *)&even + 32, 32);
    memcpy(&halves[3], (const char *)&odd + 32, 32);
    UNROLL for (int i = 0; i < 4; i++) out[i] = __builtin_convertvector(halves[i], vec);
}

// The same of the codes that are left; the others are zero.
ALWAYS void widen_rest(const char *p, int64_t count, vec out[4]) {
    char some[FP8_GROUP] = {0};
    memcpy(some, p, (size_t)count);
    widen_group(some, out);
}

// 64 columns of x in the order in which lanes take those of FP8; the columns beyond `count` are zero.
ALWAYS void in_order_of_lanes(const float *x, int64_t count, float *out) {
    float some[FP8_GROUP] = {0};
    if (count < FP8_GROUP) {
        memcpy(some, x, (size_t)count * 4);
        x = some;
    }
    UNROLL for (int i = 0; i < FP8_GROUP; i += 2 * LANES) {
        vec a = load(x + i), b = load(x + i + LANES);
        store(out + i, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
        store(out + i + LANES, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    }
}

// The same where fewer than sixteen are left: the others are zero.
ALWAYS vec widen_some(int kind, const char *p, int64_t count) {
    char some[64] = {0};
    memcpy(some, p, (size_t)(count * ITEM[kind]));
    return widen(kind, some);
}

ALWAYS vec8 halves_added(vec v) {
    vec8 low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char *)&v + 32, sizeof high);
    return low + high;
}

// The lanes added by halves.
ALWAYS float total(vec v) {
    vec8 a = halves_added(v);
    vec4 c, d;
    memcpy(&c, &a, sizeof c);
    memcpy(&d, (const char *)&a + 16, sizeof d);
    c = c + d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

// Four of them at once, once halves are added, for fewer instructions; the same bits.
ALWAYS vec4 totals_of_halves(const vec8 *half) {
    vec8 a = __builtin_shufflevector(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15);
    vec8 b = __builtin_shufflevector(half[2], half[3], 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(half[2], half[3], 4, 5, 6, 7, 12, 13, 14, 15);
    vec8 c = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
             __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(c, c, 0, 4, 2, 6) + __builtin_shufflevector(c, c, 1, 5, 3, 7);
}

// Eight of them.
ALWAYS vec8 totals_of_eight(const vec8 *half) {
    vec8 a[4], b[2];
    UNROLL for (int i = 0; i < 4; i++)
        a[i] = __builtin_shufflevector(half[i], half[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(half[i], half[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    UNROLL for (int i = 0; i < 2; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(b[0], b[1], 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(b[0], b[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

ALWAYS vec4 totals(vec v0, vec v1, vec v2, vec v3) {
    vec8 half[4] = {halves_added(v0), halves_added(v1), halves_added(v2), halves_added(v3)};
    return totals_of_halves(half);
}

// e^x: 2^n times a polynomial (Cephes' coefficients), about 1 ulp; 0 below -87, e^88 above 88, NaN of NaN.
ALWAYS vec exponential(vec x) {
    ivec far = x < -87.0f;
    vec clipped = pick(far, spread(-87.0f), pick(x > 88.0f, spread(88.0f), x));
    vec t = fused(clipped, spread(1.44269504088896341f), spread(12582912.0f));
    vec n = t - 12582912.0f;
    vec r = fused(n, spread(-0.693145751953125f), clipped);
    r = fused(n, spread(-1.428606765330187e-06f), r);
    vec p = fused(spread(1.9875691500e-4f), r, spread(1.3981999507e-3f));
    p = fused(p, r, spread(8.3334519073e-3f));
    p = fused(p, r, spread(4.1665795894e-2f));
    p = fused(p, r, spread(1.6666665459e-1f));
    p = fused(p, r, spread(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    p = p * floats_of((bits_of(t) - 0x4B400000 + 127) << 23);
    return pick(far, (vec){0}, p);
}

ALWAYS float exponential_of(float x) { return exponential(spread(x))[0]; }

// y[r][j] = x[r] . w[j] for R rows of x and N rows of w; y[r][j] += it where `add`.
//
// For FP8, x is in the order of lanes, in whole groups.
ALWAYS void dot(int kind, int R, int N, const char *w, int64_t stride, int64_t K, const float *x, int64_t xs, float *y,
                int64_t ys, int add) {
    vec sum[8][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = (vec){0};
    const int64_t item = ITEM[kind], line = 64 / item, lines = K / line * line, whole = K / LANES * LANES;
    const char *ahead = w + N * stride;  // the rows that come next: asking for their memory early is most of the speed
    int64_t k = 0;
    for (; k < lines; k += line) {
        UNROLL for (int j = 0; j < N; j++) {
            __builtin_prefetch(ahead + j * stride + k * item, 0, 2);
            vec weights[4];
            if (kind == FP8) widen_group(w + j * stride + k, weights);
            else UNROLL for (int c = 0; c < line / LANES; c++) weights[c] = widen(kind, w + j * stride + (k + c * LANES) * item);
            UNROLL for (int c = 0; c < line / LANES; c++) UNROLL for (int r = 0; r < R; r++)
                sum[r][j] = fused(load(x + r * xs + k + c * LANES), weights[c], sum[r][j]);
        }
    }
    if (kind == FP8 && k < K) {
        UNROLL for (int j = 0; j < N; j++) {
            vec weights[4];
            widen_rest(w + j * stride + k, K - k, weights);
            UNROLL for (int c = 0; c < 4; c++) UNROLL for (int r = 0; r < R; r++)
                sum[r][j] = fused(load(x + r * xs + k + c * LANES), weights[c], sum[r][j]);
        }
    }
    for (; kind != FP8 && k < whole; k += LANES) {
        UNROLL for (int j = 0; j < N; j++) {
            vec weights = widen(kind, w + j * stride + k * item);
            UNROLL for (int r = 0; r < R; r++) sum[r][j] = fused(load(x + r * xs + k), weights, sum[r][j]);
        }
    }
    if (kind != FP8 && k < K) {
        UNROLL for (int j = 0; j < N; j++) {
            vec weights = widen_some(kind, w + j * stride + k * item, K - k);
            UNROLL for (int r = 0; r < R; r++) {
                vec some = widen_some(F32, (const char *)(x + r * xs + k), K - k);
                sum[r][j] = fused(some, weights, sum[r][j]);
            }
        }
    }
    const float after = kind == FP8 ? FP8_AFTER : 1.0f;
    UNROLL for (int r = 0; r < R; r++) {
        float *out = y + r * ys;
        int j = 0;
        UNROLL for (; j + 4 <= N; j += 4) {
            vec4 values = totals(sum[r][j], sum[r][j + 1], sum[r][j + 2], sum[r][j + 3]) * after, before;
            memcpy(&before, out + j, sizeof before);
            if (add) values = before + values;
            memcpy(out + j, &values, sizeof values);
        }
        UNROLL for (; j < N; j++) {
            float value = total(sum[r][j]) * after;
            out[j] = add ? out[j] + value : value;
        }
    }
}

// y[r][c] += sum over t of p[r][t] w[t][c] for R rows and N times sixteen columns.
ALWAYS void axpy(int kind, int R, int N, const char *w, int64_t stride, int64_t T, const float *p, int64_t ps, float *y,
                 int64_t ys) {
    vec sum[8][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < N; c++) sum[r][c] = load(y + r * ys + LANES * c);
    for (int64_t t = 0; t < T; t++) {
        const char *row = w + t * stride;
        if (kind != F32) __builtin_prefetch(row + 8 * stride, 0, 2);
        UNROLL for (int c = 0; c < N; c++) {
            vec weights = widen(kind, row + LANES * c * ITEM[kind]);
            UNROLL for (int r = 0; r < R; r++) sum[r][c] = fused(spread(p[r * ps + t]), weights, sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < N; c++) store(y + r * ys + LANES * c, sum[r][c]);
}

// The same for fewer than sixteen columns.
static void axpy_some(int kind, const char *w, int64_t stride, int64_t T, const float *p, float *y, int64_t columns) {
    vec sum = widen_some(F32, (const char *)y, columns);
    for (int64_t t = 0; t < T; t++) sum = fused(spread(p[t]), widen_some(kind, w + t * stride, columns), sum);
    memcpy(y, &sum, (size_t)columns * 4);
}
