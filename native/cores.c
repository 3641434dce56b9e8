#include "cores.h"

#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

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

/* The quota of one group: cgroup v2 says "max 100000" or "150000 100000", v1 has a file for each number,
 * in which -1 is no limit. */
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

/* The least quota of a group and those above it. In a container the path may be the host's: then
 * only the root is there. */
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
