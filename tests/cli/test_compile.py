"""``fxpass compile``: what it leaves on disk, and what it says where nothing can be left."""

from __future__ import annotations

import random

import pytest
import torch
import torch._functorch.config as functorch_config  # noqa: TID251

from .helpers import fx


def test_the_second_run_finds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    norm = str(1 + random.Random().random())  # in no earlier run's cache
    command = ("compile", "@tiny", "--max-norm", norm)
    with functorch_config.patch(enable_autograd_cache=True):
        first, second = fx(capsys, *command, "--json"), fx(capsys, *command)
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    found = first.json()
    assert found["schema"] == "fxpass.compile/1"
    assert found["kept"]
    assert found["files"] > 0
    assert [(g["why"], g["cache"]) for g in found["graphs"]] == [("the first call", "miss")]
    assert "everything was on disk, loaded for cpu in" in second.out
    assert "new files:" not in second.out


def test_what_is_not_kept_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "compile", "@tiny", "--codegen", "eager")
    assert found.code == 1
    assert "not kept: there is no code: codegen='eager'" in found.out


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = fx(capsys, "compile", "@tiny", "--device", "cuda", "--json")
    assert found.code == 1
    assert "no GPU is here" in found.json()["error"]
    assert "save_cache_artifacts" in found.json()["hint"]
