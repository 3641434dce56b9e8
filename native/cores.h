/* How many cores this process may use. */
#ifndef CORES_H
#define CORES_H

int cpu_count(void);        /* affinity and cgroup quota, at least 1 */

/* CPU quota of a process in cores: the least on the way from its own group to the
 * root, or infinity. groups is the path of /proc/self/cgroup, mount where the groups are mounted. */
double cpu_quota(const char *groups, const char *mount);

#endif
