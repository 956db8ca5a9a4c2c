// The engine: a pass of the model, or of one of its multi-token-prediction modules, as one call, and threads that help.
#include "operations.h"
#include "phases.h"
#include "sampling.h"

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
    const int64_t columns = w->head.head.columns;
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
    w->room = room_in(w->m.room + thread * w->m.room_size, w->m.widest);
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

// Floats of memory that passes of a model need.
int64_t EXPORT(memory)(const Model *model, int64_t rows, int64_t context, int64_t threads) {
    Memory m;
    float *start = (float *)(intptr_t)4096;
    return ((intptr_t)divide(model, rows, context, threads, start, &m) - (intptr_t)start) / 4;
}

int64_t EXPORT(head_memory)(const Matrix *head, int64_t threads) {
    return threads * room_for(head->columns);
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
        work.room = room_in(head->memory, head->head.columns);
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
