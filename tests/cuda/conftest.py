"""These tests need a device: a real one, or the stub that ``python -m tests.cuda`` preloads."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    from tests.cuda import emulate

    emulate.install()
