"""Writes a program as the source text of a script, and loads such a text."""

from __future__ import annotations

import itertools
import linecache
import textwrap
from collections.abc import Iterable
from string import Template
from types import ModuleType

from tests.fuzz.grammar import Program
from tests.fuzz.words.word import Word

_SCRIPT = Template('''\
"""A program of the fuzzer: python this file, at the project's root.

$title
"""

import fxpass
import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.built import Built
$preamble

OPTIONS = {
    $options
}
CALLS = $calls
REFUSABLE = $refusable


$model

def inputs(call):
    rows = $rows
    draw = torch.Generator().manual_seed(100 + call)
    x = $x
    y = torch.randn(rows, 3, generator=draw)
    $poison
    return x, y


def build(compile):
    torch.manual_seed(0)
    model = $make
    params = [p for p in model.parameters() if p.requires_grad]
    models, optimizers, extras = [model], [], {}
    probe = inputs(0)[0]
    $setup
    optimizer = $optimizer
    optimizers.append(optimizer)
    $ready

    def step(x, y):
        $step

    def before(call):
        $before

    return Built(step, before, models, optimizers, extras, tainted=$tainted, exact=$exact, together=$together)


if __name__ == "__main__":
    from tests.fuzz.run import main

    main(globals())
''')
_MODEL = Template("""\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        $init
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        $body
        return self.head(h)

""")
_INPUTS = {
    "floats": "torch.randn(rows, 4, generator=draw)",
    "sequence": "torch.randn(rows, 5, 4, generator=draw)",
    "image": "torch.randn(rows, 2, 4, 4, generator=draw)",
    "tokens": "torch.randint(0, 4 + call % 3, (rows, 5), generator=draw)",
    "tokens32": "torch.randint(0, 4 + call % 3, (rows, 5), generator=draw, dtype=torch.int32)",
}
_numbers = itertools.count()


def source(program: Program, least: int = 3) -> str:
    """The program as a script of ``least`` calls, or as many as its words need: it is what runs."""
    every = [word for _, word in program.chosen]
    model, form, overflow = program.one("model"), program.one("form"), program.of("overflow")
    calls = max(least, *(word.calls for word in every), *(5 if w.name == "every size" else 0 for w in every))
    trained = next((word.code for word in program.of("params")), "model.parameters()")
    holes = {
        "title": textwrap.fill(program.title, 100),
        "preamble": _lines(word.preamble for word in every),
        "options": "\n".join(
            [*(f"{w.code}," for w in _options(program)), f'"codegen": "{program.codegen}",']
        ),
        "calls": str(calls),
        "refusable": str(program.refusable),
        "model": "" if model.whole else _model(program, model),
        "make": model.whole.replace("\n", "\n    ") or "Model()",
        "rows": next((f"{w.code}[call % {w.code.count(',') + 1}]" for w in program.of("size")), "4"),
        "x": _INPUTS[model.inputs],
        "poison": _poison(overflow, model.inputs),
        "setup": _lines(
            [*(w.setup for w in program.of("around")), f"trained = {trained}", *_setups(program)]
        ),
        "optimizer": program.one("optimizer").code,
        "ready": _lines(word.ready for word in every),
        "step": _step(program, form),
        "before": _lines(word.before for word in every) or "pass",
        "exact": repr(tuple(name for word in every for name in word.exact)),
        "tainted": repr(tuple(name for word in every for name in word.tainted)),
        "together": str(form.name == "two optimizers"),
    }
    return _fill(_SCRIPT, holes)


def load(text: str) -> ModuleType:
    """The script as a module whose lines Dynamo and tracebacks can read."""
    name = f"fuzzed_{next(_numbers)}"
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__file__ = file
    exec(compile(text, file, "exec"), vars(module))
    return module


def _model(program: Program, model: Word) -> str:
    body = _lines(word.code for word in [model, *program.of("trick")])
    return _fill(_MODEL, {"init": model.init, "body": body})


def _options(program: Program) -> list[Word]:
    return [word for kind in ("dtype", "scale", "clip", "mode") for word in program.of(kind)]


def _setups(program: Program) -> list[str]:
    return [word.setup for kind, word in program.chosen if kind != "around"]


def _poison(overflow: list[Word], inputs: str) -> str:
    poisoned = "y" if inputs.startswith("tokens") else "x"
    return _lines(word.code.replace("$poisoned", poisoned) for word in overflow)


def _step(program: Program, form: Word) -> str:
    holes = {
        "loss": "out = model(x)\n" + program.one("loss").code,
        "edit": _lines(word.code for word in program.of("edit")),
        "after": _lines([*(w.behind for _, w in program.chosen), *(w.code for w in program.of("after"))]),
        "result": program.one("result").code,
    }
    return _fill(Template(form.code), holes)


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(filter(None, texts))


def _fill(template: Template, holes: dict[str, str]) -> str:
    """Substitute, each line of a value indented as its hole is; a line with an empty hole alone goes."""
    found = []
    for line in template.template.splitlines():
        name = line.strip().removeprefix("$")
        if line.strip().startswith("$") and name in holes:
            if holes[name]:
                found.append(textwrap.indent(holes[name], line[: len(line) - len(line.lstrip())]))
        else:
            found.append(Template(line).safe_substitute(holes))
    return "\n".join(found) + "\n"
