"""These tests need a device: a real one, or the stub that ``python -m tests.cuda`` preloads."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    from tests.cuda import emulate

    emulate.install()


@pytest.fixture(autouse=True)
def _nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are only counted, a step's report is whatever lay in its memory: it is not read."""
    if torch.cuda.is_available():
        from fxpass.runtime.reporter import Reporter
        from tests.cuda.device import COUNTS_ONLY

        if COUNTS_ONLY:
            monkeypatch.setattr(Reporter, "_tell", lambda *report: None)
