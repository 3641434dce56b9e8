/* The driver as native/cuda/driver.h declares it against NVIDIA's cuda.h: compiled by make cuda-check, never
 * run.
 *
 * Every prototype: the same number of parameters, and each of the same kind (pointer or integer) and size.
 * Every struct: sizes and offsets. Every number that the library knows by its own name. */
#include <cuda.h>

#define _Static_assert static_assert
#include "../../native/cuda/driver.h"

#include <stddef.h>
#include <type_traits>

template <class A, class B> constexpr bool alike() {
    return sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
}
template <class... A, class... B> constexpr bool same_call(int (*)(A...), CUresult (*)(B...)) {
    if constexpr (sizeof...(A) == sizeof...(B))
        return (true && ... && alike<A, B>());
    return false;
}

#define CHECK(name, args) \
    static_assert(same_call((int (*) args)nullptr, (decltype(&::name))nullptr), \
                  #name " is declared otherwise in cuda.h");
CUDA_DRIVER(CHECK)

#define SAME(ours, theirs) static_assert((int)(ours) == (int)(theirs), #theirs)
SAME(CUDA_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(CUDA_INVALID_IMAGE, CUDA_ERROR_INVALID_IMAGE);
SAME(CUDA_NO_BINARY, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME(CUDA_INVALID_PTX, CUDA_ERROR_INVALID_PTX);
SAME(CUDA_NO_JIT, CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
SAME(CUDA_UNSUPPORTED_PTX, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME(CUDA_ECC, CUDA_ERROR_ECC_UNCORRECTABLE);
SAME(CUDA_ILLEGAL_ADDRESS, CUDA_ERROR_ILLEGAL_ADDRESS);
SAME(CUDA_LAUNCH_TIMEOUT, CUDA_ERROR_LAUNCH_TIMEOUT);
SAME(CUDA_ASSERT, CUDA_ERROR_ASSERT);
SAME(CUDA_HARDWARE_STACK, CUDA_ERROR_HARDWARE_STACK_ERROR);
SAME(CUDA_ILLEGAL_INSTRUCTION, CUDA_ERROR_ILLEGAL_INSTRUCTION);
SAME(CUDA_MISALIGNED, CUDA_ERROR_MISALIGNED_ADDRESS);
SAME(CUDA_ADDRESS_SPACE, CUDA_ERROR_INVALID_ADDRESS_SPACE);
SAME(CUDA_INVALID_PC, CUDA_ERROR_INVALID_PC);
SAME(CUDA_LAUNCH_FAILED, CUDA_ERROR_LAUNCH_FAILED);
SAME(CUDA_ATTRIBUTE_SMS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(CUDA_ATTRIBUTE_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(CUDA_ATTRIBUTE_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(CUDA_ATTRIBUTE_MAPS, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME(CUDA_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(CUDA_CAPTURE_THREAD, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME(CUDA_ON_DEVICE, CU_MEM_LOCATION_TYPE_DEVICE);
SAME(CUDA_PINNED, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME(CUDA_READ_WRITE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME(CUDA_GRANULARITY_LEAST, CU_MEM_ALLOC_GRANULARITY_MINIMUM);

#define FIELD(ours, a, theirs, b) \
    static_assert(offsetof(ours, a) == offsetof(theirs, b) && sizeof(ours::a) == sizeof(theirs::b), \
                  #theirs "." #b);
SAME(sizeof(cuda_location), sizeof(CUmemLocation));
FIELD(cuda_location, type, CUmemLocation, type)
FIELD(cuda_location, id, CUmemLocation, id)
SAME(sizeof(cuda_access), sizeof(CUmemAccessDesc));
FIELD(cuda_access, location, CUmemAccessDesc, location)
FIELD(cuda_access, flags, CUmemAccessDesc, flags)
SAME(sizeof(cuda_allocation), sizeof(CUmemAllocationProp));
FIELD(cuda_allocation, type, CUmemAllocationProp, type)
FIELD(cuda_allocation, handle_types, CUmemAllocationProp, requestedHandleTypes)
FIELD(cuda_allocation, location, CUmemAllocationProp, location)
FIELD(cuda_allocation, win32, CUmemAllocationProp, win32HandleMetaData)
FIELD(cuda_allocation, flags, CUmemAllocationProp, allocFlags)
