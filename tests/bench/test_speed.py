"""bench.speed: rows in the order in which they matter, each measured or with the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import models, speed
from bench.speed import Row


def test_rows_come_in_the_order_in_which_they_matter() -> None:
    found = speed.rows(["350M", "125M"], ["float16"], ["eager-amp", "fxpass", "compiled-amp"], [False, True])
    assert [(r.params, r.contender, r.graphs) for r in found] == [
        *((size, name, graphs) for size in ("350M", "125M") for graphs in (False, True) for name in OURS),
        ("350M", "eager-amp", False),
        ("125M", "eager-amp", False),
    ]


OURS = ("fxpass", "compiled-amp")


@pytest.mark.slow
def test_a_step_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.GPT_SIZES, "1M", models.GPTConfig(width=16, layers=1, heads=1, vocab=32))
    path = tmp_path / "speed.json"
    found = speed.main(
        ["--device", "cpu", "--quick", "--tokens", "16", "--only", "eager-amp", "fxpass", "--json", str(path)]
    )
    assert [r.row.contender for r in found] == ["fxpass", "eager-amp"]
    assert not any(r.error for r in found)
    assert all(r.tokens_per_s > 0 and r.peak_bytes > r.kept_bytes for r in found)
    record = json.loads(path.read_text())
    assert record["results"][0]["kept_bytes"] == 12 * found[0].parameters + 4 * len(list(_gpt().parameters()))
    assert "tokens/s" in capsys.readouterr().out


def _gpt() -> torch.nn.Module:
    return models.gpt("1M")


def test_what_was_not_reached_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> speed.Result:
        raise MemoryError("too large\nfor this machine")

    monkeypatch.setattr(speed, "measured", fails)
    wanted = [Row("1M", "float16", "fxpass", False)]
    cpu = torch.device("cpu")
    (failed,), missed = speed.run(wanted, cpu, tokens=None, steps=1, minutes=1)
    assert failed.error == "MemoryError: too large"
    assert not missed
    assert speed.table([failed])[1][0][:5] == ["1M", "float16", "fxpass", "no", failed.error]
    assert speed.run(wanted, cpu, tokens=None, steps=1, minutes=-1) == ([], wanted)
