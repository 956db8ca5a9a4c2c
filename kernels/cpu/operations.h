// Single operations, as tests and benchmarks call them.
#pragma once
#include "ordered.h"
#include "phases.h"

void EXPORT(product)(const Matrix *m, int64_t first, int64_t end, int64_t rows, const float *x, int64_t xs,
                     const int32_t *chosen, float *y, int64_t ys, int64_t add, float *memory) {
    uint64_t before = plain_arithmetic();
    Room room = room_in(memory, m->columns);
    product(m, first, end, rows, x, xs, chosen, y, ys, (int)add, &room);
    former_arithmetic(before);
}

void EXPORT(columns)(const Matrix *m, int64_t first, int64_t count, int64_t rows, const float *x, int64_t xs, float *y,
                     int64_t ys, float *memory) {
    uint64_t before = plain_arithmetic();
    Room room = room_in(memory, count);
    columns(m, first, count, rows, x, xs, y, ys, &room);
    former_arithmetic(before);
}

void EXPORT(attend)(const Cache *cache, int64_t layer, const Row *rows, const int64_t *further, int64_t count,
                    int64_t heads, int64_t width, int64_t latent, const float *scale, const float *q, float *out,
                    float *scores, int64_t pitch) {
    uint64_t before = plain_arithmetic();
    for (int64_t first = 0; first < count;) {
        int64_t end = first + 1;
        while (end < count && end - first < AT_ONCE && rows[end].sequence == rows[first].sequence) end++;
        for (int64_t h = 0; h < heads; h += HEADS_AT_ONCE)
            attend(cache + rows[first].sequence, layer, rows, further, first, end, h, least(HEADS_AT_ONCE, heads - h),
                   heads, width, latent, *scale, q, padded(width), out, padded(latent), scores, pitch);
        first = end;
    }
    former_arithmetic(before);
}

void EXPORT(norm)(const float *x, const float *weight, const float *eps, int64_t n, float *out) {
    uint64_t before = plain_arithmetic();
    norm(x, weight, *eps, n, out, n);
    former_arithmetic(before);
}

void EXPORT(activate)(float *gate, const float *up, int64_t n) {
    uint64_t before = plain_arithmetic();
    activate(gate, up, n);
    former_arithmetic(before);
}

void EXPORT(rotate)(float *x, const float *table, int64_t n, int64_t interleaved) {
    uint64_t before = plain_arithmetic();
    rotate(x, table, n, (int)interleaved);
    former_arithmetic(before);
}

void EXPORT(choose)(const Routing *routing, float *scores, const float *bias, float *memory, int32_t *index,
                    float *weight) {
    uint64_t before = plain_arithmetic();
    choose(routing, scores, bias, memory, index, weight);
    former_arithmetic(before);
}

// Several pairs of matrices of the same sizes, one after the other.
void EXPORT(ordered_products)(const Matrix *x, const Matrix *w, int64_t pairs, float *y) {
    Matrix left = *x, right = *w;
    for (int64_t i = 0; i < pairs; i++) {
        ordered_products(&left, &right, y + i * x->rows * w->rows);
        left.data += x->rows * x->columns * ITEM[x->kind], right.data += w->rows * w->columns * ITEM[w->kind];
    }
}

void EXPORT(ordered_totals)(const float *x, int64_t rows, int64_t columns, float *y) {
    ordered_totals(x, rows, columns, y);
}
