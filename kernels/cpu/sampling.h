// Drawing a token: noise of a position, and the best token of a row plus noise. No output depends on another one's sums,
// so every level gives the same bits.
#pragma once
#include "dense.h"
#include "lanes.h"

typedef double dvec __attribute__((vector_size(64)));
typedef uint64_t wvec __attribute__((vector_size(64)));
typedef uint32_t words8 __attribute__((vector_size(32)));
#define DOUBLES 8
#define AT_A_TIME 64  // tokens whose noise is made at once, of 8 a block of random words
#define TURNS 4

ALWAYS void multiply(uint64_t a, uint64_t b, uint64_t *high, uint64_t *low) {
    unsigned __int128 all = (unsigned __int128)a * b;
    *high = (uint64_t)(all >> 64), *low = (uint64_t)all;
}

// Philox4x64-10 (Salmon et al., SC 2011) of the counters (block, position, 0, 0) and the key (seed, 0), for several blocks
// from one on: a round waits for the products of the one before, so they take turns.
ALWAYS void philox(uint64_t seed, uint64_t position, uint64_t block, uint64_t *out) {
    uint64_t a[TURNS], b[TURNS], c[TURNS], d[TURNS], key = seed, other = 0;
    UNROLL
    for (int i = 0; i < TURNS; i++) a[i] = block + (uint64_t)i, b[i] = position, c[i] = d[i] = 0;
    UNROLL
    for (int round = 0; round < 10; round++) {
        UNROLL
        for (int i = 0; i < TURNS; i++) {
            uint64_t high, low, higher, lower;
            multiply(0xD2E7470EE14C6C93u, a[i], &high, &low);
            multiply(0xCA5A826395121157u, c[i], &higher, &lower);
            a[i] = higher ^ b[i] ^ key, b[i] = lower, c[i] = high ^ d[i] ^ other, d[i] = low;
        }
        key += 0x9E3779B97F4A7C15u, other += 0xBB67AE8584CAA73Bu;
    }
    UNROLL
    for (int i = 0; i < TURNS; i++) out[4 * i] = a[i], out[4 * i + 1] = b[i], out[4 * i + 2] = c[i], out[4 * i + 3] = d[i];
}

// Logarithms of positive normal numbers: x = 2^k m with m around 1, log m = 2 artanh((m - 1) / (m + 1)).
ALWAYS dvec logarithm(dvec x) {
    const uint64_t half_root = 0x3FE6A09E667F3BCDu;  // of sqrt(1/2), the least m
    wvec bits = (wvec)x, k = (bits - half_root + (1024ull << 52)) >> 52;  // k + 1024, so that it is positive
    dvec f = (dvec)(bits - ((k - 1024) << 52)) - 1.0, s = f / (f + 2.0), z = s * s;
    dvec power = (dvec)(k | 0x4330000000000000u) - (0x1p52 + 1024.0);
    dvec zz = z * z;  // 1/3 + z/5 + ... + z^8/19, in two halves: what follows is below 2^-55
    dvec even = (((zz * (1.0 / 19) + 1.0 / 15) * zz + 1.0 / 11) * zz + 1.0 / 7) * zz + 1.0 / 3;
    dvec sum = (((1.0 / 17 * zz + 1.0 / 13) * zz + 1.0 / 9) * zz + 1.0 / 5) * z + even;
    // log 2 in two parts, the first with zeros at its end, so that its product is exact
    const double log2 = 0x1.62E42FEE00000p-1, rest = 0x1.A39EF35793C76p-33;
    return power * log2 + (2.0 * s + (2.0 * s * z * sum + power * rest));
}

// Gumbel noise of the tokens of a position, `sampling.noise`: -log(-log(1 - u)), u = (word + 1/2) / 2^32.
void EXPORT(noise)(uint64_t seed, uint64_t position, int64_t count, float *out) {
    uint64_t before = plain_arithmetic();
    for (int64_t first = 0; first < count; first += AT_A_TIME) {
        uint64_t words[AT_A_TIME / 2];  // of 32 bits two each, the low half first
        for (int64_t i = 0; i < AT_A_TIME / 8; i += TURNS)
            philox(seed, position, (uint64_t)(first / 8 + i + 1), words + 4 * i);
        float found[AT_A_TIME];
        for (int64_t i = 0; i < AT_A_TIME; i += DOUBLES) {
            words8 drawn;
            memcpy(&drawn, words + i / 2, sizeof drawn);
            dvec u = (__builtin_convertvector(drawn, dvec) + 0.5) * 0x1p-32;
            const dvec most = (1.0 - 0x1p-24) - (dvec){0};  // the largest float32 below 1
            wvec above = (wvec)(u > most);
            u = (dvec)((above & (wvec)most) | (~above & (wvec)u));
            vec8 gumbel = __builtin_convertvector(-logarithm(-logarithm(1.0 - u)), vec8);
            memcpy(found + i, &gumbel, sizeof gumbel);
        }
        memcpy(out + first, found, sizeof(float) * (size_t)least(count - first, AT_A_TIME));
    }
    former_arithmetic(before);
}

ALWAYS vec part_row(const float *p, int64_t count, float other) {
    if (count >= LANES) return load(p);
    vec v = spread(other);
    for (int64_t l = 0; l < count; l++) v[l] = p[l];
    return v;
}

// The token with the highest score, the first among equals, where a score is (logit - highest) / temperature + noise, or
// the logit without noise; and in `scores` its score and the next one, -inf if there is none. -1 if any logit is not
// finite.
int64_t EXPORT(draw)(const float *row, int64_t count, const float *temperature, const float *noise, float *scores) {
    uint64_t before = plain_arithmetic();
    vec highest = spread(-__builtin_inff());
    ivec wrong = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = part_row(row + i, count - i, row[0]);
        wrong |= x - x != spread(0.0f);
        highest = pick(x > highest, x, highest);
    }
    float best = highest[0];
    int any = 0;
    for (int l = 0; l < LANES; l++) best = highest[l] > best ? highest[l] : best, any |= wrong[l];
    if (any) {
        former_arithmetic(before);
        return -1;
    }
    vec first = spread(-__builtin_inff()), second = first, divisor = spread(*temperature), top = spread(best);
    ivec where = {0}, place;
    for (int l = 0; l < LANES; l++) place[l] = l;
    for (int64_t i = 0; i < count; i += LANES, place += LANES) {
        vec x = part_row(row + i, count - i, 0.0f);
        if (noise) x = (x - top) / divisor + part_row(noise + i, count - i, 0.0f);
        if (count - i < LANES)
            for (int64_t l = count - i; l < LANES; l++) x[l] = -__builtin_inff();
        ivec better = x > first, next = x > second;
        second = pick(better, first, pick(next, x, second));
        first = pick(better, x, first);
        where = (better & place) | (~better & where);
    }
    int lane = 0;
    for (int l = 1; l < LANES; l++)
        if (first[l] > first[lane] || (first[l] == first[lane] && where[l] < where[lane])) lane = l;
    float after = second[lane];
    for (int l = 0; l < LANES; l++)
        if (l != lane && first[l] > after) after = first[l];
    scores[0] = first[lane], scores[1] = after;
    former_arithmetic(before);
    return where[lane];
}
