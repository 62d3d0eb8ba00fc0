/* Device memory is host memory: copies really copy, and say which way. */
#define _GNU_SOURCE
#include "stub.h"

#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 512 /* what cudaMalloc promises */
#define MEMORY ((size_t)80 << 30)

static const char *const DIRECTIONS[] = {"HtoH", "HtoD", "DtoH", "DtoD", "default"};

static int allocate(void **p, size_t bytes)
{
    return posix_memalign(p, ALIGNMENT, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : 0;
}

EXPORT int cudaMalloc(void **p, size_t bytes)
{
    note("malloc", "cudaMalloc", bytes);
    return allocate(p, bytes);
}

EXPORT int cudaFree(void *p)
{
    free(p);
    return 0;
}

EXPORT int cudaHostAlloc(void **p, size_t bytes)
{
    note("hostalloc", "cudaHostAlloc", bytes);
    return allocate(p, bytes);
}

EXPORT int cudaMallocAsync(void **p, size_t bytes) { return cudaMalloc(p, bytes); }
EXPORT int cudaFreeAsync(void *p) { return cudaFree(p); }
EXPORT int cudaFreeHost(void *p) { return cudaFree(p); }

EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int direction)
{
    note("copy", DIRECTIONS[direction], bytes);
    memmove(to, from, bytes);
    return 0;
}

EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int direction)
{
    note("sync", "cudaMemcpy", bytes); /* the host waits for it */
    memmove(to, from, bytes);
    (void)direction;
    return 0;
}

EXPORT int cudaMemsetAsync(void *to, int value, size_t bytes)
{
    note("memset", "cudaMemsetAsync", bytes);
    memset(to, value, bytes);
    return 0;
}

EXPORT int cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }

EXPORT int cudaMemGetInfo(size_t *unused, size_t *total)
{
    *unused = *total = MEMORY;
    return 0;
}

EXPORT int cudaPointerGetAttributes(struct cudaPointerAttributes *a)
{
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    return 0;
}

/* Triton asks for the device address of every tensor it is given: the same one. */
EXPORT int cuPointerGetAttribute(void *value, int which, unsigned long long p)
{
    (void)which;
    *(unsigned long long *)value = p;
    return 0;
}

EXPORT int cudaGetSymbolAddress(void **p)
{
    *p = handle();
    return 0;
}

EXPORT int cudaDeviceGetDefaultMemPool(void **pool)
{
    *pool = handle();
    return 0;
}

EXPORT int cudaIpcGetMemHandle(void) { return cudaErrorNotSupported; }
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemPoolTrimTo)
SUCCEEDS(cudaMemPoolSetAttribute)
SUCCEEDS(cudaMemPoolGetAttribute)
SUCCEEDS(cudaMemPoolSetAccess)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cuMemcpy)
SUCCEEDS(cuMemcpyDtoHAsync_v2)
