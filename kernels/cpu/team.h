// Threads that share the work of a pass by taking pieces of it.
//
// A pass is a list of phases and a phase a number of pieces. Every thread walks through the phases, takes pieces while
// there are any, and goes on when all are done. So nobody waits for a thread that the system runs elsewhere, unless it
// holds a piece: the caller does everything by itself where no helper comes. Which thread has computed a piece cannot be
// seen in the result.
//
// Counters carry the number of their pass: a helper that comes late finds them at a later pass, or full, and leaves. It
// looks at nothing else of the pass before it has got a piece.
#pragma once
#include <stdatomic.h>
#include "products.h"

#if defined(_WIN32)
__declspec(dllimport) int SwitchToThread(void);
static void let_others(void) { SwitchToThread(); }
#else
int sched_yield(void);
static void let_others(void) { sched_yield(); }
#endif

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#define MOST_PHASES 16384
#define SPINS 2000  // before a thread that waits lets others run

typedef struct {
    _Atomic uint64_t taken, done;  // number of the pass << 32 | pieces
    char apart[48];                // on a line of its own
} Phase;

static Phase phases[MOST_PHASES];
static _Atomic uint64_t current;     // number of the pass
static _Atomic uint64_t found[MOST_PHASES];  // numbers that a phase leaves to later ones, as above

// Takes one from a counter; returns -1 where there is none left, or the pass is over.
static int64_t take(_Atomic uint64_t *counter, uint64_t pass, int64_t pieces) {
    uint64_t seen = atomic_load(counter);
    for (;;) {
        uint64_t count = 0;
        if (seen >> 32 > pass) return -1;
        if (seen >> 32 == pass) count = seen & 0xFFFFFFFF;
        if ((int64_t)count >= pieces) return -1;
        if (atomic_compare_exchange_weak(counter, &seen, pass << 32 | (count + 1))) return (int64_t)count;
    }
}

// Waits until a phase is done; returns 0 where the pass is over.
static int wait_for(int64_t phase, uint64_t pass, int64_t pieces) {
    for (int64_t spins = 0;; spins++) {
        uint64_t seen = atomic_load(&phases[phase].done);
        if (seen >> 32 == pass && (int64_t)(seen & 0xFFFFFFFF) >= pieces) return 1;
        if (seen >> 32 > pass || atomic_load(&current) != pass) return 0;
        if (spins < SPINS) pause_a_little();
        else let_others();
    }
}

// Arithmetic as IEEE 754 has it by default, whatever the calling thread had set: rounding to nearest, subnormal numbers.
static uint64_t plain_arithmetic(void) {
#if defined(__x86_64__)
    uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1F80);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(before));
    __asm__ __volatile__("msr fpcr, %0" ::"r"((uint64_t)0));
    return before;
#else
    return 0;
#endif
}

static void former_arithmetic(uint64_t before) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((uint32_t)before);
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" ::"r"(before));
#endif
}
