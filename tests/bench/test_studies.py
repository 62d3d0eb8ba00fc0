"""The studies: runs repeat bit for bit, and the tables in docs are those of the committed results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from bench import clipping, stability, study
from bench.tasks import TASKS

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize(("module", "page"), [(stability, "loss-scaling"), (clipping, "clipping")])
def test_tables_in_docs_are_the_committed_results(module: ModuleType, page: str) -> None:
    name = module.__name__.rpartition(".")[2]
    record = json.loads((study.RESULTS / f"{name}.json").read_text())
    text = (DOCS / f"{page}.md").read_text()
    missing = [title for title, table in module.tables(record).items() if study.markdown(table) not in text]
    assert not missing, f"docs/{page}.md lacks these tables of docs/results/{name}.json: {missing}"


def test_a_run_repeats_whatever_ran_before_it() -> None:
    trainer = study.Trainer(TASKS["sparse"], "adamw", {"loss_scale": 1.0})
    first = trainer.run(0, 4)
    other = trainer.run(1, 4, scale=2.0**24)
    again = trainer.run(0, 4)
    assert other.scales == [2.0**24] * 4
    assert other.skipped == [0, 1, 2, 3]
    assert other.losses != first.losses
    assert again == first
    assert len(trainer.backend.graphs) == 1


def test_rows_of_the_table_are_counted_by_frequency() -> None:
    run = study.Trainer(TASKS["sparse"], "sgd", {"max_norm": 0.01}).run(0, 3)
    assert run.clipped == 3
    assert 0 < run.rows["tail"] < run.rows["head"]
    assert set(run.held_out) == {"loss", "head", "middle", "tail"}


@pytest.mark.slow
def test_stability_job() -> None:
    job = stability.Job("conv", "static", {"loss_scale": 1.0}, (1.0, 2.0**24), seeds=1, steps=3)
    low, high = stability.work(job)
    assert (low.name, low.skipped, low.first_applied) == ("static 2^0", 0, 1)
    assert (high.name, high.skipped, high.first_applied) == ("static 2^24", 3, None)
    assert 0 < (low.below_normal or 0) < 1
    rows = stability.rows([asdict(low), asdict(high)], "conv")
    assert [row[1] for row in rows] == ["1", "never"]


def test_clipping_job() -> None:
    job = clipping.Job("sparse", "sgd", "global 0.01", {"max_norm": 0.01}, seeds=1, steps=3)
    results = [asdict(result) for result in clipping.work(job)]
    assert [r["recipe"] for r in results] == ["sgd", "hot sgd"]
    assert results[0]["rows"] != results[1]["rows"]  # by another learning rate, in the same graph
    columns, (row,) = clipping.table_rows(results, "sgd")
    assert len(columns) == len(row)
    assert row[:2] == ["global 0.01", "100%"]
