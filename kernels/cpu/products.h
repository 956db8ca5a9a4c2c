// Products of rows with stored matrices, each row as if it were alone.
#pragma once
#include "dense.h"

// A matrix [rows, columns] as a checkpoint stores it; FP8 with float32 scales of blocks.
typedef struct {
    int64_t kind, rows, columns, block_rows, block_columns;
    const char *data;
    const float *scale;
} Matrix;

// What a thread computes with: rows in the order of lanes, times a block's scales, and weights widened once for many rows.
typedef struct {
    float *rows, *weights;
} Room;

#define TILE 64       // rows that are prepared at once, or up to twice as many
#define NEAR_ROWS 65536  // floats of them, if these are more
#define WIDEN_FROM 12  // rows from which it pays to widen weights once for all of them
#define WIDE_COLUMNS 2048  // of rows whose weights are widened

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t grouped(int64_t n) { return (n + FP8_GROUP - 1) / FP8_GROUP * FP8_GROUP; }
static inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
// Floats from a row of so many columns to the next: not a power of two, or rows would compete for the same lines.
static inline int64_t room_pitch(int64_t columns) { return grouped(columns) + LANES; }

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
#define NEAR 4096 // floats of them that leave room for others in the nearest cache
static void many_dots(int64_t kind, int64_t R, const char *w, int64_t stride, int64_t count, int64_t K, const float *x,
                      int64_t xs, float *y, int64_t ys, int add, float *wide) {
    const int64_t pitch = room_pitch(K), length = kind == FP8 ? grouped(K) : K;
    const int64_t group = least(GROUP, most(4, NEAR / most(K, 1) / 4 * 4));
    const float after = kind == FP8 ? FP8_AFTER : 1.0f;
    for (int64_t n = 0; n < count; n += group) {
        int64_t some = least(group, count - n);
        if (kind == F32) {
            dense_dots(R, (const float *)(w + n * stride), K, some, K, x, xs, y + n, ys, 1.0f, add);
            continue;
        }
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
        dense_dots(R, wide, pitch, some, length, x, xs, y + n, ys, after, add);
    }
}

// Rows of x in the order of lanes, times the scales of a block's columns.
static void scale_rows(const Matrix *m, const float *scale, int64_t rows, const float *x, int64_t xs,
                       const int32_t *chosen, float *out, int64_t pitch) {
    const int64_t K = m->columns, wide = m->block_columns;
    for (int64_t i = 0; i < rows; i++) {
        const float *from = x + (chosen ? chosen[i] : i) * xs;
        float *to = out + i * pitch;
        for (int64_t k = 0; k < K; k += FP8_GROUP) {
            in_order_of_lanes(from + k, K - k, to + k);
            if (wide % FP8_GROUP == 0) {
                const float factor = scale[k / wide];
                UNROLL for (int c = 0; c < FP8_GROUP; c += LANES) store(to + k + c, load(to + k + c) * factor);
                continue;
            }
            for (int c = 0; c < FP8_GROUP; c++) {
                int64_t column = least(k + c / 32 * 32 + c % LANES * 2 + c / LANES % 2, K - 1);
                to[k + c] *= scale[column / wide];
            }
        }
    }
}

// Rows that are prepared at once: as many as stay in the cache of a core, beside others.
static inline int64_t tile_rows(int64_t columns) { return most(TILE, least(2 * TILE, NEAR_ROWS / most(columns, 1))); }

// y[r][n - first] = x[r] . row n of the matrix, n from first to end - 1.
//
// x: R rows, xs floats apart; or, where `chosen` is given, row r is x + chosen[r] xs.
static void product(const Matrix *m, int64_t first, int64_t end, int64_t R, const float *x, int64_t xs,
                    const int32_t *chosen, float *y, int64_t ys, int add, const Room *room) {
    const int64_t K = m->columns, kind = m->kind, stride = K * ITEM[kind], pitch = room_pitch(K);
    const int64_t tile = blocks_of(R, most(1, blocks_of(R, tile_rows(K))));  // all alike: none is left with few rows
    for (int64_t r = 0; r < R; r += tile) {
        const int64_t rows = least(tile, R - r);
        const int32_t *some = chosen ? chosen + r : 0;
        const float *from = chosen ? x : x + r * xs, *own = from;
        int64_t own_pitch = xs;
        if (kind == FP8 || chosen) own = room->rows, own_pitch = pitch;
        for (int64_t i = 0; i < rows && kind != FP8 && chosen; i++)
            memcpy(room->rows + i * pitch, x + some[i] * xs, (size_t)K * 4);
        for (int64_t n = first; n < end;) {
            int64_t stop = end;
            if (kind == FP8) {
                int64_t block = n / m->block_rows;
                stop = least(end, (block + 1) * m->block_rows);
                scale_rows(m, m->scale + block * blocks_of(K, m->block_columns), rows, from, xs, some, room->rows, pitch);
            }
            const char *w = m->data + n * stride;
            float *out = y + r * ys + (n - first);
            if (rows >= WIDEN_FROM)
                many_dots(kind, rows, w, stride, stop - n, K, own, own_pitch, out, ys, add, room->weights);
            else
                dots(kind, rows, w, stride, stop - n, K, own, own_pitch, out, ys, add);
            n = stop;
        }
    }
}

