/* A CUDA driver, runtime, cuBLAS and cuDNN for machines without a GPU.
 *
 * Preloaded, these functions stand before those of NVIDIA's libraries, so that
 * an unmodified CUDA build of torch finds one device. Its memory is host memory,
 * its streams are always idle, and what would run on it is written to a log.
 * Nothing of Python is replaced: allocator, autograd, Inductor, Triton and ptxas
 * are the real ones.
 *
 * Arguments that a function ignores are not declared: in the calling convention
 * of x86-64 and AArch64 a callee may leave arguments unread.
 */
#ifndef FXPASS_STUB_H
#define FXPASS_STUB_H

#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))
#define SUCCEEDS(name) \
    EXPORT int name(void) { return 0; }

/* A function that makes an object, and one that is a launch. */
#define MAKES(name)                \
    EXPORT int name(void **object) \
    {                              \
        *object = handle();        \
        return 0;                  \
    }
#define LAUNCH(name)              \
    EXPORT int name(void)         \
    {                             \
        note("kernel", #name, 0); \
        return 0;                 \
    }

/* Add one line, "KIND BYTES NAME", to the log while it is on. */
void note(const char *kind, const char *name, size_t bytes);

/* A pointer that is not null, for objects about which nothing is remembered. */
void *handle(void);

/* Major and minor compute capability in two digits: STUB_CAPABILITY, or 90. */
int capability(void);

#endif
