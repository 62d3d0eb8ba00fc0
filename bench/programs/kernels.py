"""torchvision without its compiled operators.

Its wheel on the package index is built for CUDA; beside a CPU build of torch its library does not load, and
then `import torchvision` stops where it describes `nms` and `qnms` to the compiler. Models are trained
without them.
"""

from __future__ import annotations

import torch

_LIBRARIES: list[torch.library.Library] = []  # operators live as long as the library that defined them


def let_torchvision_import() -> None:
    """Define the operators that its import asks for, where they do not exist."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
