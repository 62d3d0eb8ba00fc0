"""What is handed out: a wheel that works beside a torch that is there, and a site without a dead link."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fxpass

ROOT = Path(__file__).parents[1]
# no import of fxpass: torch finds the backend by its entry point
SCRIPT = """
import torch
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.AdamW(model.parameters())

def train_step(x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss

step = torch.compile(train_step, backend="mixedprec")
losses = [step(torch.ones(3, 4)).item() for _ in range(4)]
import fxpass
assert losses[-1] < losses[0] and fxpass.of(step).stats().steps == 4
print(fxpass.__file__)
"""


def run(*command: str | Path, **environment: str) -> str:
    """The output of a command that has to succeed, in the project's folder."""
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    pytest.importorskip("build")
    shutil.copytree(ROOT / "fxpass", tmp_path / "source" / "fxpass")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", tmp_path / "source")
    wheel, _ = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix != ".whl")
    run(sys.executable, "-m", "twine", "check", "--strict", *(tmp_path / "dist").iterdir())

    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    packages = next((tmp_path / "empty" / "lib").glob("python*")) / "site-packages"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel)
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"])
    where = run(tmp_path / "empty" / "bin" / "python", "-I", "-c", SCRIPT).strip()
    assert Path(where).is_relative_to(packages)


def test_the_documentation_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, NO_MKDOCS_2_WARNING="1")
    page = (tmp_path / "api" / "index.html").read_text()
    public = [
        name for name, value in vars(fxpass).items() if isinstance(value, type) or name in ("of", "step")
    ]
    missing = [name for name in public if f'.{name}"' not in page]
    assert not missing, "not in docs/api.md"
