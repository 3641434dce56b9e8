/* Instructions that C++ has no words for: as assembly, and on the CPU grid (tests/cuda/grid.h) what they
 * mean. */
#ifndef CUDA_PTX_H
#define CUDA_PTX_H

#ifdef __CUDACC__

DEVICE float bits_to_float(uint32_t b) { return __uint_as_float(b); }
DEVICE float half_to_float(uint16_t h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

/* c + the four products of u's unsigned and s's signed bytes. */
DEVICE int32_t dot4(uint32_t u, int32_t s, int32_t c) {
    int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(u), "r"(s), "r"(c));
    return d;
}

/* Four bytes of b:a, each chosen by a nibble of `which` from 0 to 7. */
DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

/* The value of the thread whose number differs in the bits of `lane`, below 16: within half a warp. */
DEVICE uint32_t shuffle_bits(uint32_t x, int lane) {
    return __shfl_xor_sync(0xffffu << (threadIdx.x & 16), x, lane, 16);
}

/* The 32 bytes at p come closer to where they are read soon. PTX allows no address out of bounds here. */
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }

#if __CUDA_ARCH__ >= 800
/* d (16 x 8) += a (16 x 32, unsigned) b (32 x 8, signed), by a warp. Thread 4r + q holds rows r and r + 8 of
 * a at columns 4q and 16 + 4q, column r of b there, and columns 2q and 2q + 1 of d in rows r and r + 8. */
DEVICE void mma_k32(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* The same with sixteen columns of a. */
DEVICE void mma_k16(int32_t d[4], const uint32_t a[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

/* Sixteen bytes from global to shared memory, which are there for this thread once its copies up to then were
 * waited for. */
DEVICE void copy_16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
}
DEVICE void copy_4(void *shared, const void *global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
}
DEVICE void end_copies(void) { asm volatile("cp.async.commit_group;" : : : "memory"); }
/* All groups of copies but the last `left` are done. */
template <int left> DEVICE void wait_copies(void) {
    asm volatile("cp.async.wait_group %0;" : : "n"(left) : "memory");
}
#else
DEVICE void copy_16(void *shared, const void *global) { *(uint4 *)shared = *(const uint4 *)global; }
DEVICE void copy_4(void *shared, const void *global) { *(uint32_t *)shared = *(const uint32_t *)global; }
DEVICE void end_copies(void) {}
template <int left> DEVICE void wait_copies(void) {}
#endif

#else

DEVICE float bits_to_float(uint32_t b) { return f32_from_bits(b); }
DEVICE float half_to_float(uint16_t h) { return f16_to_f32(h); }
DEVICE uint16_t float_to_half(float f) { return f32_to_f16(f); }

DEVICE int32_t dot4(uint32_t u, int32_t s, int32_t c) {
    for (int i = 0; i < 4; i++)
        c += (int32_t)(u >> 8 * i & 255) * (int8_t)(s >> 8 * i);
    return c;
}

DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; i++)
        chosen |= (uint32_t)(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return chosen;
}

DEVICE void prefetch(const void *p) { (void)p; }

DEVICE uint32_t shuffle_bits(uint32_t x, int lane) {
    const uint32_t half = 0xffffu << (threadIdx.x & 16);
    grid_give(0, x);
    __syncwarp(half);
    x = grid_taken((threadIdx.x & 31) ^ (unsigned)lane, 0);
    __syncwarp(half);
    return x;
}

DEVICE void mma_k(int32_t d[4], const uint32_t *a, const uint32_t *b, int halves) {
    const unsigned r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int h = 0; h < halves; h++) {
        grid_give(2 * h, a[2 * h]);
        grid_give(2 * h + 1, a[2 * h + 1]);
        grid_give(4 + h, b[h]);
    }
    __syncwarp();
    for (unsigned i = 0; i < 4; i++)
        for (int h = 0; h < halves; h++)
            for (unsigned c = 0; c < 4; c++)
                d[i] = dot4(grid_taken(4 * r + c, 2 * h + (int)i / 2),
                            (int32_t)grid_taken(4 * (2 * q + i % 2) + c, 4 + h), d[i]);
    __syncwarp();
}
DEVICE void mma_k32(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) { mma_k(d, a, b, 2); }
DEVICE void mma_k16(int32_t d[4], const uint32_t a[2], uint32_t b) { mma_k(d, a, &b, 1); }

DEVICE void copy_16(void *shared, const void *global) { grid_copy(shared, global, 16); }
DEVICE void copy_4(void *shared, const void *global) { grid_copy(shared, global, 4); }
DEVICE void end_copies(void) { grid_end_copies(); }
template <int left> DEVICE void wait_copies(void) { grid_wait_copies(left); }

#endif

#endif
