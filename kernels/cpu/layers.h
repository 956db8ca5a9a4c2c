// What stands between the products: norms, rotary positions, activation, and the choice of experts.
#pragma once
#include "attention.h"

// out = x / sqrt(mean(x^2) + eps) * weight; the columns up to `pitch` become zero.
static void norm(const float *x, const float *weight, float eps, int64_t n, float *out, int64_t pitch) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec v = load(x + i);
        sum = fused(v, v, sum);
    }
    if (i < n) {
        vec v = widen_some(F32, (const char *)(x + i), n - i);
        sum = fused(v, v, sum);
    }
    float square = total(sum);
    float factor = 1.0f / __builtin_sqrtf(square / (float)n + eps);
    if (square == __builtin_inff()) factor = __builtin_nanf("");  // else infinity would become zeros
    for (i = 0; i < n; i++) out[i] = (x[i] * factor) * weight[i];
    for (; i < pitch; i++) out[i] = 0.0f;
}

// x, n columns, rotated in place: x times the table's first row plus x with its pairs swapped times its second.
static void rotate(float *x, const float *table, int64_t n, int interleaved) {
    if (interleaved) {
        for (int64_t i = 0; i < n; i += 2) {
            float a = x[i], b = x[i + 1];
            x[i] = a * table[i] + b * table[n + i];
            x[i + 1] = b * table[i + 1] + a * table[n + i + 1];
        }
        return;
    }
    for (int64_t i = 0; i < n / 2; i++) {
        float a = x[i], b = x[i + n / 2];
        x[i] = a * table[i] + b * table[n + i];
        x[i + n / 2] = b * table[i + n / 2] + a * table[n + i + n / 2];
    }
}

// gate = gate / (1 + e^-gate) * up
static void activate(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec g = load(gate + i);
        store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
    if (i < n) {
        vec g = widen_some(F32, (const char *)(gate + i), n - i);
        vec u = widen_some(F32, (const char *)(up + i), n - i);
        vec out = g / (1.0f + exponential(-g)) * u;
        memcpy(gate + i, &out, (size_t)(n - i) * 4);
    }
}

enum { SOFTMAX = 0, SIGMOID = 1 };
enum { GREEDY = 0, GROUP_MAX = 1, GROUP_TWO = 2 };

typedef struct {
    int64_t experts, chosen, groups, kept_groups, scoring, method, normalised;
    float factor;
} Routing;

// A row's experts in ascending order, and their weights (V3 report, 2412.19437, eq. 12-16; V2, 2405.04434, eq. 20-22).
//
// scores: the gate's logits, overwritten; room: 3 x experts floats. Of equals the lower number is taken. Where a logit or
// a bias is NaN or infinite, which comparisons and the sigmoid would hide, every weight becomes NaN.
static void choose(const Routing *routing, float *scores, const float *bias, float *room, int32_t *index, float *weight) {
    const int64_t E = routing->experts;
    float *choice = room, *worth = room + E;
    uint8_t *taken = (uint8_t *)(room + 2 * E);
    float unsound = 0.0f;  // or NaN
    for (int64_t e = 0; e < E; e++) unsound += (scores[e] + (bias ? bias[e] : 0.0f)) * 0.0f;
    if (routing->scoring == SIGMOID) {
        for (int64_t e = 0; e < E; e++) scores[e] = 1.0f / (1.0f + exponential_of(-scores[e]));
    } else {
        float share = soften(scores, E, 1.0f);
        for (int64_t e = 0; e < E; e++) scores[e] *= share;
    }
    for (int64_t e = 0; e < E; e++) choice[e] = bias ? scores[e] + bias[e] : scores[e];
    if (routing->method != GREEDY && routing->groups != routing->kept_groups) {
        const int64_t G = routing->groups, size = E / G;
        for (int64_t g = 0; g < G; g++) {
            float first = -__builtin_inff(), second = first;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                if (choice[e] > first) second = first, first = choice[e];
                else if (choice[e] > second) second = choice[e];
            }
            worth[g] = routing->method == GROUP_MAX || size == 1 ? first : first + second;
        }
        for (int64_t k = 0; k < G - routing->kept_groups; k++) {  // the worst go; of equals the higher number
            int64_t worst = -1;
            for (int64_t g = G - 1; g >= 0; g--)
                if (worth[g] != __builtin_inff() && (worst < 0 || !(worth[g] >= worth[worst]))) worst = g;
            if (worst < 0) break;
            worth[worst] = __builtin_inff();
            for (int64_t e = worst * size; e < (worst + 1) * size; e++) choice[e] = -__builtin_inff();
        }
    }
    memset(taken, 0, (size_t)E);
    for (int64_t k = 0; k < routing->chosen; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || choice[e] > choice[best])) best = e;
        taken[best] = 1;
    }
    for (int64_t e = 0, k = 0; e < E; e++)  // the sum over them has one order then
        if (taken[e]) index[k++] = (int32_t)e;
    float sum = 0.0f;
    for (int64_t k = 0; k < routing->chosen; k++) sum += weight[k] = scores[index[k]];
    float factor = routing->normalised ? routing->factor / (sum + 1e-20f) : routing->factor;
    for (int64_t k = 0; k < routing->chosen; k++) weight[k] = weight[k] * factor + unsound;
}
