// Products of rows with stored matrices, each row as if it were alone.
#pragma once
#include "lanes.h"

// A matrix [rows, columns] as a checkpoint stores it; FP8 with float32 scales of blocks.
typedef struct {
    int64_t kind, rows, columns, block_rows, block_columns;
    const char *data;
    const float *scale;
} Matrix;

// What a thread computes with: rows in the order of lanes, the same times a block's scales, and weights widened once for
// many rows.
typedef struct {
    float *ordered, *rows, *weights;
} Room;

#define TILE 64       // rows that are prepared at once
#define WIDEN_FROM 12  // rows from which it pays to widen weights once for all of them
#define WIDE_COLUMNS 2048  // of rows whose weights are widened

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t grouped(int64_t n) { return (n + FP8_GROUP - 1) / FP8_GROUP * FP8_GROUP; }
static inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows of x by rows of w that are held in registers at once.
#if defined(__AVX512F__)
#define ONE 8
#define TWO 6
#define THREE 4
#define FOUR 4
#elif defined(__aarch64__)  // sixteen lanes take four of 32 registers; those of weights and of x have to fit too
#define ONE 4
#define TWO 2
#define THREE 1
#define FOUR 1
#define ACROSS 1
#else
#define ONE 4
#define TWO 3
#define THREE 2
#define FOUR 1
#endif
#ifndef ACROSS
#define ACROSS 2  // times sixteen columns, for four rows
#endif

#define BLOCK(R, N)                                                                                                  \
    for (; n + N <= count; n += N) dot(kind, R, N, w + n * stride, stride, K, x, xs, y + n, ys, add);                \
    for (; n < count; n++) dot(kind, R, 1, w + n * stride, stride, K, x, xs, y + n, ys, add);

// All of count rows of w with R rows of x.
ALWAYS void dots_of(int kind, int64_t R, const char *w, int64_t stride, int64_t count, int64_t K, const float *x,
                    int64_t xs, float *y, int64_t ys, int add) {
    // where sixteen lanes take several registers, three or two rows by two leave more time for sums than four by one
    const int narrow = kind == F32 && FOUR == 1;
    for (; R > 0;) {
        int64_t n = 0, done;
        if (R >= 4 && !narrow) {
            BLOCK(4, FOUR)
            done = 4;
        } else if (R >= 3 && !(narrow && R == 4)) {
            BLOCK(3, THREE)
            done = 3;
        } else if (R >= 2) {
            BLOCK(2, TWO)
            done = 2;
        } else {
            BLOCK(1, ONE)
            done = 1;
        }
        R -= done, x += done * xs, y += done * ys;
    }
}

static void dots(int64_t kind, int64_t R, const char *w, int64_t stride, int64_t count, int64_t K, const float *x,
                 int64_t xs, float *y, int64_t ys, int add) {
    switch (kind) {
        case FP8: dots_of(FP8, R, w, stride, count, K, x, xs, y, ys, add); break;
        case BF16: dots_of(BF16, R, w, stride, count, K, x, xs, y, ys, add); break;
        case F16: dots_of(F16, R, w, stride, count, K, x, xs, y, ys, add); break;
        default: dots_of(F32, R, w, stride, count, K, x, xs, y, ys, add); break;
    }
}

// Many rows: weights are widened once for all of them; the sums are those of `dots`.
#define GROUP 8  // rows of w at a time
static void many_dots(int64_t kind, int64_t R, const char *w, int64_t stride, int64_t count, int64_t K, const float *x,
                      int64_t xs, float *y, int64_t ys, int add, float *wide) {
    const int64_t pitch = grouped(K) + LANES, length = kind == FP8 ? grouped(K) : K;
    const float after = kind == FP8 ? FP8_AFTER : 1.0f;
    for (int64_t n = 0; n < count; n += GROUP) {
        int64_t some = least(GROUP, count - n);
        for (int64_t j = 0; j < some; j++) {
            const char *row = w + (n + j) * stride;
            float *out = wide + j * pitch;
            if (kind == FP8) {
                for (int64_t k = 0; k < K; k += FP8_GROUP) {
                    vec weights[4];
                    if (k + FP8_GROUP <= K) widen_group(row + k, weights);
                    else widen_rest(row + k, K - k, weights);
                    for (int i = 0; i < 4; i++) store(out + k + i * LANES, weights[i]);
                }
                continue;
            }
            int64_t k = 0;
            for (; k + LANES <= K; k += LANES)
                store(out + k, kind == BF16 ? widen(BF16, row + 2 * k) : widen(F16, row + 2 * k));
            if (k < K) store(out + k, widen_some((int)kind, row + k * ITEM[kind], K - k));
        }
        float part[GROUP * 4];
        for (int64_t r = 0; r < R; r += 4) {
            int64_t own = least(4, R - r);
            dots_of(F32, own, (const char *)wide, pitch * 4, some, length, x + r * xs, xs, part, GROUP, 0);
            for (int64_t i = 0; i < own; i++) {
                for (int64_t j = 0; j < some; j++) {
                    float *place = y + (r + i) * ys + n + j, value = part[i * GROUP + j] * after;
                    *place = add ? *place + value : value;
                }
            }
        }
    }
}

