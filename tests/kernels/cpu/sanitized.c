// The CPU engine without Python: products, attention, single operations, passes by several threads.
//
// For compilers' sanitizers (test_sanitized.py) and emulated processors (test_emulated.py). Every array has exactly
// the size that it is said to have. Prints a sum of all results' bits, which no compiler changes; "to=FILE" among the
// arguments has the results of the parts named after it written there. NaN is one number here: its sign and its further
// bits are a processor's own affair.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

// What a thread does while another one is writing a job for it: this runs between two words of the job.
static void (*between_words)(void);
static _Atomic int words_left = -1;
#undef atomic_store
#undef atomic_store_explicit
#if defined(__clang__)
#define PUT(p, v, order) __c11_atomic_store(p, v, order)
#else
#define PUT(p, v, order) __atomic_store_n(p, v, order)
#endif
// The caller waits a little after it has told of a job, so that helpers get first pieces too.
static void wait_a_little(void) {
    for (volatile int i = 0; i < 3000; i++) {}
}
#define atomic_store(p, v) (PUT(p, v, __ATOMIC_SEQ_CST), wait_a_little())
#define atomic_store_explicit(p, v, order)                                     \
    do {                                                                       \
        PUT(p, v, __ATOMIC_RELAXED);                                           \
        if (words_left >= 0 && words_left-- == 0) between_words();             \
    } while (0)
#include "engine.c"

#define CALL_(level, name) mtp_##level##_##name
#define CALL2(level, name) CALL_(level, name)
#define CALL(name) CALL2(LEVEL, name)
#define CHECK(what) \
    if (!(what)) printf("wrong: %s\n", #what), exit(1);

static uint64_t state = 1, sum;
static FILE *results;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static void count_in(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        if (x[i] != x[i]) bits = 0x7FC00000;
        sum = sum * 31 + bits;
        if (results) CHECK(fwrite(&bits, 4, 1, results) == 1)
    }
}

static float number(float size) { return ((float)(random_bits() % 2001) - 1000.0f) / 1000.0f * size; }

static float *numbers(int64_t n, float size) {
    float *x = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = number(size);
    return x;
}

static float *ones(int64_t n) {
    float *x = numbers(n, 0.1f);
    for (int64_t i = 0; i < n; i++) x[i] += 1.0f;
    return x;
}

static Matrix matrix(int64_t kind, int64_t rows, int64_t columns) {
    const int64_t block = 32, scales = blocks_of(rows, block) * blocks_of(columns, block);
    Matrix m = {.kind = kind, .rows = rows, .columns = columns, .block_rows = block, .block_columns = block};
    uint8_t *data = malloc((size_t)(rows * columns * ITEM[kind]));
    float *values = numbers(rows * columns, 1.0f / __builtin_sqrtf((float)columns));
    for (int64_t i = 0; i < rows * columns; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        if (kind == F32) memcpy(data + 4 * i, &bits, 4);
        else if (kind == BF16) data[2 * i] = (uint8_t)(bits >> 16), data[2 * i + 1] = (uint8_t)(bits >> 24);
        else if (kind == F16) {
            uint16_t half = (uint16_t)((bits >> 16 & 0x8000) | 0x2800 | (bits & 0x07FF));
            memcpy(data + 2 * i, &half, 2);
        } else data[i] = (uint8_t)(bits >> 24 & 0x80) | (uint8_t)(random_bits() % 0x50);
    }
    free(values);
    m.data = (const char *)data;
    if (kind == FP8) {
        m.scale = numbers(scales, 1.0f);
        for (int64_t i = 0; i < scales; i++) ((float *)m.scale)[i] = 0.1f + m.scale[i] * 0.01f;
    }
    return m;
}

static void discard(Matrix m) { free((void *)m.data), free((void *)m.scale); }

