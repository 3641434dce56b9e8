/* Kernels are resolved once for the process; a level that is named explicitly does not depend on PYBMC_CPU.
 * Prints the levels of this CPU. */
#include "check.h"
#include "cpu.h"

#include <pthread.h>
#include <string.h>

enum { THREADS = 4 };

static void *find(void *arg) {
    (void)arg;
    return (void *)(uintptr_t)kernels_find();
}

static void all_threads_find_the_same_kernels(void) {
    pthread_t threads[THREADS];
    void *found[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, find, NULL));
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], &found[i]);
    for (int i = 0; i < THREADS; i++)
        CHECK(found[i] && found[i] == kernels_find());
}

static void the_level_is_the_best_or_the_one_asked_for(void) {
    const char *asked = getenv("PYBMC_CPU");
    int best = 0;
    while (cpu_level(best + 1))
        best++;
    CHECK(!strcmp(kernels_find()->name, asked && *asked ? asked : cpu_level(best)));
}

static void levels_begin_with_the_reference(void) {
    struct kernels k;
    int level = 0;
    for (; kernels_at(level, &k); level++) {
        CHECK(!strcmp(k.name, cpu_level(level)) && k.attend && k.largest);
        printf("%s ", k.name);
    }
    printf("\n");
    CHECK(level > 0 && !strcmp(cpu_level(0), "ref"));
    CHECK(!cpu_level(level) && !cpu_level(-1) && !kernels_at(-1, &k));
}

int main(void) {
    all_threads_find_the_same_kernels();
    the_level_is_the_best_or_the_one_asked_for();
    levels_begin_with_the_reference();
    return 0;
}
