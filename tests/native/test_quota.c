/* The quota of control groups: each group on the way to the root counts, in both versions' files, and what
 * is not there does not. */
#include "check.h"
#include "cores.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#ifdef __linux__

static char top[64];

/* Writes a file below `top`, and the folders on its way. */
static void put(const char *path, const char *text) {
    char whole[256];
    snprintf(whole, sizeof whole, "%s/%s", top, path);
    for (char *slash = whole + strlen(top) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = 0;
        mkdir(whole, 0700);
    }
    FILE *f = fopen(whole, "w");
    CHECK(f && fputs(text, f) >= 0 && !fclose(f));
}

static double quota(const char *groups) {
    char path[128], mount[128];
    put("groups", groups);
    snprintf(path, sizeof path, "%s/groups", top);
    snprintf(mount, sizeof mount, "%s/mount", top);
    return cpu_quota(path, mount);
}

int main(void) {
    strcpy(top, "/tmp/test_cpu_XXXXXX");
    CHECK(mkdtemp(top));
    CHECK(cpu_quota("/no/such/file", "/no/such/folder") == HUGE_VAL);

    put("mount/a/b/cpu.max", "max 100000\n");
    CHECK(quota("0::/a/b\n") == HUGE_VAL);
    put("mount/a/cpu.max", "250000 100000\n");
    CHECK(quota("0::/a/b\n") == 2.5);                   /* a group above */
    put("mount/a/b/cpu.max", "50000 100000\n");
    CHECK(quota("0::/a/b\n") == 0.5);                   /* its own is less */
    CHECK(quota("0::/a\n") == 2.5 && quota("0::/\n") == HUGE_VAL);
    CHECK(quota("0::/elsewhere/c\n") == HUGE_VAL && quota("0::/a/elsewhere\n") == 2.5);
    put("mount/cpu.max", "100000 100000\n");
    /* The root of what is mounted always counts. */
    CHECK(quota("0::/elsewhere\n") == 1 && quota("") == 1);
    put("mount/cpu.max", "max 100000\n");

    put("mount/cpu,cpuacct/s/cpu.cfs_quota_us", "-1\n");
    put("mount/cpu,cpuacct/s/cpu.cfs_period_us", "100000\n");
    CHECK(quota("4:cpu,cpuacct:/s/t\n") == HUGE_VAL);
    put("mount/cpu,cpuacct/s/cpu.cfs_quota_us", "30000\n");
    put("mount/cpu,cpuacct/s/cpu.cfs_period_us", "20000\n");        /* not every period is 100000 */
    CHECK(quota("5:memory:/x\n4:cpu,cpuacct:/s/t\n0::/a\n") == 1.5);
    CHECK(quota("4:cpuset:/s\n3:cpuacct:/s\n2:name=cpu:/s\n") == HUGE_VAL);
    put("mount/cpu/cpu.cfs_quota_us", "100000\n");
    put("mount/cpu/cpu.cfs_period_us", "100000\n");
    CHECK(quota("4:cpu,cpuacct:/host/path\n") == 1);
    put("mount/cpu/cpu.cfs_quota_us", "junk");
    CHECK(quota("nonsense\n4:cpu\n\n") == HUGE_VAL);

    char command[128];
    snprintf(command, sizeof command, "rm -r %s", top);
    CHECK(!system(command));
    return 0;
}
#else
int main(void) { return 0; }
#endif
