#include "cpu.h"

#include "bmc.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

enum { REF, AVX2, AVX512, N_LEVELS };
static const char *const level_names[N_LEVELS] = { "ref", "avx2", "avx512" };

#ifdef __x86_64__
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

static int best_level(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return REF;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") ? AVX512 : AVX2;
}
#else
static int best_level(void) { return REF; }
#endif

static int find_level(const char *name) {
    for (int i = 0; i < N_LEVELS; i++)
        if (!strcmp(name, level_names[i]))
            return i;
    return -1;
}

int kernels_init(struct kernels *k) {
    const char *asked = getenv("PYBMC_CPU");
    int best = best_level(), level = asked && *asked ? find_level(asked) : best;
    if (level < 0)
        return fail(BMC_EINVAL, "PYBMC_CPU: expected ref, avx2 or avx512, found \"%.40s\"", asked);
    if (level > best)
        return fail(BMC_EINVAL, "PYBMC_CPU asks for %s, this machine has %s", level_names[level], level_names[best]);
    *k = (struct kernels){ .name = level_names[level] };
    vec_ref(k), attn_ref(k), panel_ref(k);
#ifdef __x86_64__
    if (level >= AVX2)
        vec_avx2(k), attn_avx2(k), panel_avx2(k);
    if (level >= AVX512)
        vec_avx512(k), attn_avx512(k), panel_avx512(k);
#endif
    return BMC_OK;
}

#ifdef __linux__
static int allowed_cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

/* Cores' worth of time the cgroup grants, rounded up; a large number when it sets no limit. */
static int quota(void) {
    double granted = 1e6, period;
    char text[64] = "";
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");                  /* v2: "max 100000" or "150000 100000" */
    if (f) {
        if (fgets(text, sizeof text, f) && sscanf(text, "%lf %lf", &granted, &period) == 2 && period > 0)
            granted /= period;
        fclose(f);
    } else if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r"))) {
        if (fscanf(f, "%lf", &granted) != 1 || granted <= 0)
            granted = 1e6;
        else
            granted /= 100000;
        fclose(f);
    }
    return granted >= 1e6 ? 1 << 20 : (int)(granted + 0.999);
}
#else
static int allowed_cores(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
static int quota(void) { return 1 << 20; }
#endif

int cpu_count(void) {
    int n = allowed_cores(), q = quota();
    n = n < q ? n : q;
    return n > 0 ? n : 1;
}
