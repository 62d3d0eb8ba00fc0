/* cuBLAS, cuSOLVER, cuSPARSE: a product is one launch, a plan is always found. */
#include "stub.h"

#include <string.h>

LAUNCH(cublasGemmEx)
LAUNCH(cublasSgemm_v2)
LAUNCH(cublasSgemmEx)
LAUNCH(cublasGemmStridedBatchedEx)
LAUNCH(cublasSgemmStridedBatched)
LAUNCH(cublasSgemv_v2)
LAUNCH(cublasSdot_v2)
LAUNCH(cublasDotEx)
LAUNCH(cublasLtMatmul)

MAKES(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)

EXPORT int cublasGetMathMode(void *library, int *mode)
{
    (void)library;
    *mode = 0;
    return 0;
}

EXPORT int cublasGetPointerMode_v2(void *library, int *mode) { return cublasGetMathMode(library, mode); }

EXPORT size_t cublasLtGetVersion(void) { return 130100; }
MAKES(cublasLtCreate)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)

/* One algorithm, all zeros: no workspace, no warning. */
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *library, void *product, void *a, void *b, void *c, void *d,
                                          void *preference, int wanted, void *results, int *found)
{
    enum { SIZE_OF_A_RESULT = 128 };
    (void)library, (void)product, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    memset(results, 0, SIZE_OF_A_RESULT);
    *found = 1;
    return 0;
}

MAKES(cusolverDnCreate)
MAKES(cusparseCreate)
