// A pass of the model, or of one of its multi-token-prediction modules, as one call.
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
    float *after;                // normed hidden states [rows, hidden]
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
    int64_t xs, hs, ds, qas, qs, qls, atts, vs, mids, emids, room_rows, room_weights, room_size, score_size, pitch;
} Memory;

typedef struct {
    const Pass *pass;
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
#define AT_ONCE 4      // rows of a block of attention
#define HEADS_AT_ONCE 8
#define FUSED 16       // rows up to which a head's queries, attention and values are one piece

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
    m->mids = padded(I), m->emids = padded(EI), m->pitch = padded(context);
    m->x = cut(&at, R * m->xs), m->h = cut(&at, R * m->hs), m->down = cut(&at, R * m->ds);
    m->qa = cut(&at, R * m->qas), m->q = cut(&at, R * H * QH), m->ql = cut(&at, R * H * m->qls);
    m->att = cut(&at, R * H * m->atts), m->values = cut(&at, R * m->vs), m->logits = cut(&at, R * E);
    m->mid = cut(&at, R * m->mids), m->up = cut(&at, R * m->mids);
    m->expert_mid = cut(&at, R * K * m->emids), m->expert_up = cut(&at, R * K * m->emids);
    m->out = cut(&at, R * (K + 1) * m->xs), m->weight = cut(&at, R * K), m->choice = cut(&at, R * 3 * E);
    m->index = (int32_t *)cut(&at, R * K), m->pair_row = (int32_t *)cut(&at, R * K);
    m->place = (int32_t *)cut(&at, R * K), m->hit = (int32_t *)cut(&at, E + 1), m->first = (int32_t *)cut(&at, E + 2);
    m->hits = (int64_t *)cut(&at, 4), m->failed = m->hits + 1;
    int64_t widest = most(most(2 * D, A), most(most(V, I), most(EI, W)));
    m->room_rows = TILE * grouped(widest), m->room_weights = GROUP * (grouped(widest) + LANES);
    m->room_size = 2 * m->room_rows + m->room_weights, m->score_size = AT_ONCE * HEADS_AT_ONCE * m->pitch;
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

static void embed(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Pass *p = w->pass;
    const Matrix *table = &w->model->embedding;
    const int64_t D = w->model->hidden, r = piece;
    const char *from = table->data + p->ids[r] * D * ITEM[table->kind];
    float *to = p->module < 0 ? w->m.x + r * w->m.xs : w->m.h + r * w->m.hs;
    for (int64_t k = 0; k < D; k += LANES) {
        vec v = widen_some((int)table->kind, from + k * ITEM[table->kind], least(LANES, D - k));
        memcpy(to + k, &v, (size_t)least(LANES, D - k) * 4);
    }
    if (p->module < 0) return;
    const Module *module = w->model->module + p->module;
    norm(to, module->embedding_norm, w->model->eps, D, to, D);
    norm(p->before + r * D, module->hidden_norm, w->model->eps, D, to + D, w->m.hs - D);
    (void)layer, (void)pieces;
}

static void mix(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t a, z;
    part_of(w->model->hidden, piece, pieces, LANES, &a, &z);
    product(&w->model->module[w->pass->module].mix, a, z, w->pass->rows, w->m.h, w->m.hs, 0, w->m.x + a, w->m.xs, 0,
            &w->room);
    (void)layer;
}

// Adds what the experts of the layer before left to a row.
static void gather(const Work *w, int64_t layer, int64_t r) {
    const Memory *m = &w->m;
    const int64_t D = w->model->hidden, K = w->model->routing.chosen, pairs = w->pass->rows * K;
    float *x = m->x + r * m->xs;
    const float *shared = w->model->layer[layer].gate.rows ? m->out + (pairs + r) * m->xs : 0;
    for (int64_t c = 0; c < D; c += LANES) {  // rows are padded to whole vectors
        vec sum = {0};
        for (int64_t k = 0; k < K; k++)
            sum = fused(spread(m->weight[r * K + k]), load(m->out + m->place[r * K + k] * m->xs + c), sum);
        if (shared) sum = sum + load(shared + c);
        store(x + c, load(x + c) + sum);
    }
}

// The layer's first norm; where `layer` is the end, the last one.
static void begin_layer(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Pass *p = w->pass;
    const int64_t r = piece, D = w->model->hidden, start = p->module < 0 ? 0 : w->model->layers + p->module;
    const int64_t end = p->module < 0 ? w->model->layers : start + 1;
    if (layer > start && w->model->layer[layer - 1].experts) gather(w, layer - 1, r);
    const float *x = w->m.x + r * w->m.xs;
    if (layer < end) {
        norm(x, w->model->layer[layer].input_norm, w->model->eps, D, w->m.h + r * w->m.hs, w->m.xs);
    } else {
        const float *last = p->module < 0 ? w->model->norm : w->model->module[p->module].norm;
        norm(x, last, w->model->eps, D, p->after + r * D, D);
    }
    (void)pieces;
}

// Both down-projections.
static void project(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Memory *m = &w->m;
    const int64_t A = l->q_a.rows, W = l->kv_a.rows, R = w->pass->rows;
    int64_t a, z;
    part_of(padded(A) + W, piece, pieces, LANES, &a, &z);
    if (a < A) product(&l->q_a, a, least(z, A), R, m->h, m->hs, 0, m->down + a, m->ds, 0, &w->room);
    int64_t b = most(a - padded(A), 0);
    if (z > padded(A))
        product(&l->kv_a, b, z - padded(A), R, m->h, m->hs, 0, m->down + padded(A) + b, m->ds, 0, &w->room);
}

// Norms of the latents; a row's own goes to its place in the cache.
static void keep_latent(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Model *model = w->model;
    const Memory *m = &w->m;
    const int64_t r = piece, C = model->latent, D = model->rope;
    const Row *row = w->pass->row + r;
    const int64_t depth = w->pass->module < 0 ? layer : 0;
    float *slot = slot_of(w->pass->cache + row->sequence, depth, C + D, row->slot);
    const float *kv = m->down + r * m->ds + padded(l->q_a.rows);
    norm(kv, l->kv_norm, model->latent_eps, C, slot, C);
    memcpy(slot + C, kv + C, (size_t)D * 4);
    rotate(slot + C, w->pass->rope + row->position * 2 * D, D, (int)model->interleaved);
    if (l->q_norm) norm(m->down + r * m->ds, l->q_norm, model->latent_eps, l->q_a.rows, m->qa + r * m->qas, m->qas);
    (void)pieces;
}

// Queries of some heads, of all rows, brought into the latent space.
static void query(const Work *w, int64_t layer, int64_t head, int64_t end) {
    const Layer *l = w->model->layer + layer;
    const Model *model = w->model;
    const Memory *m = &w->m;
    const int64_t R = w->pass->rows, H = model->heads, N = model->nope, D = model->rope, QH = N + D, C = model->latent;
    const float *q = m->down;
    int64_t qs = m->ds;
    if (l->q_norm) {
        product(&l->q_b, head * QH, end * QH, R, m->qa, m->qas, 0, m->q + head * QH, H * QH, 0, &w->room);
        q = m->q, qs = H * QH;
    }
    for (int64_t h = head; h < end; h++) {
        columns(&l->kv_b, h * (N + model->value), N, R, q + h * QH, qs, m->ql + h * m->qls, H * m->qls, &w->room);
        for (int64_t r = 0; r < R; r++) {
            float *place = m->ql + (r * H + h) * m->qls + C;
            memcpy(place, q + r * qs + h * QH + N, (size_t)D * 4);
            rotate(place, w->pass->rope + w->pass->row[r].position * 2 * D, D, (int)model->interleaved);
        }
    }
}

static void attend_block(const Work *w, int64_t layer, int64_t block, int64_t head, int64_t end) {
    const Model *model = w->model;
    const Memory *m = &w->m;
    const Pass *p = w->pass;
    const int64_t first = p->block[block], last = p->block[block + 1], depth = p->module < 0 ? layer : 0;
    attend(p->cache + p->row[first].sequence, depth, p->row, p->further, first, last, head, end - head, model->heads,
           model->latent + model->rope, model->latent, model->scale, m->ql, m->qls, m->att, m->atts, w->scores, m->pitch);
}

static void value(const Work *w, int64_t layer, int64_t head, int64_t end) {
    const Layer *l = w->model->layer + layer;
    const Model *model = w->model;
    const Memory *m = &w->m;
    for (int64_t h = head; h < end; h++) {
        int64_t row = h * (model->nope + model->value) + model->nope;
        product(&l->kv_b, row, row + model->value, w->pass->rows, m->att + h * m->atts, model->heads * m->atts, 0,
                m->values + h * model->value, m->vs, 0, &w->room);
    }
}

static void heads_of(const Work *w, int64_t piece, int64_t pieces, int64_t *head, int64_t *end) {
    share_of(w->pass, w->model->heads, piece, pieces, 1, head, end);
}

static void queries(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t head, end;
    heads_of(w, piece, pieces, &head, &end);
    query(w, layer, head, end);
}

static void values(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t head, end;
    heads_of(w, piece, pieces, &head, &end);
    value(w, layer, head, end);
}

// Pieces of heads, no more than HEADS_AT_ONCE each.
static int64_t head_pieces(const Work *w) {
    int64_t first, end;
    part_of(w->model->heads, w->pass->rank, w->pass->ranks, 1, &first, &end);
    const int64_t H = end - first;
    return most(blocks_of(H, HEADS_AT_ONCE), least(H, w->pass->threads));
}

static void contexts(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t head, end, each = head_pieces(w);
    heads_of(w, piece % each, each, &head, &end);
    attend_block(w, layer, piece / each, head, end);
    (void)pieces;
}

static void whole_heads(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t head, end;
    heads_of(w, piece, pieces, &head, &end);
    query(w, layer, head, end);
    for (int64_t b = 0; b < w->pass->blocks; b++) attend_block(w, layer, b, head, end);
    value(w, layer, head, end);
}

static void attention_out(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t a, z;
    share_of(w->pass, w->model->hidden, piece, pieces, LANES, &a, &z);
    product(&w->model->layer[layer].o, a, z, w->pass->rows, w->m.values, w->m.vs, 0, w->m.x + a, w->m.xs, 1, &w->room);
}

static void second_norm(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    norm(w->m.x + piece * w->m.xs, w->model->layer[layer].post_norm, w->model->eps, w->model->hidden,
         w->m.h + piece * w->m.hs, w->m.xs);
    (void)pieces;
}

// Activated columns a .. z - 1 of a gated MLP.
static void gated(const Work *w, const Matrix *gate, const Matrix *up, int64_t a, int64_t z, int64_t rows,
                  const int32_t *chosen, float *mid, float *ups, int64_t pitch) {
    product(gate, a, z, rows, w->m.h, w->m.hs, chosen, mid + a, pitch, 0, &w->room);
    product(up, a, z, rows, w->m.h, w->m.hs, chosen, ups + a, pitch, 0, &w->room);
    for (int64_t r = 0; r < rows; r++) activate(mid + r * pitch + a, ups + r * pitch + a, z - a);
}

// The router's logits, and the shared experts' or a dense layer's activated columns.
static void first_half(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Memory *m = &w->m;
    const int64_t R = w->pass->rows, E = l->experts ? l->router.rows : 0;
    int64_t a, z;
    if (E) {
        part_of(E, piece, pieces, 1, &a, &z);
        if (z > a) product(&l->router, a, z, R, m->h, m->hs, 0, m->logits + a, E, 0, &w->room);
    }
    if (!l->gate.rows) return;
    share_of(w->pass, l->gate.rows, piece, pieces, LANES, &a, &z);
    if (z > a) gated(w, &l->gate, &l->up, a, z, R, 0, m->mid, m->up, m->mids);
}

static void dense_out(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t a, z;
    share_of(w->pass, w->model->hidden, piece, pieces, LANES, &a, &z);
    product(&w->model->layer[layer].down, a, z, w->pass->rows, w->m.mid, w->m.mids, 0, w->m.x + a, w->m.xs, 1, &w->room);
}

static void route(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Routing *routing = &w->model->routing;
    const Memory *m = &w->m;
    const int64_t r = piece, E = routing->experts, K = routing->chosen;
    choose(routing, m->logits + r * E, w->model->layer[layer].bias, m->choice + r * 3 * E, m->index + r * K,
           m->weight + r * K);
    (void)pieces;
}

// Pairs of a row and an expert, ordered by expert.
static void group(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Memory *m = &w->m;
    const int64_t E = w->model->routing.experts, K = w->model->routing.chosen, pairs = w->pass->rows * K;
    int32_t *count = (int32_t *)m->choice;  // no longer needed
    memset(count, 0, (size_t)E * 4);
    for (int64_t i = 0; i < pairs; i++) count[m->index[i]]++;
    int64_t hits = 0;
    int32_t at = 0;
    for (int64_t e = 0; e < E; e++) {
        if (!count[e]) continue;
        m->hit[hits] = (int32_t)e, m->first[hits++] = at;
        at += count[e];
        count[e] = at - count[e];  // where the expert's next pair goes
    }
    m->first[hits] = at;
    for (int64_t i = 0; i < pairs; i++) {
        int32_t place = count[m->index[i]]++;
        m->place[i] = place, m->pair_row[place] = (int32_t)(i / K);
    }
    *m->hits = hits;
    if (w->pass->hits) *w->pass->hits += hits;
    if (w->pass->threads > 1) atomic_store(&found[layer], w->number << 32 | (uint64_t)hits);
    (void)piece, (void)pieces;
}

// Pieces of one expert's columns, so that all threads have some.
static int64_t expert_pieces(const Work *w, int64_t hits, int64_t columns) {
    if (w->pass->threads == 1) return 1;
    return most(1, least(blocks_of(columns, 64), blocks_of(3 * w->pass->threads, most(hits, 1))));
}

static void experts_in(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Memory *m = &w->m;
    int64_t each = pieces / *m->hits, hit = piece / each, first = m->first[hit], rows = m->first[hit + 1] - first, a, z;
    const Matrix *expert = l->experts + 3 * m->hit[hit];
    share_of(w->pass, expert[0].rows, piece % each, each, LANES, &a, &z);
    gated(w, expert, expert + 1, a, z, rows, m->pair_row + first, m->expert_mid + first * m->emids,
          m->expert_up + first * m->emids, m->emids);
}

static void experts_out(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Memory *m = &w->m;
    const int64_t all = *m->hits + (l->gate.rows ? 1 : 0), each = pieces / all, hit = piece / each, R = w->pass->rows;
    int64_t a, z;
    share_of(w->pass, w->model->hidden, piece % each, each, LANES, &a, &z);
    if (hit == *m->hits) {
        float *out = m->out + R * w->model->routing.chosen * m->xs + a;
        product(&l->down, a, z, R, m->mid, m->mids, 0, out, m->xs, 0, &w->room);
        return;
    }
    int64_t first = m->first[hit], rows = m->first[hit + 1] - first;
    product(l->experts + 3 * m->hit[hit] + 2, a, z, rows, m->expert_mid + first * m->emids, m->emids, 0,
            m->out + first * m->xs + a, m->xs, 0, &w->room);
}

#define DO(run, pieces) \
    if (!phase(w, run, layer, pieces)) return 0;
#define SHARE(data, rows, stride, n, unit) \
    if (!exchange(w, data, rows, stride, n, unit)) return 0;

static int feed_forward(Work *w, int64_t layer) {
    const Layer *l = w->model->layer + layer;
    const int64_t R = w->pass->rows, D = w->model->hidden;
    DO(second_norm, R)
    DO(first_half, pieces_of(w, most(l->gate.rows, l->experts ? l->router.rows : 0)))
    if (l->gate.rows) SHARE(w->m.mid, R, w->m.mids, l->gate.rows, LANES)
    if (!l->experts) {
        DO(dense_out, pieces_of(w, D))
        SHARE(w->m.x, R, w->m.xs, D, LANES)
        return 1;
    }
    DO(route, R)
    DO(group, 1)
    int64_t hits;
    if (w->pass->threads > 1) {
        uint64_t seen = atomic_load(&found[layer]);
        if (seen >> 32 != w->number) return 0;
        hits = (int64_t)(seen & 0xFFFFFFFF);
    } else {
        hits = *w->m.hits;
    }
    DO(experts_in, hits * expert_pieces(w, hits, w->model->expert_inner))
    SHARE(w->m.expert_mid, R * w->model->routing.chosen, w->m.emids, w->model->expert_inner, LANES)
    int64_t all = hits + (l->gate.rows ? 1 : 0);
    DO(experts_out, all * expert_pieces(w, all, D))
    SHARE(w->m.out, R * (w->model->routing.chosen + (l->gate.rows ? 1 : 0)), w->m.xs, D, LANES)
    return 1;
}

static void score(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Pass *p = w->pass;
    int64_t a, z;
    share_of(p, p->head.rows, piece, pieces, HEAD_UNIT, &a, &z);
    product(&p->head, a, z, p->scored, p->after, w->model->hidden, p->picked, p->logits + a, p->head.rows, 0, &w->room);
    (void)layer;
}

static int all_of(Work *w) {
    const Pass *p = w->pass;
    const int64_t R = p->rows, first = p->module < 0 ? 0 : w->model->layers + p->module;
    const int64_t end = p->module < 0 ? w->model->layers : first + 1;
    int64_t layer = first;
    DO(embed, R)
    if (p->module >= 0) DO(mix, pieces_of(w, w->model->hidden))
    for (; layer < end; layer++) {
        const Layer *l = w->model->layer + layer;
        DO(begin_layer, R)
        DO(project, pieces_of(w, padded(l->q_a.rows) + l->kv_a.rows))
        DO(keep_latent, R)
        if (R <= FUSED) {
            DO(whole_heads, head_pieces(w))
        } else {
            DO(queries, head_pieces(w))
            DO(contexts, p->blocks * head_pieces(w))
            DO(values, head_pieces(w))
        }
        // a head's values are one unit
        SHARE(w->m.values, R, w->m.vs, w->model->heads * w->model->value, w->model->value)
        DO(attention_out, pieces_of(w, w->model->hidden))
        SHARE(w->m.x, R, w->m.xs, w->model->hidden, LANES)
        if (!feed_forward(w, layer)) return 0;
    }
    DO(begin_layer, R)
    if (!p->scored) return 1;
    DO(score, w->pass->threads == 1 ? 1 : least(blocks_of(p->head.rows, HEAD_UNIT), 4 * p->threads))
    SHARE(p->logits, p->scored, p->head.rows, p->head.rows, HEAD_UNIT)
    return 1;
}

// Room for products of so many columns alone: floats, and where its parts are.
static int64_t room_for(int64_t columns) { return 2 * TILE * columns + GROUP * (columns + LANES); }

static Room room_in(float *memory, int64_t columns) {
    return (Room){.ordered = memory, .rows = memory + TILE * columns, .weights = memory + 2 * TILE * columns};
}

// Logits: the one phase of a head.
typedef struct {
    Head head;
    Room room;
} HeadWork;

static void head_piece(const HeadWork *w, int64_t piece, int64_t pieces) {
    const Head *h = &w->head;
    int64_t a, z;
    part_of(h->end - h->first, piece, pieces, HEAD_UNIT, &a, &z);
    a += h->first, z += h->first;
    product(&h->head, a, z, h->rows, h->hidden, h->head.columns, 0, h->logits + a, h->head.rows, 0, &w->room);
}

static int64_t head_pieces_of(const Head *h) {
    return h->threads == 1 ? 1 : least(blocks_of(h->end - h->first, HEAD_UNIT), 4 * h->threads);
}

static void take_head(HeadWork *w, uint64_t number, int64_t thread) {
    const int64_t columns = grouped(w->head.head.columns);
    w->room = room_in(w->head.memory + thread * room_for(columns), columns);
    int64_t pieces = head_pieces_of(&w->head), piece;
    while ((piece = take(&phases[0].taken, number, pieces)) >= 0) {
        head_piece(w, piece, pieces);
        take(&phases[0].done, number, INT64_MAX);
    }
}

// What helpers find: the pass of number `current`, or a head. Copied word by word, and counted only if the number is
// still the same afterwards.
typedef struct {
    int64_t kind;  // 0: nothing, 1: a pass, 2: a head
    Pass pass;
    Head head;
} Job;

#define WORDS (sizeof(Job) / 8)
static _Atomic uint64_t shared_job[WORDS];
static _Atomic int64_t inside, closing;

static void begin_work(Work *w, const Pass *pass, uint64_t number, int64_t thread) {
    w->pass = pass, w->model = pass->model, w->phase = 0, w->number = number;
    divide(pass->model, pass->memory_rows, pass->memory_context, pass->memory_threads, pass->memory, &w->m);
    w->room.ordered = w->m.room + thread * w->m.room_size, w->room.rows = w->room.ordered + w->m.room_rows;
    w->room.weights = w->room.rows + w->m.room_rows;
    w->scores = w->m.scores + thread * w->m.score_size;
}

// Shows a job to helpers; returns its number, which is even: while a job is written the number is odd.
static uint64_t announce(const Job *job) {
    uint64_t words[WORDS], number = (atomic_load(&current) | 1) + 1;
    memcpy(words, job, sizeof words);
    atomic_store(&current, number - 1);
    atomic_thread_fence(memory_order_seq_cst);
    for (size_t i = 0; i < WORDS; i++) atomic_store_explicit(&shared_job[i], words[i], memory_order_relaxed);
    atomic_store(&current, number);
    return number;
}

#define JOIN_(a, b, c) a##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(mtp_, LEVEL, name)

// Floats of memory that passes of a model need.
int64_t EXPORT(memory)(const Model *model, int64_t rows, int64_t context, int64_t threads) {
    Memory m;
    float *start = (float *)(intptr_t)4096;
    return ((intptr_t)divide(model, rows, context, threads, start, &m) - (intptr_t)start) / 4;
}

int64_t EXPORT(head_memory)(const Matrix *head, int64_t threads) {
    int64_t columns = grouped(head->columns);
    return threads * room_for(columns);
}

// Runs a pass, with those helpers that come; returns 0 where a rank did not answer.
int64_t EXPORT(pass)(const Pass *pass) {
    uint64_t before = plain_arithmetic();
    Job job = {.kind = 1, .pass = *pass};
    Work work;
    begin_work(&work, &job.pass, 0, 0);
    *work.m.failed = 0;
    if (pass->threads > 1) work.number = announce(&job);
    int64_t whole = all_of(&work);
    former_arithmetic(before);
    return whole;
}

void EXPORT(head)(const Head *head) {
    uint64_t before = plain_arithmetic();
    Job job = {.kind = 2, .head = *head};
    HeadWork work = {.head = *head};
    if (head->threads > 1) {
        uint64_t number = announce(&job);
        take_head(&work, number, 0);
        wait_for(0, number, head_pieces_of(head));
    } else {
        work.room = room_in(head->memory, grouped(head->head.columns));
        head_piece(&work, 0, 1);
    }
    former_arithmetic(before);
}

// Helps with passes as number `thread`, from 1 on; returns after so many looks at nothing to do.
void EXPORT(help)(int64_t thread, int64_t patience) {
    uint64_t last = 0, before = plain_arithmetic();
    for (int64_t idle = 0; idle < patience && !atomic_load(&closing);) {
        uint64_t number = atomic_load(&current), words[WORDS];
        if (number == last || number & 1) {
            idle++;
            if (idle < SPINS) pause_a_little();
            else let_others();
            continue;
        }
        atomic_fetch_add(&inside, 1);
        for (size_t i = 0; i < WORDS; i++) words[i] = atomic_load_explicit(&shared_job[i], memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load(&current) == number) {
            Job job;
            memcpy(&job, words, sizeof words);
            last = number, idle = 0;
            if (job.kind == 1 && thread < job.pass.threads) {
                Work work;
                begin_work(&work, &job.pass, number, thread);
                all_of(&work);
            } else if (job.kind == 2 && thread < job.head.threads) {
                HeadWork work = {.head = job.head};
                take_head(&work, number, thread);
            }
        }
        atomic_fetch_sub(&inside, 1);
    }
    former_arithmetic(before);
}

// Ends when no helper looks at any job's memory, which may be freed then.
void EXPORT(rest)(void) {
    Job nothing = {0};
    announce(&nothing);
    while (atomic_load(&inside)) let_others();
}

// Whether helpers are to leave.
void EXPORT(close)(int64_t value) { atomic_store(&closing, value); }

// In a child process, which has none of its parent's helpers.
void EXPORT(forked)(void) { atomic_store(&inside, 0); }

// Whether no code of an FP8 matrix is NaN, which a product would take for a number.
int64_t EXPORT(finite)(const uint8_t *codes, int64_t count) {
    int64_t i = 0;
    for (; i + 4096 <= count; i += 4096) {
        uint8_t any = 0;
        for (int64_t j = 0; j < 4096; j++) any |= (codes[i + j] & 0x7F) == 0x7F;
        if (any) return 0;
    }
    for (; i < count; i++)
        if ((codes[i] & 0x7F) == 0x7F) return 0;
    return 1;
}

// Single operations, as tests and benchmarks call them.
void EXPORT(product)(const Matrix *m, int64_t first, int64_t end, int64_t rows, const float *x, int64_t xs,
                     const int32_t *chosen, float *y, int64_t ys, int64_t add, float *memory) {
    uint64_t before = plain_arithmetic();
    Room room = room_in(memory, grouped(m->columns));
    product(m, first, end, rows, x, xs, chosen, y, ys, (int)add, &room);
    former_arithmetic(before);
}

void EXPORT(columns)(const Matrix *m, int64_t first, int64_t count, int64_t rows, const float *x, int64_t xs, float *y,
                     int64_t ys, float *memory) {
    uint64_t before = plain_arithmetic();
    Room room = {.rows = memory};
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
