/* cuDNN, by the interface of its version 7 (torch uses it under TORCH_CUDNN_V8_API_DISABLED=1).
 *
 * The interface of version 8 would ask for whole graphs of descriptors to be
 * remembered; in this one a convolution is one call. The first algorithm is
 * always the best and needs no workspace.
 */
#include "stub.h"

#include <string.h>

MAKES(cudnnCreate)
SUCCEEDS(cudnnDestroy)
SUCCEEDS(cudnnSetStream)

MAKES(cudnnCreateTensorDescriptor)
MAKES(cudnnCreateFilterDescriptor)
MAKES(cudnnCreateConvolutionDescriptor)
MAKES(cudnnCreateActivationDescriptor)
SUCCEEDS(cudnnDestroyTensorDescriptor)
SUCCEEDS(cudnnDestroyFilterDescriptor)
SUCCEEDS(cudnnDestroyConvolutionDescriptor)
SUCCEEDS(cudnnDestroyActivationDescriptor)
SUCCEEDS(cudnnSetTensorNdDescriptor)
SUCCEEDS(cudnnSetTensorNdDescriptorEx)
SUCCEEDS(cudnnSetTensor4dDescriptor)
SUCCEEDS(cudnnSetFilterNdDescriptor)
SUCCEEDS(cudnnSetFilter4dDescriptor)
SUCCEEDS(cudnnSetConvolutionNdDescriptor)
SUCCEEDS(cudnnSetConvolutionGroupCount)
SUCCEEDS(cudnnSetConvolutionMathType)
SUCCEEDS(cudnnSetConvolutionReorderType)
SUCCEEDS(cudnnSetActivationDescriptor)

LAUNCH(cudnnConvolutionForward)
LAUNCH(cudnnConvolutionBackwardData)
LAUNCH(cudnnConvolutionBackwardFilter)
LAUNCH(cudnnConvolutionBiasActivationForward)
LAUNCH(cudnnBatchNormalizationForwardTrainingEx)
LAUNCH(cudnnBatchNormalizationForwardInference)
LAUNCH(cudnnBatchNormalizationBackwardEx)

/* Algorithm 0, status 0, no time, no memory. */
EXPORT int cudnnGetConvolutionForwardAlgorithm_v7(void *library, void *x, void *weight, void *convolution,
                                                  void *y, int wanted, int *found, void *results)
{
    enum { SIZE_OF_A_RESULT = 48 };
    (void)library, (void)x, (void)weight, (void)convolution, (void)y;
    memset(results, 0, (size_t)wanted * SIZE_OF_A_RESULT);
    *found = 1;
    return 0;
}

/* These take the same arguments in another order. */
#define SAME_CHOICE(name)                                                                              \
    EXPORT int name(void *l, void *a, void *b, void *c, void *d, int wanted, int *found, void *results) \
    {                                                                                                  \
        return cudnnGetConvolutionForwardAlgorithm_v7(l, a, b, c, d, wanted, found, results);          \
    }
SAME_CHOICE(cudnnGetConvolutionBackwardDataAlgorithm_v7)
SAME_CHOICE(cudnnGetConvolutionBackwardFilterAlgorithm_v7)

#define NO_WORKSPACE(name)                                                                     \
    EXPORT int name(void *l, void *a, void *b, void *c, void *d, int algorithm, size_t *bytes) \
    {                                                                                          \
        (void)l, (void)a, (void)b, (void)c, (void)d, (void)algorithm;                          \
        *bytes = 0;                                                                            \
        return 0;                                                                              \
    }
NO_WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
NO_WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
NO_WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
