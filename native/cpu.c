#include "cpu.h"

#include "bmc.h"
#include "error.h"

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
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
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") ? 2 : 1;
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
        snprintf(resolved.error, sizeof resolved.error, "PYBMC_CPU asks for %s, this machine has %s", levels[level].name,
                 levels[best].name);
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

#ifdef __linux__
static int allowed_cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

/* The first line of a file, as far as it fits; false if there is none. */
static bool first_line(char *text, int size, const char *folder, const char *name) {
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    bool found = f && fgets(text, size, f);
    if (f)
        fclose(f);
    return found;
}

/* What one group grants: cgroup v2 says "max 100000" or "150000 100000", v1 has a file for each number, in which
 * -1 is no limit. */
static double group_quota(const char *folder) {
    char text[64], period_text[64];
    double quota = 0, period = 0;
    if (first_line(text, sizeof text, folder, "cpu.max"))
        sscanf(text, "%lf %lf", &quota, &period);
    else if (first_line(text, sizeof text, folder, "cpu.cfs_quota_us") &&
             first_line(period_text, sizeof period_text, folder, "cpu.cfs_period_us")) {
        sscanf(text, "%lf", &quota);
        sscanf(period_text, "%lf", &period);
    }
    return quota > 0 && period > 0 ? quota / period : HUGE_VAL;
}

/* The least quota of a group and those above it. In a container the path may be the host's: then only the root is
 * there. */
static double path_quota(const char *mount, const char *hierarchy, const char *path) {
    char folder[PATH_MAX];
    int root = snprintf(folder, sizeof folder, "%s%s", mount, hierarchy);
    if (root < 0 || root + strlen(path) >= sizeof folder)
        return HUGE_VAL;
    strcat(folder, path);
    double least = group_quota(folder);
    for (char *slash; (slash = strrchr(folder + root, '/')); least = fmin(least, group_quota(folder)))
        *slash = 0;
    return least;
}

static bool lists(const char *controllers, const char *name) {
    const char *at = strstr(controllers, name);
    size_t n = strlen(name);
    return at && (at == controllers || at[-1] == ',') && (!at[n] || at[n] == ',');
}

/* Of a line "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1). */
static double line_quota(char *line, const char *mount) {
    static const char *const v1[] = { "/cpu", "/cpu,cpuacct", "/cpuacct,cpu", NULL };
    static const char *const v2[] = { "", "/unified", NULL };
    char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
    double least = HUGE_VAL;
    if (!path)
        return least;
    controllers++;
    *path++ = 0;
    path[strcspn(path, "\n")] = 0;
    if (!*controllers || lists(controllers, "cpu"))
        for (const char *const *h = *controllers ? v1 : v2; *h; h++)
            least = fmin(least, path_quota(mount, *h, path));
    return least;
}

double cpu_quota(const char *groups, const char *mount) {
    char line[PATH_MAX], roots[][8] = { "0::/", "1:cpu:/" };
    double least = fmin(line_quota(roots[0], mount), line_quota(roots[1], mount));
    FILE *f = fopen(groups, "r");
    while (f && fgets(line, sizeof line, f))
        least = fmin(least, line_quota(line, mount));
    if (f)
        fclose(f);
    return least;
}

/* The same as whole cores. */
static int quota(void) {
    double cores = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    return cores < 1 << 20 ? (int)ceil(cores - 1e-3) : 1 << 20;
}
#else
static int allowed_cores(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
static int quota(void) { return 1 << 20; }
double cpu_quota(const char *groups, const char *mount) { return (void)groups, (void)mount, HUGE_VAL; }
#endif

int cpu_count(void) {
    int n = allowed_cores(), q = quota();
    n = n < q ? n : q;
    return n > 0 ? n : 1;
}