// Every code of a kind, as products see it in each of their lanes and as sums over rows do.
static void codes(void) {
    const int64_t counts[] = {256, 65536, 0, 65536}, K = 64, kinds[] = {FP8, BF16, F16};
    for (int i = 0; i < 3; i++) {
        const int64_t kind = kinds[i], count = counts[kind];
        float one = 1, own[16], *out = malloc((size_t)count * 4), scales[1024];
        uint8_t *data = malloc((size_t)(count * ITEM[kind]));
        for (int64_t c = 0; c < count; c++) {
            uint16_t code = (uint16_t)c;
            memcpy(data + c * ITEM[kind], &code, (size_t)ITEM[kind]);
        }
        for (int64_t c = 0; c < 1024; c++) scales[c] = 1;
        Matrix m = {kind, 1, count, 64, 64, (const char *)data, scales};
        CALL(columns)(&m, 0, 1, 1, &one, 1, out, count, own);
        count_in(out, count);
        m.rows = count / K, m.columns = K;
        float *room = malloc((size_t)CALL(head_memory)(&m, 1) * 4), x[64];
        for (int64_t turn = 0; turn < K; turn++) {
            // by one column alone no code hides another; only rows that hold infinity or NaN are NaN as a whole
            for (int64_t k = 0; k < K; k++) x[k] = k == turn ? 1.0f : 0.0f;
            CALL(product)(&m, 0, m.rows, 1, x, K, 0, out, m.rows, 0, room);
            count_in(out, m.rows);
        }
        free(out), free(data), free(room);
    }
}

// Of any size, subnormal, infinite and NaN where `any`; else of sizes whose squares and products can be subnormal.
static float wild(int any) {
    uint32_t bits = random_bits() * 2 + random_bits() % 2;
    float x;
    if (!any) bits = (bits & 0x807FFFFF) | (127 - 70 + random_bits() % 100) << 23;
    memcpy(&x, &bits, 4);
    return x;
}

static void operations(void) {
    const int64_t sizes[] = {1, 2, 16, 17, 384, 500};
    for (int any = 0; any < 2; any++)
        for (int turn = 0; turn < 120; turn++) {
            const int64_t n = sizes[turn % 6];
            const float eps = 1e-6f, size = turn % 3 ? 1.0f : 80.0f;
            float *x = malloc((size_t)n * 4), *y = malloc((size_t)n * 4), *out = malloc((size_t)n * 4);
            float *table = numbers(2 * n, 1);
            for (int64_t i = 0; i < n; i++) x[i] = wild(any && turn % 2), y[i] = wild(0);
            CALL(norm)(x, y, &eps, n, out), count_in(out, n);
            if (n % 2 == 0) CALL(rotate)(x, table, n, turn / 6 % 2), count_in(x, n);
            for (int64_t i = 0; i < n; i++) x[i] = any ? wild(1) : number(size);
            CALL(activate)(x, y, n), count_in(x, n);
            Matrix m = matrix(F32, 3, n);
            for (int64_t i = 0; i < 3 * n; i++) ((float *)m.data)[i] = wild(0);
            float *room = malloc((size_t)CALL(head_memory)(&m, 1) * 4), three[3];
            CALL(product)(&m, 0, 3, 1, y, n, 0, three, 3, 0, room), count_in(three, 3);
            free(x), free(y), free(out), free(table), free(room), discard(m);
        }
    for (int turn = 0; turn < 200; turn++) {
        enum { MOST = 32, PICKED = 6 };
        Routing routing = {MOST, PICKED, 8, 3, turn % 2, turn % 3, turn / 2 % 2, 2.5f};
        float *logits = numbers(MOST, turn % 5 ? 2.0f : 60.0f), *bias = turn % 4 ? numbers(MOST, 0.3f) : 0;
        float room[3 * MOST], weight[PICKED];
        int32_t index[PICKED];
        CALL(choose)(&routing, logits, bias, room, index, weight), count_in(weight, PICKED);
        for (int i = 0; i < PICKED; i++) room[i] = (float)index[i];
        count_in(room, PICKED), free(logits), free(bias);
    }
}

static void products(void) {
    const int64_t sizes[] = {1, 15, 16, 17, 63, 64, 65, 130}, rows[] = {1, 2, 3, 4, 5, 11, 12, 13, 65};
    for (int64_t kind = 0; kind < 4; kind++)
        for (int n = 0; n < 8; n++)
            for (int k = 0; k < 8; k++) {
                const int64_t R = rows[(n + k) % 9], N = sizes[n], K = sizes[k], first = N / 3;
                Matrix m = matrix(kind, N, K);
                float *x = numbers(R * K, 1), *y = numbers(R * (N - first), 1);
                float *room = malloc((size_t)CALL(head_memory)(&m, 1) * 4);
                int32_t *chosen = malloc((size_t)R * 4);
                for (int64_t r = 0; r < R; r++) chosen[r] = (int32_t)(random_bits() % (uint32_t)R);
                CALL(product)(&m, first, N, R, x, K, k % 2 ? chosen : 0, y, N - first, n % 2, room);
                count_in(y, R * (N - first));
                float *across = numbers(R * N, 1), *up = malloc((size_t)(R * K) * 4);
                float *own = malloc((size_t)room_for(N) * 4);
                CALL(columns)(&m, first, N - first, R, across, N, up, K, own);
                count_in(up, R * K);
                float *factors = numbers(R * blocks_of(K, PIECE), 1), *sums = malloc((size_t)(R * N) * 4);
                Matrix left = {.kind = F32, .rows = R, .columns = K, .data = (const char *)x, .scale = factors};
                CALL(ordered_products)(&left, &m, 1, sums), count_in(sums, R * N);
                CALL(ordered_totals)(x, R, K, sums), count_in(sums, R);
                free(x), free(y), free(room), free(chosen), free(across), free(up), free(own), discard(m);
                free(factors), free(sums);
            }
}

