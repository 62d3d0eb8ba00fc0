/* Kernels: those in torch's own libraries and those that Triton loads. Each launch is one line of the log. */
#define _GNU_SOURCE
#include "stub.h"

#include <driver_types.h>
#include <vector_types.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- compiled into a library: told by the address of a function on the host, which is registered with a name */

struct registered {
    const void *function;
    const char *name;
};

static struct registered *table;
static size_t count, room;
static int sorted;

EXPORT void __cudaRegisterFunction(void **binary, const void *function, char *device, const char *name)
{
    (void)binary;
    (void)device;
    if (count == room)
        table = realloc(table, (room = room ? 2 * room : 65536) * sizeof *table);
    table[count++] = (struct registered){function, name};
    sorted = 0;
}

static int by_function(const void *a, const void *b)
{
    const void *x = ((const struct registered *)a)->function, *y = ((const struct registered *)b)->function;
    return (x > y) - (x < y);
}

static const char *name_of(const void *function)
{
    if (!sorted)
        qsort(table, count, sizeof *table, by_function);
    sorted = 1;
    struct registered key = {function, NULL};
    struct registered *found = bsearch(&key, table, count, sizeof *table, by_function);
    return found ? found->name : "?";
}

static int launch(const void *function)
{
    note("kernel", name_of(function), 0);
    return 0;
}

EXPORT void **__cudaRegisterFatBinary(void)
{
    static void *binary;
    return &binary;
}

EXPORT void __cudaRegisterFatBinaryEnd(void) {}
EXPORT void __cudaUnregisterFatBinary(void) {}
EXPORT void __cudaRegisterVar(void) {}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration; /* between the two halves of a <<<...>>> */

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream)
{
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

EXPORT int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream)
{
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *stream = configuration.stream;
    return 0;
}

EXPORT int __cudaGetKernel(const void **kernel, const void *function)
{
    *kernel = function;
    return 0;
}

EXPORT int cudaLaunchKernel(const void *function) { return launch(function); }
EXPORT int __cudaLaunchKernel(const void *function) { return launch(function); }
EXPORT int cudaLaunchCooperativeKernel(const void *function) { return launch(function); }

EXPORT int cudaLaunchKernelExC(const void *config, const void *function)
{
    (void)config;
    return launch(function);
}

EXPORT int cudaFuncGetAttributes(struct cudaFuncAttributes *a)
{
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = capability();
    return 0;
}

EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks)
{
    *blocks = 2;
    return 0;
}

SUCCEEDS(cudaFuncSetAttribute)

/* ---- loaded at run time: a function is its name */

EXPORT int cuModuleLoadData(void **module)
{
    *module = handle();
    return 0;
}

EXPORT int cuModuleLoad(void **module) { return cuModuleLoadData(module); }
EXPORT int cuModuleLoadDataEx(void **module) { return cuModuleLoadData(module); }

EXPORT int cuModuleGetFunction(void **function, void *module, const char *name)
{
    (void)module;
    *function = strdup(name);
    return 0;
}

/* Of the driver's attributes Triton reads 0, threads per block, and 4, registers. */
EXPORT int cuFuncGetAttribute(int *value, int which)
{
    *value = which == 0 ? 1024 : which == 4 ? 32 : 0;
    return 0;
}

EXPORT int cuLaunchKernel(const char *function)
{
    note("kernel", function, 0);
    return 0;
}

EXPORT int cuLaunchKernelEx(const void *config, const char *function)
{
    (void)config;
    return cuLaunchKernel(function);
}

EXPORT int cuLaunchCooperativeKernel(const char *function) { return cuLaunchKernel(function); }

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks)
{
    *blocks = 2;
    return 0;
}

EXPORT int cuOccupancyMaxActiveClusters(int *clusters)
{
    *clusters = 2;
    return 0;
}

SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)

/* ---- the driver's functions by name, as the runtime and torch ask for them */

EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status)
{
    (void)version;
    (void)flags;
    char versioned[256];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        *function = dlsym(RTLD_DEFAULT, versioned);
    if (status)
        *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}

EXPORT int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status)
{
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                               int *status)
{
    return cudaGetDriverEntryPointByVersion(name, function, version, flags, status);
}
