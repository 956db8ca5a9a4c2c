// Latent attention of few or many rows over one sequence's cache (DeepSeek-V2, 2405.04434 section 2.1, absorbed form).
//
// A row sees the first `run` slots, which lie in the order of their positions, and then its own list of further ones:
// the ancestors of a tree's node. It reads them in this order whatever the cache's pages are.
#pragma once
#include "products.h"

#define PAGE 64

// The rows of a pass: what each one sees, and where it is written.
typedef struct {
    int64_t sequence, position, slot, run, more, first_more;  // `more` slots from further[first_more] on
} Row;

// The memory of a sequence's caches: of each layer the address of slot 0's memory, of each page its first slot there.
typedef struct {
    const int64_t *layers, *pages;
} Cache;

ALWAYS float *slot_of(const Cache *cache, int64_t layer, int64_t width, int64_t slot) {
    return (float *)cache->layers[layer] + (cache->pages[slot / PAGE] + slot % PAGE) * width;
}

// Scores to weights that still want to be divided by their sum; returns 1 / sum.
static float soften(float *scores, int64_t count, float scale) {
    float highest = scores[0];
    int64_t t = 0;
    if (count >= LANES) {  // the greatest number, NaN only where there is none; in any order
        vec most = load(scores);
        for (t = LANES; t + LANES <= count; t += LANES) {
            vec v = load(scores + t);
            most = pick((v > most) | (most != most), v, most);
        }
        for (int l = 0; l < LANES; l++) highest = most[l] > highest || highest != highest ? most[l] : highest;
    }
    for (; t < count; t++) highest = scores[t] > highest || highest != highest ? scores[t] : highest;
    vec sum = {0};
    t = 0;
    for (; t + LANES <= count; t += LANES) {
        vec v = exponential((load(scores + t) - highest) * scale);
        store(scores + t, v);
        sum = sum + v;
    }
    if (t < count) {
        float some[LANES] = {0};
        memcpy(some, scores + t, (size_t)(count - t) * 4);
        vec v = exponential((load(some) - highest) * scale);
        store(some, v);
        for (int64_t l = count - t; l < LANES; l++) some[l] = 0.0f;
        memcpy(scores + t, some, (size_t)(count - t) * 4);
        sum = sum + load(some);
    }
    return 1.0f / total(sum);
}

// Rows first .. end - 1, all of one sequence, heads from `head` on: queries to weighted latents.
//
// q: [rows, all heads, width], qs floats a head; out: the same with `latent` columns, os floats a head.
// scores: room for (end - first) x heads rows of `pitch` floats, at least the longest context.
static void attend(const Cache *cache, int64_t layer, const Row *rows, const int64_t *further, int64_t first, int64_t end,
                   int64_t head, int64_t heads, int64_t all_heads, int64_t width, int64_t latent, float scale,
                   const float *q, int64_t qs, float *out, int64_t os, float *scores, int64_t pitch) {
    int64_t count = end - first, shortest = rows[first].run;
    for (int64_t r = first; r < end; r++) shortest = least(shortest, rows[r].run);
    // slots that all rows see, a few at a time, which stay in the nearest cache for all rows and heads
    const int64_t tile = 16, bands = heads == all_heads ? 1 : count;  // queries that follow one another
    for (int64_t t = 0; t < shortest; t += tile) {
        int64_t some = least(tile, shortest - t);
        const float *latents = slot_of(cache, layer, width, t);
        for (int64_t i = 0; i < width * some; i += LANES) __builtin_prefetch(latents + width * some + i, 0, 2);
        for (int64_t r = 0; r < bands; r++)
            dense_dots(count / bands * heads, latents, width, some, width, q + ((first + r) * all_heads + head) * qs, qs,
                       scores + r * heads * pitch + t, pitch, 1.0f, 0);
    }
    for (int64_t r = 0; r < count; r++) {
        const Row *row = rows + first + r;
        const float *own = q + ((first + r) * all_heads + head) * qs;
        float *place = scores + r * heads * pitch;
        for (int64_t t = shortest; t < row->run;) {
            int64_t some = least(PAGE - t % PAGE, row->run - t);
            dots_of(F32, heads, (const char *)slot_of(cache, layer, width, t), width * 4, some, width, own, qs, place + t,
                    pitch, 0);
            t += some;
        }
        for (int64_t i = 0; i < row->more; i++)
            dots_of(F32, heads, (const char *)slot_of(cache, layer, width, further[row->first_more + i]), width * 4, 1,
                    width, own, qs, place + row->run + i, pitch, 0);
    }
    float share[256];
    for (int64_t r = 0; r < count; r++) {
        int64_t seen = rows[first + r].run + rows[first + r].more;
        for (int64_t h = 0; h < heads; h++) {
            share[r * heads + h] = soften(scores + (r * heads + h) * pitch, seen, scale);
            memset(out + ((first + r) * all_heads + head + h) * os, 0, (size_t)latent * 4);
        }
    }
    for (int64_t t = 0; t < shortest; t += PAGE) {
        int64_t some = least(PAGE, shortest - t);
        const float *latents = slot_of(cache, layer, width, t);
        for (int64_t r = 0; r < bands; r++)
            dense_columns(count / bands * heads, latents, width, some, scores + r * heads * pitch + t, pitch,
                          out + ((first + r) * all_heads + head) * os, os, latent);
    }
    for (int64_t r = 0; r < count; r++) {
        const Row *row = rows + first + r;
        float *own = out + ((first + r) * all_heads + head) * os, *place = scores + r * heads * pitch;
        for (int64_t t = shortest; t < row->run;) {
            int64_t some = least(PAGE - t % PAGE, row->run - t);
            dense_columns(heads, slot_of(cache, layer, width, t), width, some, place + t, pitch, own, os, latent);
            t += some;
        }
        for (int64_t i = 0; i < row->more; i++)
            dense_columns(heads, slot_of(cache, layer, width, further[row->first_more + i]), width, 1,
                          place + row->run + i, pitch, own, os, latent);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t c = 0; c < latent; c++) own[h * os + c] *= share[r * heads + h];
    }
}