static void attention(void) {
    enum { T = 150, W = 21, V = 17, HEADS = 9, ROWS = 7 };
    float *memory = numbers(192 * W, 1), *q = numbers(ROWS * HEADS * padded(W), 1), scale = 0.3f;
    float *out = malloc(ROWS * HEADS * padded(V) * 4), *scores = malloc(AT_ONCE * HEADS_AT_ONCE * 160 * 4);
    int64_t pages[] = {64, 128, 0}, layers[] = {(int64_t)(intptr_t)memory}, further[] = {149, 140, 145};
    Cache cache = {layers, pages};
    Row rows[ROWS];
    for (int64_t r = 0; r < ROWS; r++) rows[r] = (Row){0, 0, 0, 140 - 20 * r, r % 4, 0};
    rows[6].run = 0;
    CALL(attend)(&cache, 0, rows, further, ROWS, HEADS, W, V, &scale, q, out, scores, 160);
    for (int64_t i = 0; i < ROWS * HEADS; i++) count_in(out + i * padded(V), V);
    free(memory), free(q), free(out), free(scores);
}

enum { D = 40, HEADS = 5, LATENT = 20, ROPE = 8, NOPE = 12, VALUE = 10, RANK = 24, E = 8, CHOSEN = 3, INNER = 24, DENSE = 50 };
enum { VOCAB = 300, MOST_ROWS = 20, CONTEXT = 80, MOST_THREADS = 3 };

static Layer layer(int64_t kind, int dense) {
    Layer l = {
        .q_a = matrix(kind, RANK, D), .kv_a = matrix(kind, LATENT + ROPE, D), .q_b = matrix(kind, HEADS * (NOPE + ROPE), RANK),
        .kv_b = matrix(kind, HEADS * (NOPE + VALUE), LATENT), .o = matrix(kind, D, HEADS * VALUE),
        .input_norm = ones(D), .post_norm = ones(D), .q_norm = ones(RANK), .kv_norm = ones(LATENT),
        .gate = matrix(kind, dense ? DENSE : INNER, D), .up = matrix(kind, dense ? DENSE : INNER, D),
        .down = matrix(kind, D, dense ? DENSE : INNER),
    };
    if (dense) return l;
    l.router = matrix(F32, E, D), l.bias = numbers(E, 0.2f);
    Matrix *experts = malloc(3 * E * sizeof(Matrix));
    for (int64_t e = 0; e < 3 * E; e++) experts[e] = e % 3 == 2 ? matrix(kind, D, INNER) : matrix(kind, INNER, D);
    l.experts = experts;
    return l;
}

static Model *model(int64_t kind) {
    Model *m = malloc(sizeof *m);
    Layer *layers = malloc(2 * sizeof *layers);
    layers[0] = layer(kind, 1), layers[1] = layer(kind, 0);
    *m = (Model){
        .hidden = D, .heads = HEADS, .latent = LATENT, .rope = ROPE, .nope = NOPE, .value = VALUE, .q_rank = RANK,
        .layers = 2, .inner = DENSE, .expert_inner = INNER, .interleaved = 1, .eps = 1e-6f, .latent_eps = 1e-6f,
        .scale = 0.2f, .routing = {E, CHOSEN, 4, 2, SIGMOID, GROUP_TWO, 1, 1.5f}, .embedding = matrix(BF16, VOCAB, D),
        .norm = ones(D), .layer = layers,
    };
    return m;
}

