/* Kernels of PTX on the grid of grid.h: in the place of those that are compiled as C++, with their names. */
#ifndef PTX_GRID_H
#define PTX_GRID_H

#include "grid.h"
#include "ptx.h"

#include <fstream>
#include <iterator>

/* What a kernel may read and write; the fake driver sets it to its allocations. */
static bool (*ptx_is_global)(uint64_t at, size_t bytes) = [](uint64_t at, size_t) { return at >= 1 << 20; };

static void ptx_call(const void *args, void *shared) {
    static const ptx::host host = { grid_barrier, __syncwarp,
                                    [](uint64_t at, size_t bytes) { return ptx_is_global(at, bytes); },
                                    [](const std::string &what) { grid_stop(what.c_str()); } };
    const ptx::position at = { grid.serial,
                               threadIdx.x,
                               blockDim.x,
                               { blockIdx.x, blockIdx.y, blockIdx.z },
                               { gridDim.x, gridDim.y, gridDim.z } };
    ptx::run(*(ptx::kernel *)grid.kernel->ptx, at, args, shared, host);
}

struct ptx_module {
    ptx::module read;
    std::vector<grid_kernel> kernels;

    const grid_kernel *find(const std::string &name) const {
        for (const grid_kernel &k : kernels)
            if (k.name == name)
                return &k;
        return NULL;
    }
};

/* Whether arguments and shared memory have the bytes that the host's compiler gives them. */
static std::string ptx_differs(const ptx::kernel &k, const grid_kernel *ours) {
    if (!ours || (ours->args == k.params && (!k.shared || ours->shared == k.shared)))
        return "";
    return k.name + ": expected " + std::to_string(ours->args) + " bytes of arguments and "
           + std::to_string(ours->shared) + " of shared memory, found " + std::to_string(k.params) + " and "
           + std::to_string(k.shared) + "\n";
}

/* What is wrong with the text, or nothing. */
static std::string ptx_load(const std::string &file, const std::string &text, ptx_module &to) {
    std::string wrong = ptx::read(file, text, to.read);
    for (ptx::kernel &k : to.read.kernels) {
        const grid_kernel *ours = grid_find(k.name.c_str());
        wrong += ptx_differs(k, ours);
        const unsigned threads = ours ? ours->threads : 1024;
        to.kernels.push_back({ k.name.c_str(), ptx_call, k.params, k.shared, threads, &k });
    }
    return wrong;
}

#endif
