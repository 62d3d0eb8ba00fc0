/* Streams that are always idle, events that have always happened, and graphs that are only counted. */
#include "stub.h"

#include <driver_types.h>

static int capturing; /* a flag for all streams at once: one captures at a time */

static int make(void **object)
{
    *object = handle();
    return 0;
}

static int wait_for(const char *what)
{
    note("sync", what, 0);
    return 0;
}

EXPORT int cudaStreamCreate(void **stream) { return make(stream); }
EXPORT int cudaStreamCreateWithFlags(void **stream) { return make(stream); }
EXPORT int cudaStreamCreateWithPriority(void **stream) { return make(stream); }
EXPORT int cudaStreamSynchronize(void) { return wait_for("cudaStreamSynchronize"); }
EXPORT int cudaDeviceSynchronize(void) { return wait_for("cudaDeviceSynchronize"); }
EXPORT int cudaEventSynchronize(void) { return wait_for("cudaEventSynchronize"); }
EXPORT int cudaEventCreate(void **event) { return make(event); }
EXPORT int cudaEventCreateWithFlags(void **event) { return make(event); }
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cuStreamWriteValue32_v2)

EXPORT int cudaStreamGetPriority(void *stream, int *priority)
{
    (void)stream;
    *priority = 0;
    return 0;
}

/* A constant, so that timings choose nothing. */
EXPORT int cudaEventElapsedTime(float *milliseconds)
{
    *milliseconds = 1;
    return 0;
}

EXPORT int cudaStreamIsCapturing(void *stream, int *status)
{
    (void)stream;
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return 0;
}

EXPORT int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph)
{
    if (id)
        *id = 1;
    if (graph)
        *graph = handle();
    return cudaStreamIsCapturing(stream, status);
}

EXPORT int cuStreamGetCaptureInfo_v2(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }

EXPORT int cudaStreamBeginCapture(void)
{
    capturing = 1;
    return 0;
}

EXPORT int cudaStreamEndCapture(void *stream, void **graph)
{
    (void)stream;
    capturing = 0;
    return make(graph);
}

EXPORT int cudaGraphInstantiateWithFlags(void **executable) { return make(executable); }

EXPORT int cudaGraphLaunch(void)
{
    note("graph", "cudaGraphLaunch", 0);
    return 0;
}

EXPORT int cudaGraphGetNodes(void *graph, void *nodes, size_t *count)
{
    (void)graph;
    (void)nodes;
    *count = 1; /* an empty graph would be warned about */
    return 0;
}

EXPORT int cudaGraphNodeGetDependencies(void *node, void *from, void *edges, size_t *count)
{
    (void)node;
    (void)from;
    (void)edges;
    *count = 0;
    return 0;
}

SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaStreamUpdateCaptureDependencies)
SUCCEEDS(cudaGraphDebugDotPrint)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
