#include "profile.h"

#include "error.h"
#include "model.h"

#include <stdlib.h>

static const char *const names[BMC_STEPS] = {
    [BMC_STEP_EMBED] = "embedding", [BMC_STEP_NORM] = "norms, quantizing", [BMC_STEP_QKV] = "q, k, v",
    [BMC_STEP_STORE] = "rope, storing", [BMC_STEP_ATTENTION] = "attention", [BMC_STEP_STATES] = "states",
    [BMC_STEP_ATTN_OUTPUT] = "attention's output",
    [BMC_STEP_GATE_UP] = "gate, up", [BMC_STEP_ACTIVATION] = "activation", [BMC_STEP_DOWN] = "down",
    [BMC_STEP_HEAD] = "head", [BMC_STEP_GPU] = "on the GPU", [BMC_STEP_WAIT] = "waiting",
};

const char *bmc_step_name(int step) { return step >= 0 && step < BMC_STEPS ? names[step] : NULL; }

int bmc_model_profile(bmc_model *m, int on) {
    size_t bytes = (size_t)pool_size(m->pool) * sizeof(struct laps);
    struct laps *laps = on ? aligned_alloc(_Alignof(struct laps), bytes) : NULL;
    if (on && !laps)
        return fail(BMC_ENOMEM, "no memory for taking times");
    if (laps)
        memset(laps, 0, bytes);
    pthread_mutex_lock(&m->lock);
    free(m->profile.laps);
    m->profile = (struct profile){ .laps = laps };
    pthread_mutex_unlock(&m->lock);
    return 0;
}

int bmc_model_times(bmc_model *m, bmc_times *times) {
    if (!times)
        return fail(BMC_EINVAL, "bmc_model_times: times is NULL");
    pthread_mutex_lock(&m->lock);
    const struct profile *p = &m->profile;
    int n = pool_size(m->pool);
    *times = (bmc_times){ .calls = 1e-9 * (double)p->calls, .n_passes = p->n_passes };
    for (int thread = 0; p->laps && thread < n; thread++)
        for (int step = 0; step < BMC_STEPS; step++)
            times->steps[step] += 1e-9 * (double)p->laps[thread].spent[step] / n;
    pthread_mutex_unlock(&m->lock);
    return 0;
}
