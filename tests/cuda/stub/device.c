/* The one device: its properties, for the runtime and for the driver. */
#include "stub.h"

#include <driver_types.h>
#include <stdio.h>
#include <string.h>

#define MEMORY ((size_t)80 << 30)
#define VERSION 13000

/* The runtime and the driver number their attributes alike. Of compute capability 9.0 (H100) and
 * 8.0 (A100): what torch, Inductor and Triton ask for; everything else is 0. */
static int attribute(int which)
{
    int hopper = capability() >= 90;
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return (hopper ? 227 : 163) << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return (hopper ? 228 : 164) << 10;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMultiProcessorCount: return hopper ? 132 : 108;
    case cudaDevAttrClockRate: return 1755000;
    case cudaDevAttrMemoryClockRate: return 1593000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    default: return 0;
    }
}

EXPORT int cudaDeviceGetAttribute(int *value, int which)
{
    *value = attribute(which);
    return 0;
}

EXPORT int cudaGetDeviceProperties(struct cudaDeviceProp *p)
{
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "stub of compute capability %d", capability());
    p->totalGlobalMem = MEMORY;
    p->major = attribute(cudaDevAttrComputeCapabilityMajor);
    p->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    p->warpSize = attribute(cudaDevAttrWarpSize);
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->unifiedAddressing = p->concurrentKernels = 1;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
        p->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
    }
    return 0;
}

static int set(int *to, int value)
{
    *to = value;
    return 0;
}

EXPORT int cudaGetDeviceCount(int *n) { return set(n, 1); }
EXPORT int cudaGetDevice(int *device) { return set(device, 0); }
EXPORT int cudaSetDevice(int device) { return device == 0 ? 0 : cudaErrorInvalidDevice; }
EXPORT int cudaDriverGetVersion(int *v) { return set(v, VERSION); }
EXPORT int cudaRuntimeGetVersion(int *v) { return set(v, VERSION); }
EXPORT int cudaDeviceCanAccessPeer(int *can) { return set(can, 0); }
EXPORT int cudaDeviceGetPCIBusId(char *id, int n) { return snprintf(id, n, "0000:00:00.0") < 0; }
EXPORT const char *cudaGetErrorString(int e) { return e ? "an error of the stub" : "no error"; }
EXPORT const char *cudaGetErrorName(int e) { return e ? "stub" : "success"; }
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaDeviceReset)
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

SUCCEEDS(cuInit)
EXPORT int cuDriverGetVersion(int *v) { return set(v, VERSION); }
EXPORT int cuDeviceGetCount(int *n) { return set(n, 1); }
EXPORT int cuDeviceGet(int *device) { return set(device, 0); }
EXPORT int cuDeviceGetAttribute(int *value, int which) { return set(value, attribute(which)); }
EXPORT int cuCtxGetDevice(int *device) { return set(device, 0); }
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)

EXPORT int cuCtxGetCurrent(void **context)
{
    *context = handle();
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context) { return cuCtxGetCurrent(context); }

EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    (void)device;
    if (flags)
        *flags = 0;
    return set(active, 1);
}

EXPORT int cuCtxGetLimit(size_t *value)
{
    *value = 1 << 20;
    return 0;
}

EXPORT int cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    return set(greatest, -5);
}

EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    return cuCtxGetStreamPriorityRange(least, greatest);
}

EXPORT int cuGetErrorString(int error, const char **text)
{
    *text = cudaGetErrorString(error);
    return 0;
}

EXPORT int cuGetErrorName(int error, const char **text)
{
    *text = cudaGetErrorName(error);
    return 0;
}

EXPORT int nvmlInit_v2(void) { return 0; }
EXPORT int nvmlDeviceGetCount_v2(int *n) { return set(n, 1); }
