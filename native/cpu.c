#include "cpu.h"

#include "bmc.h"
#include "error.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

typedef void install_fn(struct kernels *k);

/* What this library has kernels for, each level above those before it. */
struct level { const char *name; install_fn *vec, *attn, *panel; };
#define LEVEL(isa) { #isa, vec_##isa, attn_##isa, panel_##isa }

#if defined(__x86_64__)
static const struct level levels[] = { LEVEL(ref), LEVEL(avx2), LEVEL(avx512) };

static int has_f16c(void) {                     /* gcc before 11 has no __builtin_cpu_supports("f16c") */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

static int best_level(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512vnni");
    return avx512 ? 2 : 1;
}
#elif defined(__aarch64__)
static const struct level levels[] = { LEVEL(ref), LEVEL(neon), { "i8mm", vec_neon, attn_neon, panel_i8mm } };

#ifdef __linux__
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)       /* older headers lack it */
#endif

static int best_level(void) {
    int dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, i8mm = (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
    return dot + (dot && i8mm);
}
#else
static int best_level(void) {                   /* every Mac has the dot product, the first ones no i8mm */
    int i8mm = 0;
    size_t size = sizeof i8mm;
    return !sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, NULL, 0) && i8mm ? 2 : 1;
}
#endif
#else
static const struct level levels[] = { LEVEL(ref) };
static int best_level(void) { return 0; }
#endif

enum { N_LEVELS = sizeof levels / sizeof *levels };

static int find_level(const char *name) {
    for (int i = 0; i < N_LEVELS; i++)
        if (!strcmp(name, levels[i].name))
            return i;
    return -1;
}

static struct {
    pthread_once_t once;
    int best;                           /* the highest level of this CPU */
    struct kernels kernels;
    char error[160];                    /* why there are no kernels; empty: there are */
} resolved = { .once = PTHREAD_ONCE_INIT };

static void fill(struct kernels *k, int level) {
    *k = (struct kernels){ .name = levels[level].name };
    for (int i = 0; i <= level; i++)
        levels[i].vec(k), levels[i].attn(k), levels[i].panel(k);
}

static void unknown_level(const char *asked) {
    char names[64] = "";
    for (int i = 0; i < N_LEVELS; i++) {
        strcat(names, i == 0 ? "" : i < N_LEVELS - 1 ? ", " : " or ");
        strcat(names, levels[i].name);
    }
    snprintf(resolved.error, sizeof resolved.error, "PYBMC_CPU: expected %s, found \"%.40s\"", names, asked);
}

static void resolve(void) {
    const char *asked = getenv("PYBMC_CPU");
    int best = resolved.best = best_level(), level = asked && *asked ? find_level(asked) : best;
    if (level < 0)
        unknown_level(asked);
    else if (level > best)
        snprintf(resolved.error, sizeof resolved.error, "PYBMC_CPU asks for %s, this machine has %s",
                 levels[level].name, levels[best].name);
    else
        fill(&resolved.kernels, level);
}

const struct kernels *kernels_find(void) {
    pthread_once(&resolved.once, resolve);
    if (!*resolved.error)
        return &resolved.kernels;
    fail(BMC_EINVAL, "%s", resolved.error);
    return NULL;
}

const char *cpu_level(int level) {
    pthread_once(&resolved.once, resolve);
    return level >= 0 && level <= resolved.best ? levels[level].name : NULL;
}

bool kernels_at(int level, struct kernels *k) {
    if (!cpu_level(level))
        return false;
    fill(k, level);
    return true;
}
