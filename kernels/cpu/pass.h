// What a pass is asked for, the memory that it works in, and how threads and ranks share its phases.
#pragma once
#include "attention.h"
#include "layers.h"
#include "team.h"

typedef struct {
    Matrix q_a, kv_a, q_b, kv_b, o;     // q_a: the whole query projection where there is no query LoRA
    Matrix router, gate, up, down;      // gate, up, down: of the shared experts, or of a dense layer
    const float *input_norm, *post_norm, *q_norm, *kv_norm, *bias;
    const Matrix *experts;              // gate, up and down of each; none in a dense layer
} Layer;

typedef struct {
    Matrix mix;  // eh_proj
    const float *embedding_norm, *hidden_norm, *norm;
} Module;

typedef struct {
    int64_t hidden, heads, latent, rope, nope, value, q_rank, layers, modules, inner, expert_inner, interleaved;
    float eps, latent_eps, scale;
    Routing routing;
    Matrix embedding;
    const float *norm;
    const Layer *layer;  // of the main model, then one of each module
    const Module *module;
} Model;

// Fills rows of `stride` floats with what other ranks computed of their n columns; returns 0 if they cannot be reached.
typedef int64_t (*Exchange)(float *data, int64_t rows, int64_t stride, int64_t n, int64_t unit);

// What a pass is asked for; `module` is -1 for the main model. Arrays as `Row` and `Cache` say.
typedef struct {
    const Model *model;
    int64_t module, rows, threads, blocks;
    const int64_t *ids, *further, *block;  // block: first rows of what is attended at once, and the end
    const Row *row;
    const Cache *cache;
    const float *rope, *before;  // before: hidden states [rows, hidden] that a module is given
    // The rows whose hidden states are wanted, ascending, and `row`, `block` and `blocks` of these alone; null for all.
    // Of the others the last layer computes only what it caches.
    const int32_t *kept;
    int64_t kept_rows, kept_blocks;
    const Row *kept_row;
    const int64_t *kept_block;
    float *after;                // normed hidden states of these rows [kept_rows, hidden]
    Matrix head;                 // gives logits [scored, V] of these rows of `after`
    const int32_t *picked;
    float *logits;
    int64_t scored;
    float *memory;
    int64_t memory_rows, memory_context, memory_threads;
    // Processes that share the work: each computes its part of every matrix's outputs, and all exchange them.
    int64_t rank, ranks;
    Exchange exchange;
    int64_t *hits;  // where the experts that were read are counted, or null
} Pass;

// The same pass with the kept rows alone.
static Pass narrowed(const Pass *pass) {
    Pass few = *pass;
    few.rows = pass->kept_rows, few.row = pass->kept_row, few.blocks = pass->kept_blocks, few.block = pass->kept_block;
    few.kept = 0;
    return few;
}

// Logits of hidden states.
typedef struct {
    Matrix head;
    const float *hidden;
    float *logits;
    int64_t rows, threads, first, end;  // of the head's rows
    float *memory;
} Head;

typedef struct {
    float *x, *h, *down, *qa, *q, *ql, *att, *values, *logits, *mid, *up, *expert_mid, *expert_up, *out, *weight, *choice;
    int32_t *index, *pair_row, *place, *hit, *first;
    int64_t *hits, *failed;
    float *room, *scores;
    int64_t xs, hs, ds, qas, qs, qls, atts, vs, mids, emids, widest, room_size, score_size, pitch, at_once;
} Memory;

typedef struct {
    const Pass *pass;
    Pass few;  // what the pass becomes in its last layer, where only some rows are kept
    const Model *model;
    Memory m;
    Room room;
    float *scores;
    int64_t phase;
    uint64_t number;  // of the pass
    struct {
        float *data;
        int64_t rows, stride, n, unit;
    } exchanged;
} Work;

#define HEAD_UNIT 64  // rows of a head that are divided
#define AT_ONCE 8     // rows of a block of attention
#define FEW_AT_ONCE 4  // the same where contexts are long
#define LONG_CONTEXT 8192
#define HEADS_AT_ONCE 8
#define FUSED 16       // rows up to which a head's queries, attention and values are one piece

// Room for products of so many columns, or by so many rows: floats, and where its parts are.
static int64_t room_rows(int64_t columns) {
    return most(TILE * room_pitch(columns), least(2 * TILE * room_pitch(columns), NEAR_ROWS + 2 * TILE * room_pitch(FP8_GROUP)));
}

static int64_t room_for(int64_t columns) { return room_rows(columns) + GROUP * room_pitch(columns); }

static Room room_in(float *memory, int64_t columns) {
    return (Room){.rows = memory, .weights = memory + room_rows(columns)};
}

static float *cut(float **at, int64_t count) {
    float *out = *at;
    *at += padded(count);
    return out;
}

