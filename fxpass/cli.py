"""The command line: ``fxpass passes`` and ``fxpass doctor``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with 2 if its extra is not installed."""
    try:
        import typer
    except ImportError:
        sys.exit("fxpass: the command line needs an extra: pip install 'fxpass[cli]'")

    app = typer.Typer(help="Look into the fxpass backend.", no_args_is_help=True, add_completion=False)
    app.command("passes")(passes)
    app.command("doctor")(doctor)
    app()


def passes() -> None:
    """List the passes in the order they run, with one line each.

    Example: fxpass passes
    """
    from rich.console import Console
    from rich.table import Table

    from .passes import PASSES

    table = Table("pass", "what it does", box=None)
    for cls in PASSES:
        table.add_row(cls.name, (cls.__doc__ or "").strip().splitlines()[0])
    Console().print(table)


def doctor() -> None:
    """Compile a tiny step and say whether fxpass works on this machine; exits with 1 if not.

    Example: fxpass doctor
    """
    import torch
    from rich.console import Console

    from . import MixedPrecision, __version__

    console = Console()
    console.print(f"fxpass {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"device: {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}")
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def step() -> None:
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        torch.compile(step, backend=MixedPrecision(codegen="eager"))()
    except Exception as error:
        console.print(f"capture: failed\n{error}")
        sys.exit(1)
    works = torch.equal(weight.detach().cpu(), torch.full((2,), 0.5))
    console.print("capture: a step compiled and ran" if works else "capture: the step gave a wrong result")
    sys.exit(0 if works else 1)