// y[r][c] += sum over t of p[r][t] w[t][c] for R rows, all float32: the sums of `axpy`.
static void dense_columns(int64_t R, const float *w, int64_t stride, int64_t T, const float *p, int64_t ps, float *y,
                          int64_t ys, int64_t columns) {
#define COLUMNS(R, N) \
    axpy(F32, R, N, (const char *)(w + c), stride * 4, T, p + r * ps, ps, y + r * ys + c, ys)
    const int64_t whole = columns / LANES * LANES;
    int64_t c = 0, r = 0, step;
    for (; c < whole; c += step) {
        const int broad = BROAD == 4 && c + 4 * LANES <= whole;
        step = broad ? 4 * LANES : LANES;
        for (r = 0; R - r >= 4;) {
            // eight rows are four and four: the sums of two would wait for one another
            const int64_t rows = R - r >= BROAD && R - r != 8 ? BROAD : 4;
            if (BROAD == 4 && broad) COLUMNS(4, 4);
            else if (rows == BROAD) COLUMNS(BROAD, 1);
            else COLUMNS(4, 1);
            r += rows;
        }
    }
    for (; r < R; r++) {
        for (c = 0; c + 4 * LANES <= whole; c += 4 * LANES) COLUMNS(1, 4);
        for (; c < whole; c += LANES) COLUMNS(1, 1);
    }
    for (r = 0; r < R && whole < columns; r++)
        axpy_some(F32, (const char *)(w + whole), stride * 4, T, p + r * ps, y + r * ys + whole, columns - whole);
}

// One row of x for `columns`: times the scales of rows first .. first + N - 1 of the matrix at column c.
static void scale_numbers(const Matrix *m, int64_t first, int64_t N, int64_t c, const float *from, float *to) {
    if (m->kind != FP8) {
        memcpy(to, from, (size_t)N * 4);
        return;
    }
    for (int64_t n = 0; n < N;) {
        const int64_t block = (first + n) / m->block_rows, stop = least(N, (block + 1) * m->block_rows - first);
        const float factor = m->scale[block * blocks_of(m->columns, m->block_columns) + c / m->block_columns];
        for (; n < stop; n++) to[n] = from[n] * factor;
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
                scale_numbers(m, first, N, c, x + (r + i) * xs, room->rows + i * pitch);
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

// The same for many rows: weights are widened once for all of them.
static void many_columns(const Matrix *m, int64_t first, int64_t N, int64_t R, const float *x, int64_t xs, float *y,
                         int64_t ys, const Room *room) {
    const int64_t kind = m->kind, stride = m->columns * ITEM[kind], pitch = padded(N) + LANES;
    const int64_t wide = kind == FP8 ? m->block_columns : m->columns;
    for (int64_t c = 0; c < m->columns; c += wide) {
        const int64_t last = least(m->columns, c + wide);
        for (int64_t i = 0; i < R; i++) scale_numbers(m, first, N, c, x + i * xs, room->rows + i * pitch);
        for (int64_t k = c; k < last; k += LANES) {
            const int64_t some = least(LANES, last - k);
            const char *w = m->data + first * stride + k * ITEM[kind];
            for (int64_t n = 0; n < N; n++, w += stride) {
                vec weights;
                if (some < LANES) weights = widen_some((int)kind, w, some);
                else if (kind == FP8) weights = widen(FP8, w);
                else if (kind == BF16) weights = widen(BF16, w);
                else if (kind == F16) weights = widen(F16, w);
                else weights = widen(F32, w);
                store(room->weights + n * LANES, weights);
            }
            float out[TILE * LANES];
            memset(out, 0, (size_t)(R * LANES) * 4);
            dense_columns(R, room->weights, LANES, N, room->rows, pitch, out, LANES, LANES);
            for (int64_t i = 0; i < R; i++) {
                vec sum = load(out + i * LANES) * (kind == FP8 ? FP8_AFTER : 1.0f);
                memcpy(y + i * ys + k, &sum, (size_t)some * 4);
            }
        }
    }
}

static void columns(const Matrix *m, int64_t first, int64_t N, int64_t R, const float *x, int64_t xs, float *y,
                    int64_t ys, const Room *room) {
    if (R >= WIDEN_FROM) {
        const int64_t tile = blocks_of(R, blocks_of(R, TILE));
        for (int64_t r = 0; r < R; r += tile)
            many_columns(m, first, N, least(tile, R - r), x + r * xs, xs, y + r * ys, ys, room);
        return;
    }
    switch (m->kind) {
        case FP8: columns_of(FP8, m, first, N, R, x, xs, y, ys, room); break;
        case BF16: columns_of(BF16, m, first, N, R, x, xs, y, ys, room); break;
        case F16: columns_of(F16, m, first, N, R, x, xs, y, ys, room); break;
        default: columns_of(F32, m, first, N, R, x, xs, y, ys, room); break;
    }
}
