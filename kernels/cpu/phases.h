// The phases of a pass, in the order in which they run; each is a number of pieces that any thread may compute.
#pragma once
#include "pass.h"

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

// Whether only some rows go on after this layer's latents.
static int narrows(const Pass *p, int64_t layer) {
    return p->kept && layer == (p->module < 0 ? p->model->layers - 1 : p->model->layers + p->module);
}

// Both down-projections, that of the queries of the rows that go on.
static void project(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Layer *l = w->model->layer + layer;
    const Memory *m = &w->m;
    const int64_t A = l->q_a.rows, W = l->kv_a.rows, R = w->pass->rows;
    const int some = narrows(w->pass, layer);
    int64_t a, z;
    part_of(padded(A) + W, piece, pieces, LANES, &a, &z);
    if (a < A)
        product(&l->q_a, a, least(z, A), some ? w->pass->kept_rows : R, m->h, m->hs, some ? w->pass->kept : 0, m->down + a,
                m->ds, 0, &w->room);
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
    if (l->q_norm && (r < w->pass->kept_rows || !narrows(w->pass, layer)))
        norm(m->down + r * m->ds, l->q_norm, model->latent_eps, l->q_a.rows, m->qa + r * m->qas, m->qas);
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

// Brings the kept rows together.
static void narrow(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    const Pass *p = w->pass;
    for (int64_t i = 0; i < p->kept_rows; i++)  // none is overwritten before it is moved: kept[i] >= i
        memmove(w->m.x + i * w->m.xs, w->m.x + p->kept[i] * w->m.xs, (size_t)w->m.xs * 4);
    (void)layer, (void)piece, (void)pieces;
}

static void attend_block(const Work *w, int64_t layer, int64_t block, int64_t head, int64_t end) {
    const Model *model = w->model;
    const Memory *m = &w->m;
    const Pass *p = w->pass;
    const int64_t last = p->block[block + 1], depth = p->module < 0 ? layer : 0;
    for (int64_t first = p->block[block]; first < last; first += m->at_once)
        attend(p->cache + p->row[first].sequence, depth, p->row, p->further, first, least(first + m->at_once, last), head,
               end - head, model->heads, model->latent + model->rope, model->latent, model->scale, m->ql, m->qls, m->att,
               m->atts, w->scores, m->pitch);
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

// The same of a block of rows: where there are many, threads share these alone.
static int64_t block_pieces(const Work *w) {
    const int64_t all = head_pieces(w), H = blocks_of(w->model->heads, w->pass->ranks);
    return w->pass->blocks >= 8 * w->pass->threads ? least(all, blocks_of(H, HEADS_AT_ONCE)) : all;
}

static void contexts(const Work *w, int64_t layer, int64_t piece, int64_t pieces) {
    int64_t head, end, each = block_pieces(w);
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
    const int64_t first = p->module < 0 ? 0 : w->model->layers + p->module;
    const int64_t end = p->module < 0 ? w->model->layers : first + 1;
    int64_t layer = first, R = p->rows;
    DO(embed, R)
    if (p->module >= 0) DO(mix, pieces_of(w, w->model->hidden))
    for (; layer < end; layer++) {
        const Layer *l = w->model->layer + layer;
        DO(begin_layer, R)
        DO(project, pieces_of(w, padded(l->q_a.rows) + l->kv_a.rows))
        DO(keep_latent, R)
        if (narrows(p, layer)) {
            R = p->kept_rows;
            if (!R) return 1;
            DO(narrow, 1)
            w->few = narrowed(p);
            w->pass = p = &w->few;
        }
        if (R <= FUSED) {
            DO(whole_heads, head_pieces(w))
        } else {
            DO(queries, head_pieces(w))
            DO(contexts, p->blocks * block_pieces(w))
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