static void forget(Model *m) {
    for (int i = 0; i < 2; i++) {
        Layer l = m->layer[i];
        discard(l.q_a), discard(l.kv_a), discard(l.q_b), discard(l.kv_b), discard(l.o), discard(l.gate), discard(l.up);
        discard(l.down), discard(l.router);
        for (int e = 0; l.experts && e < 3 * E; e++) discard(l.experts[e]);
        free((void *)l.experts), free((void *)l.input_norm), free((void *)l.post_norm), free((void *)l.q_norm);
        free((void *)l.kv_norm), free((void *)l.bias);
    }
    discard(m->embedding), free((void *)m->norm), free((void *)m->layer), free(m);
}

// A pass over an empty cache, then its logits if they have a place; what belongs to one call is freed after it, as the
// caller does. skip: 0 for hidden states of all rows, n for those of each n-th row.
static void run(const Model *m, int64_t rows, int64_t threads, float *memory, float *after, float *logits, int64_t skip) {
    int64_t *ids = malloc((size_t)rows * 8), *block = malloc((size_t)(rows + 1) * 8), *pages = malloc(16), blocks = 0;
    float *cached[2], *table = numbers(CONTEXT * 2 * ROPE, 1);
    int64_t *layers = malloc(16), *further = malloc((size_t)rows * 8);
    for (int i = 0; i < 2; i++) cached[i] = malloc(128 * (LATENT + ROPE) * 4), layers[i] = (int64_t)(intptr_t)cached[i];
    pages[0] = 64, pages[1] = 0;
    Row *row = malloc((size_t)rows * sizeof(Row));
    for (int64_t r = 0; r < rows; r++) {
        ids[r] = (r * 37) % VOCAB, further[r] = r;
        row[r] = r < rows / 2 ? (Row){0, r, r, r + 1, 0, 0} : (Row){0, rows / 2, r, rows / 2, 1, r};
        if (r % AT_ONCE == 0) block[blocks++] = r;
    }
    block[blocks] = rows;
    const int64_t few = skip ? rows / skip : 0;
    Row *kept_row = malloc((size_t)(few + 1) * sizeof(Row));
    int32_t *kept = malloc((size_t)(few + 1) * 4);
    int64_t *kept_block = malloc((size_t)(few + 1) * 8), kept_blocks = 0;
    for (int64_t i = 0; i < few; i++) {
        kept[i] = (int32_t)((i + 1) * skip - 1), kept_row[i] = row[kept[i]];
        if (i % AT_ONCE == 0) kept_block[kept_blocks++] = i;
    }
    kept_block[kept_blocks] = few;
    Cache *cache = malloc(sizeof(Cache));
    *cache = (Cache){layers, pages};
    Pass *pass = malloc(sizeof *pass);
    *pass = (Pass){
        .model = m, .module = -1, .rows = rows, .threads = threads, .blocks = blocks, .ids = ids, .further = further,
        .block = block, .row = row, .cache = cache, .rope = table, .after = after, .memory = memory,
        .memory_rows = MOST_ROWS, .memory_context = CONTEXT, .memory_threads = MOST_THREADS, .rank = 0, .ranks = 1,
        .kept = skip ? kept : 0, .kept_rows = few, .kept_row = kept_row, .kept_block = kept_block,
        .kept_blocks = kept_blocks,
    };
    CALL(pass)(pass);
    if (logits) {
        float *room = malloc((size_t)CALL(head_memory)(&m->embedding, MOST_THREADS) * 4);
        Head given = {.head = m->embedding, .hidden = after, .logits = logits, .rows = rows, .threads = threads,
                      .first = 0, .end = VOCAB, .memory = room};
        CALL(head)(&given);
        if (threads > 1) CALL(rest)();
        free(room);
    }
    free(ids), free(block), free(pages), free(cached[0]), free(cached[1]), free(table), free(layers), free(further);
    free(row), free(cache), free(pass), free(kept_row), free(kept), free(kept_block);
}

static void *helper(void *number) {
    while (!atomic_load(&closing)) CALL(help)((int64_t)(intptr_t)number, 3000);
    return 0;
}

