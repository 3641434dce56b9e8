/* The bodies of bmc.h: check the arguments, record errors, call in. */
#include "bmc.h"

#include "cores.h"
#include "cpu.h"
#include "error.h"
#include "kernels.h"
#include "pack.h"
#include "types.h"

int bmc_version(void) {
    return BMC_VERSION;
}

const char *bmc_error(void) {
    return error_message();
}

int bmc_type(int number, bmc_type_info *info) {
    const struct type *type = type_find(number);
    if (!info)
        return fail(BMC_EINVAL, "bmc_type: info is NULL");
    *info = (bmc_type_info){0};
    if (type)
        *info = (bmc_type_info){type->name, type->block_size, type->type_size, panel_runs(number)};
    return BMC_OK;
}

int bmc_dequantize(int number, const void *blocks, int64_t n, float *out) {
    const struct type *type = type_find(number);
    if (!type)
        return fail(BMC_EINVAL, "bmc_dequantize: there is no tensor type %d", number);
    if (!type->dequantize)
        return fail(BMC_EINVAL, "bmc_dequantize: type %s is not supported", type->name);
    if (n < 0 || n % type->block_size)
        return fail(BMC_EINVAL, "bmc_dequantize: %lld values are not whole blocks of %s (%d values each)",
                    (long long)n, type->name, type->block_size);
    if (n && (!blocks || !out))
        return fail(BMC_EINVAL, "bmc_dequantize: blocks or out is NULL");
    if (n)
        type->dequantize(blocks, n, out);
    return BMC_OK;
}

const char *bmc_cpu(void) {
    const struct kernels *k = kernels_find();
    return k ? k->name : NULL;
}

const char *bmc_cpu_level(int level) {
    return cpu_level(level);
}

int bmc_cpu_count(void) {
    return cpu_count();
}