// room->rows = room->ordered times a block's scales.
static void scale_rows(const Matrix *m, const float *scale, int64_t rows, const Room *room, int64_t pitch) {
    const int64_t K = m->columns, wide = m->block_columns;
    for (int64_t i = 0; i < rows; i++) {
        const float *from = room->ordered + i * pitch;
        float *to = room->rows + i * pitch;
        for (int64_t k = 0; k < K; k += FP8_GROUP) {
            if (wide % FP8_GROUP == 0) {
                const float factor = scale[k / wide];
                UNROLL for (int c = 0; c < FP8_GROUP; c += LANES) store(to + k + c, load(from + k + c) * factor);
                continue;
            }
            for (int c = 0; c < FP8_GROUP; c++) {
                int64_t column = least(k + c / 32 * 32 + c % LANES * 2 + c / LANES % 2, K - 1);
                to[k + c] = from[k + c] * scale[column / wide];
            }
        }
    }
}

// y[r][n - first] = x[r] . row n of the matrix, n from first to end - 1.
//
// x: R rows, xs floats apart; or, where `chosen` is given, row r is x + chosen[r] xs.
static void product(const Matrix *m, int64_t first, int64_t end, int64_t R, const float *x, int64_t xs,
                    const int32_t *chosen, float *y, int64_t ys, int add, const Room *room) {
    const int64_t K = m->columns, kind = m->kind, stride = K * ITEM[kind], pitch = grouped(K);
    for (int64_t r = 0; r < R; r += TILE) {
        int64_t rows = least(TILE, R - r);
        const float *own = x + r * xs;
        int64_t own_pitch = xs;
        for (int64_t i = 0; i < rows && (kind == FP8 || chosen); i++) {
            const float *from = x + (chosen ? chosen[r + i] : r + i) * xs;
            if (kind != FP8) memcpy(room->rows + i * pitch, from, (size_t)K * 4);
            for (int64_t k = 0; k < K && kind == FP8; k += FP8_GROUP)
                in_order_of_lanes(from + k, K - k, room->ordered + i * pitch + k);
        }
        if (kind == FP8 || chosen) own = room->rows, own_pitch = pitch;
        for (int64_t n = first; n < end;) {
            int64_t stop = end;
            if (kind == FP8) {
                int64_t block = n / m->block_rows;
                stop = least(end, (block + 1) * m->block_rows);
                scale_rows(m, m->scale + block * blocks_of(K, m->block_columns), rows, room, pitch);
            }
            const char *w = m->data + n * stride;
            float *out = y + r * ys + (n - first);
            if (rows >= WIDEN_FROM && kind != F32)
                many_dots(kind, rows, w, stride, stop - n, K, own, own_pitch, out, ys, add, room->weights);
            else
                dots(kind, rows, w, stride, stop - n, K, own, own_pitch, out, ys, add);
            n = stop;
        }
    }
}

// y[r][c] = sum over n of x[r][n] w[first + n][c]: rows first .. first + N - 1 of the matrix, for R rows of x.
ALWAYS void columns_of(int kind, const Matrix *m, int64_t first, int64_t N, int64_t R, const float *x, int64_t xs,
                       float *y, int64_t ys, const Room *room) {
    const int64_t stride = m->columns * ITEM[kind], wide = kind == FP8 ? m->block_columns : 128;
    for (int64_t c = 0; c < m->columns; c += wide) {
        int64_t last = least(m->columns, c + wide);
        for (int64_t r = 0; r < R; r += 4) {
            int64_t rows = least(4, R - r), pitch = padded(N);
            for (int64_t i = 0; i < rows; i++) {
                const float *from = x + (r + i) * xs;
                float *to = room->rows + i * pitch;
                for (int64_t n = 0; n < N;) {
                    int64_t block = kind == FP8 ? (first + n) / m->block_rows : 0, stop = N;
                    float factor = 1.0f;
                    if (kind == FP8) {
                        stop = least(N, (block + 1) * m->block_rows - first);
                        factor = m->scale[block * blocks_of(m->columns, wide) + c / wide];
                    }
                    for (; n < stop; n++) to[n] = from[n] * factor;
                }
                memset(y + (r + i) * ys + c, 0, (size_t)(last - c) * 4);
            }
            const float *p = room->rows;
            const char *w = m->data + first * stride;
            float *out = y + r * ys;
            int64_t k = c;
            if (rows == 4)
                for (; k + ACROSS * LANES <= last; k += ACROSS * LANES)
                    axpy(kind, 4, ACROSS, w + k * ITEM[kind], stride, N, p, pitch, out + k, ys);
            for (int64_t i = 0; i < rows; i++) {
                int64_t own = k;
                for (; own + 4 * LANES <= last; own += 4 * LANES)
                    axpy(kind, 1, 4, w + own * ITEM[kind], stride, N, p + i * pitch, pitch, out + i * ys + own, ys);
                for (; own + LANES <= last; own += LANES)
                    axpy(kind, 1, 1, w + own * ITEM[kind], stride, N, p + i * pitch, pitch, out + i * ys + own, ys);
                if (own < last)
                    axpy_some(kind, w + own * ITEM[kind], stride, N, p + i * pitch, out + i * ys + own, last - own);
            }
            if (kind == FP8)
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = c; j < last; j++) out[i * ys + j] *= FP8_AFTER;
        }
    }
}

static void columns(const Matrix *m, int64_t first, int64_t N, int64_t R, const float *x, int64_t xs, float *y,
                    int64_t ys, const Room *room) {
    switch (m->kind) {
        case FP8: columns_of(FP8, m, first, N, R, x, xs, y, ys, room); break;
        case BF16: columns_of(BF16, m, first, N, R, x, xs, y, ys, room); break;
        case F16: columns_of(F16, m, first, N, R, x, xs, y, ys, room); break;
        default: columns_of(F32, m, first, N, R, x, xs, y, ys, room); break;
    }
}