// Divides memory from `at` on; returns where it ends.
static float *divide(const Model *model, int64_t R, int64_t context, int64_t threads, float *at, Memory *m) {
    const int64_t D = model->hidden, H = model->heads, W = model->latent + model->rope, E = model->routing.experts;
    const int64_t QH = model->nope + model->rope, K = model->routing.chosen, A = model->q_rank ? model->q_rank : H * QH;
    const int64_t I = model->inner, EI = model->expert_inner, V = H * model->value;
    m->xs = padded(D), m->hs = padded(2 * D), m->ds = padded(A) + padded(W), m->qas = padded(model->q_rank);
    m->qs = padded(QH), m->qls = padded(W), m->atts = padded(model->latent), m->vs = padded(V);
    m->mids = padded(I), m->emids = padded(EI), m->pitch = padded(context) + LANES;
    m->x = cut(&at, R * m->xs), m->h = cut(&at, R * m->hs), m->down = cut(&at, R * m->ds);
    m->qa = cut(&at, R * m->qas), m->q = cut(&at, R * H * QH), m->ql = cut(&at, R * H * m->qls);
    m->att = cut(&at, R * H * m->atts), m->values = cut(&at, R * m->vs), m->logits = cut(&at, R * E);
    m->mid = cut(&at, R * m->mids), m->up = cut(&at, R * m->mids);
    m->expert_mid = cut(&at, R * K * m->emids), m->expert_up = cut(&at, R * K * m->emids);
    m->out = cut(&at, R * (K + 1) * m->xs), m->weight = cut(&at, R * K), m->choice = cut(&at, R * 3 * E);
    m->index = (int32_t *)cut(&at, R * K), m->pair_row = (int32_t *)cut(&at, R * K);
    m->place = (int32_t *)cut(&at, R * K), m->hit = (int32_t *)cut(&at, E + 1), m->first = (int32_t *)cut(&at, E + 2);
    m->hits = (int64_t *)cut(&at, 4), m->failed = m->hits + 1;
    int64_t widest = most(most(2 * D, A), most(most(V, I), most(EI, most(W, QH))));
    m->widest = widest, m->room_size = room_for(widest), m->at_once = context > LONG_CONTEXT ? FEW_AT_ONCE : AT_ONCE;
    m->score_size = m->at_once * HEADS_AT_ONCE * m->pitch;
    m->room = cut(&at, threads * m->room_size), m->scores = cut(&at, threads * m->score_size);
    return at;
}

static void part_of(int64_t n, int64_t piece, int64_t pieces, int64_t unit, int64_t *first, int64_t *end) {
    int64_t units = blocks_of(n, unit);
    *first = units * piece / pieces * unit, *end = least(n, units * (piece + 1) / pieces * unit);
}

// The same of this rank's part.
static void share_of(const Pass *p, int64_t n, int64_t piece, int64_t pieces, int64_t unit, int64_t *first, int64_t *end) {
    int64_t a, z;
    part_of(n, p->rank, p->ranks, unit, &a, &z);
    part_of(z - a, piece, pieces, unit, first, end);
    *first += a, *end += a;
}

typedef void (*Piece)(const Work *w, int64_t layer, int64_t piece, int64_t pieces);

// Runs a phase; returns 0 where the pass is over without this thread.
static int phase(Work *w, Piece run, int64_t layer, int64_t pieces) {
    if (w->pass->threads == 1) {
        for (int64_t i = 0; i < pieces; i++) run(w, layer, i, pieces);
        return 1;
    }
    int64_t own = w->phase++, piece;
    while ((piece = take(&phases[own].taken, w->number, pieces)) >= 0) {
        run(w, layer, piece, pieces);
        take(&phases[own].done, w->number, INT64_MAX);
    }
    return pieces == 0 || wait_for(own, w->number, pieces);
}

static int64_t pieces_of(const Work *w, int64_t columns) {
    return w->pass->threads == 1 ? 1 : least(blocks_of(columns, 32), 3 * w->pass->threads);
}

static void exchange_piece(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    if (!w->pass->exchange(w->exchanged.data, w->exchanged.rows, w->exchanged.stride, w->exchanged.n, w->exchanged.unit))
        *w->m.failed = 1;
    (void)layer, (void)piece, (void)pieces;
}

// Lets ranks exchange columns; returns 0 where the pass is over, or they do not answer.
static int exchange(Work *w, float *data, int64_t rows, int64_t stride, int64_t n, int64_t unit) {
    if (w->pass->ranks == 1) return 1;
    w->exchanged.data = data, w->exchanged.rows = rows, w->exchanged.stride = stride;
    w->exchanged.n = n, w->exchanged.unit = unit;
    return phase(w, exchange_piece, 0, 1) && !*w->m.failed;
}

// What the library shows has the name of its level.
#define JOIN_(a, b, c) a##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(mtp_, LEVEL, name)