static void passes(int by_threads) {
    const int64_t counts[] = {1, 3, 16, 20};
    for (int64_t kind = 0; kind < 4; kind++) {
        Model *m = model(kind);
        float *memory = calloc((size_t)CALL(memory)(m, MOST_ROWS, CONTEXT, MOST_THREADS), 4);
        float *after = malloc(MOST_ROWS * D * 4), *logits = malloc(MOST_ROWS * VOCAB * 4), *again = malloc(MOST_ROWS * D * 4);
        float *others = malloc(MOST_ROWS * VOCAB * 4);
        pthread_t helpers[2];
        atomic_store(&closing, 0);
        for (int64_t i = 0; by_threads && i < 2; i++) pthread_create(helpers + i, 0, helper, (void *)(intptr_t)(i + 1));
        for (int c = 0; c < 4; c++) {
            uint64_t start = state;
            run(m, counts[c], 1, memory, after, logits, 0);
            count_in(after, counts[c] * D), count_in(logits, counts[c] * VOCAB);
            for (int i = 0; by_threads && i < 5; i++) {
                state = start;
                run(m, counts[c], 2 + i % 2, memory, again, others, 0);
                CHECK(!memcmp(after, again, (size_t)(counts[c] * D) * 4))
                CHECK(!memcmp(logits, others, (size_t)(counts[c] * VOCAB) * 4))
            }
            for (int64_t skip = 1; skip <= 21; skip += 4) {  // from all rows to none
                uint64_t end = state;
                state = start;
                run(m, counts[c], by_threads ? 3 : 1, memory, again, 0, skip);
                state = end;
                for (int64_t i = 0; i < counts[c] / skip; i++)
                    CHECK(!memcmp(after + ((i + 1) * skip - 1) * D, again + i * D, D * 4))
            }
        }
        CALL(close)(1);
        for (int i = 0; by_threads && i < 2; i++) pthread_join(helpers[i], 0);
        CALL(rest)();
        free(memory), free(after), free(logits), free(again), free(others), forget(m);
    }
}

static void look(void) { CALL(help)(1, 50); }

// A helper that comes when all is done finds what belongs to the call freed.
static void late(void) {
    Model *m = model(BF16);
    float *memory = calloc((size_t)CALL(memory)(m, MOST_ROWS, CONTEXT, MOST_THREADS), 4), after[3 * D];
    run(m, 3, 2, memory, after, 0, 0);
    look();
    forget(m), free(memory);
}

static void late_for_a_head(void) {
    Matrix head = matrix(BF16, VOCAB, D);
    float *hidden = numbers(D, 1), *logits = malloc(VOCAB * 4), *room = malloc((size_t)CALL(head_memory)(&head, 2) * 4);
    Head given = {.head = head, .hidden = hidden, .logits = logits, .rows = 1, .threads = 2, .first = 0, .end = VOCAB,
                  .memory = room};
    CALL(head)(&given);
    free(hidden), free(logits);
    look();
    discard(head), free(room);
}

// A helper that looks for work while the next job is written must not take half of it for the job before.
static void torn(void) {
    Model *m = model(BF16);
    float *memory = calloc((size_t)CALL(memory)(m, MOST_ROWS, CONTEXT, MOST_THREADS), 4), after[3 * D], again[3 * D];
    uint64_t start = state;
    run(m, 3, 1, memory, after, 0, 0);
    for (int word = 0; word < (int)WORDS; word++) {
        state = start;
        Job nothing = {0};
        announce(&nothing);
        between_words = look, words_left = word;
        run(m, 3, 2, memory, again, 0, 0);
        words_left = -1;
        CHECK(!memcmp(after, again, sizeof after))
        uint64_t number = atomic_load(&current);
        for (int i = 0; i < 64; i++) {  // nobody has done anything under the number of the job before
            CHECK((atomic_load(&phases[i].taken) >> 32) != number - 2)
        }
    }
    forget(m), free(memory);
}

int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        if (!strncmp(names[i], "to=", 3)) {
            if (results) fclose(results);
            CHECK(results = fopen(names[i] + 3, "wb"))
        } else if (!strcmp(names[i], "products")) products();
        else if (!strcmp(names[i], "codes")) codes();
        else if (!strcmp(names[i], "operations")) operations();
        else if (!strcmp(names[i], "attention")) attention();
        else if (!strcmp(names[i], "pass")) passes(0);
        else if (!strcmp(names[i], "threads")) passes(1);
        else if (!strcmp(names[i], "late")) late();
        else if (!strcmp(names[i], "late_for_a_head")) late_for_a_head();
        else if (!strcmp(names[i], "torn")) torn();
        else return 2;
    }
    if (results) CHECK(!fclose(results))
    printf("%016llx\n", (unsigned long long)sum);
    return 0;
}
