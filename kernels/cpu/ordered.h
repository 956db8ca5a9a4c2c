// The sums of kernels/ordered.py, of which the references of the GPU's kernels are made: no product is fused with a sum,
// 128 of them are added as a tree, halves to halves, and such pieces in ascending order.
#pragma once
#include "products.h"

#define PIECE 128
#define PIECE_LANES (PIECE / LANES)

// The least power of two that holds count terms.
static inline int64_t tree_size(int64_t count) {
    int64_t size = 1;
    while (size < count) size *= 2;
    return size;
}

// Sixteen stored numbers; those of FP8 not times anything, and NaN where they are NaN.
ALWAYS vec as_floats(int kind, const char *p) {
    vec wide = widen(kind, p);
    if (kind != FP8) return wide;
    bytes16 codes;
    memcpy(&codes, p, sizeof codes);
    ivec nan = (__builtin_convertvector(codes, ivec) & 0x7F) == 0x7F;
    return pick(nan, spread(__builtin_nanf("")), wide * FP8_AFTER);
}

// Up to 128 stored numbers as float32, then zeros up to their tree's size, then `beyond`.
ALWAYS void piece_of(int kind, const char *p, int64_t count, int64_t size, float beyond, float *out) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(out + k, as_floats(kind, p + k * ITEM[kind]));
    if (k < count) {
        char some[64] = {0};
        memcpy(some, p + k * ITEM[kind], (size_t)((count - k) * ITEM[kind]));
        store(out + k, as_floats(kind, some));
    }
    for (k = count; k < size; k++) out[k] = 0.0f;
    for (; k < PIECE && (k < size || k % LANES); k++) out[k] = beyond;
}

static void piece(int64_t kind, const char *p, int64_t count, int64_t size, float beyond, float *out) {
    switch (kind) {
        case FP8: piece_of(FP8, p, count, size, beyond, out); break;
        case BF16: piece_of(BF16, p, count, size, beyond, out); break;
        case F16: piece_of(F16, p, count, size, beyond, out); break;
        default: piece_of(F32, p, count, size, beyond, out); break;
    }
}

// Terms that a tree has lanes of, added until sixteen are left.
ALWAYS vec sixteen(int count, vec *terms) {
    UNROLL for (int size = count / 2; size >= 1; size /= 2)
        UNROLL for (int i = 0; i < size; i++) terms[i] = terms[i] + terms[i + size];
    return terms[0];
}

// The trees of one piece of x with sixteen of w.
ALWAYS void trees_of(int count, const float *x, const float *w, float *out) {
    vec row[PIECE_LANES], sums[LANES];
    UNROLL for (int i = 0; i < count; i++) row[i] = load(x + LANES * i);
    for (int n = 0; n < LANES; n++) {
        vec terms[PIECE_LANES];
        UNROLL for (int i = 0; i < count; i++) terms[i] = row[i] * load(w + n * PIECE + LANES * i);
        sums[n] = sixteen(count, terms);
    }
    for (int n = 0; n < LANES; n += 4) {
        vec4 four = totals(sums[n], sums[n + 1], sums[n + 2], sums[n + 3]);
        memcpy(out + n, &four, sizeof four);
    }
}

static void trees(int64_t size, const float *x, const float *w, float *out) {
    switch (most(size, LANES) / LANES) {
        case 1: trees_of(1, x, w, out); break;
        case 2: trees_of(2, x, w, out); break;
        case 4: trees_of(4, x, w, out); break;
        default: trees_of(8, x, w, out); break;
    }
}

// y[r][n] = x[r] . w[n]. With scales, of 128 columns of a row of x and of blocks of w, each piece is multiplied by x's,
// then by w's, and added to what began as zero.
static void ordered_products(const Matrix *x, const Matrix *w, float *y) {
    const int64_t pieces = blocks_of(w->columns, PIECE), item = ITEM[w->kind];
    for (int64_t first = 0; first < w->rows; first += LANES) {
        const int64_t some = least(LANES, w->rows - first);
        for (int64_t b = 0; b < pieces; b++) {
            const int64_t count = least(PIECE, w->columns - b * PIECE), size = tree_size(count);
            float wide[LANES * PIECE], factors[LANES], row[PIECE], out[LANES];
            if (some < LANES) memset(wide, 0, sizeof wide);
            for (int64_t n = 0; n < some; n++) {
                piece(w->kind, w->data + ((first + n) * w->columns + b * PIECE) * item, count, size, 0.0f, wide + n * PIECE);
                if (w->scale) factors[n] = w->scale[(first + n) / w->block_rows * pieces + b];
            }
            for (int64_t r = 0; r < x->rows; r++) {
                // lanes beyond a small tree are -0, which changes nothing that it is added to
                piece(x->kind, x->data + (r * x->columns + b * PIECE) * ITEM[x->kind], count, size, -0.0f, row);
                trees(size, row, wide, out);
                float *to = y + r * w->rows + first;
                for (int64_t n = 0; n < some; n++) {
                    const float found = w->scale ? out[n] * x->scale[r * pieces + b] * factors[n] : out[n];
                    to[n] = b ? to[n] + found : w->scale ? 0.0f + found : found;
                }
            }
        }
    }
}

// The sums of rows of float32.
static void ordered_totals(const float *x, int64_t rows, int64_t columns, float *y) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t k = 0; k < columns; k += PIECE) {
            const int64_t count = least(PIECE, columns - k), size = tree_size(count);
            float terms[PIECE];
            vec lanes[PIECE_LANES];
            piece(F32, (const char *)(x + r * columns + k), count, size, -0.0f, terms);
            const int held = (int)(most(size, LANES) / LANES);
            for (int i = 0; i < held; i++) lanes[i] = load(terms + LANES * i);
            for (int half = held / 2; half >= 1; half /= 2)
                for (int i = 0; i < half; i++) lanes[i] = lanes[i] + lanes[i + half];
            y[r] = k ? y[r] + total(lanes[0]) : total(lanes[0]);
        }
    }
}
