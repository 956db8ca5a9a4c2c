// Products of many rows, all float32: the sums of `dot`, more of them in registers at once.
#pragma once
#include "lanes.h"

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of x by rows of w whose sums of so many lanes registers hold; rows by sixteen columns.
#if defined(__AVX512F__)
#define PART 16
#define DEEP 4
#define SIDE 4
#define BROAD 4
#elif defined(__aarch64__)
#define PART 4
#define DEEP 4
#define SIDE 4
#define BROAD 4
#else
#define PART 16
#define DEEP 3
#define SIDE 2
#define BROAD 6
#endif
#define GROUP 16  // rows of w at a time, at most
#define HALF (LANES / 2)

typedef float part __attribute__((vector_size(PART * 4), aligned(4)));

ALWAYS part fused_part(part a, part b, part c) {
#if defined(__clang__)
    return __builtin_elementwise_fma(a, b, c);
#else
    part out;
    for (int l = 0; l < PART; l++) out[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return out;
#endif
}

// The sums of `dot` for R rows of x and N of w, all float32, with halves added: those of x[r] and w[j] from
// half + (r GROUP + j) HALF on. Where registers are few, some lanes after the others.
//
// The rest of each sum is left to `finish`: done here it would wait for this block's last products, and the next block's
// for it.
ALWAYS void dense(int R, int N, const float *w, int64_t stride, int64_t K, const float *x, int64_t xs, float *half) {
    const int64_t whole = K / LANES * LANES;
    float lanes[DEEP][SIDE][LANES];
    UNROLL for (int64_t p = 0; p < LANES; p += PART) {
        part sum[DEEP][SIDE];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = (part){0};
        for (int64_t k = p; k < whole; k += LANES) {
            part row[DEEP];
            UNROLL for (int r = 0; r < R; r++) memcpy(&row[r], x + r * xs + k, sizeof(part));
            UNROLL for (int j = 0; j < N; j++) {
                part weights;
                memcpy(&weights, w + j * stride + k, sizeof(part));
                UNROLL for (int r = 0; r < R; r++) sum[r][j] = fused_part(row[r], weights, sum[r][j]);
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++)
            memcpy(lanes[r][j] + p, &sum[r][j], sizeof(part));
        // else a compiler would keep these in registers too, which there are too few of
        if (p + PART < LANES) __asm__ volatile("" ::"r"(lanes) : "memory");
    }
    if (whole < K) {
        UNROLL for (int j = 0; j < N; j++) {
            vec weights = widen_some(F32, (const char *)(w + j * stride + whole), K - whole);
            UNROLL for (int r = 0; r < R; r++) {
                vec some = widen_some(F32, (const char *)(x + r * xs + whole), K - whole);
                store(lanes[r][j], fused(some, weights, load(lanes[r][j])));
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) {
        vec8 sum = halves_added(load(lanes[r][j]));
        memcpy(half + (r * GROUP + j) * HALF, &sum, sizeof sum);
    }
}

// y[r][j] = the sum of which `dense` left halves, times `after`.
static void finish(int64_t R, int64_t count, const float *half, float *y, int64_t ys, float after, int add) {
    for (int64_t r = 0; r < R; r++, half += GROUP * HALF, y += ys) {
        int64_t j = 0;
        for (; j + HALF <= count; j += HALF) {
            vec8 sums[HALF], before;
            memcpy(sums, half + j * HALF, sizeof sums);
            vec8 values = totals_of_eight(sums) * after;
            memcpy(&before, y + j, sizeof before);
            if (add) values = before + values;
            memcpy(y + j, &values, sizeof values);
        }
        for (; j < count; j += 4) {
            vec8 sums[4] = {{0}};
            memcpy(sums, half + j * HALF, (size_t)least(4, count - j) * sizeof sums[0]);
            vec4 values = totals_of_halves(sums) * after;
            UNROLL for (int i = 0; i < 4; i++)
                if (j + i < count) y[j + i] = add ? y[j + i] + values[i] : values[i];
        }
    }
}

// All of count rows of w, at most GROUP, with R rows of x: times `after`.
static void dense_dots(int64_t R, const float *w, int64_t stride, int64_t count, int64_t K, const float *x, int64_t xs,
                       float *y, int64_t ys, float after, int add) {
    float half[DEEP * GROUP * HALF] __attribute__((aligned(64)));
#define ROWS(N)                                                                      \
    {                                                                                \
        const float *own = w + n * stride;                                           \
        if (rows == DEEP) dense(DEEP, N, own, stride, K, from, xs, half + n * HALF); \
        else if (rows == 3) dense(3, N, own, stride, K, from, xs, half + n * HALF);  \
        else if (rows == 2) dense(2, N, own, stride, K, from, xs, half + n * HALF);  \
        else dense(1, N, own, stride, K, from, xs, half + n * HALF);                 \
    }
    for (int64_t r = 0; r < R;) {
        const int64_t rows = R - r == 4 && DEEP == 3 ? 2 : least(DEEP, R - r);
        const float *from = x + r * xs;
        int64_t n = 0;
        for (; n + SIDE <= count; n += SIDE) ROWS(SIDE)
        for (; n < count; n++) ROWS(1)
        finish(rows, count, half, y + r * ys, ys, after, add);
        r += rows;
    }
}
