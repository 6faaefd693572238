"""Which room may import which: enforced, so that the parts stay visible from the folder list."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "unisd_megatron"

# Floor by floor, what each room may import of the others. The ground is open to all.
GROUND = {
    "errors",
    "setting",
    "stated",
    "accelerator",
    "caches",
    "config",
    "modes",
    "batch",
    "grid",
    "exchange",
    "processes",
    "resolve",
    "validation",
    "__init__",
}
MAY_IMPORT: dict[str, set[str]] = {
    "losses": set(),
    "mechanisms": {"losses"},
    "data": set(),
    "families": set(),
    "plan": {"families"},
    "mcore": {"losses", "mechanisms", "families"},
    "weights": {"families"},
    "rollout": {"families", "weights"},
    "convert": {"data", "families", "mcore", "weights"},
    "train": {"losses", "mechanisms", "data", "families", "mcore", "weights", "rollout", "convert", "evaluate", "prepare"},
    "prepare": {"data", "mcore", "weights", "rollout", "convert", "evaluate"},
    "evaluate": {"losses", "data", "mcore", "weights", "rollout", "convert"},
    "parity": {"losses", "mechanisms", "families", "mcore", "weights", "train", "plan"},
    "bench": {"losses", "mechanisms", "data", "families", "mcore", "weights", "rollout", "train"},
    "report": {"evaluate"},
    "experiments": {"data", "convert", "evaluate", "prepare"},
    "selftest": {"losses", "mcore", "weights", "train", "parity", "bench"},
    "cli": {
        "bench",
        "data",
        "convert",
        "evaluate",
        "experiments",
        "families",
        "mcore",
        "parity",
        "plan",
        "prepare",
        "report",
        "selftest",
        "train",
        "weights",
    },
    "__main__": {"cli"},
}
# The door of each heavy dependency.
ONLY_IN = {
    "megatron": ("mcore/",),
    "transformer_engine": ("mcore/",),
    "vllm": ("rollout/",),
    "httpx": ("rollout/server.py",),
    "argparse": ("cli/", "rollout/serve.py"),
    "jinja2": ("report/",),
    "wandb": ("train/watching.py",),
    "datasets": ("data/sources.py",),
    "sentence_transformers": ("prepare/embeddings.py",),
    "xgrammar": ("rollout/structured.py",),
    "transformers": ("rollout/transformers.py", "convert/", "weights/tiny.py", "weights/internlm3.py"),
}
FLOORS_WITHOUT_MEGATRON = [
    "config",
    "validation",
    "modes",
    "batch",
    "errors",
    "losses",
    "mechanisms.objective",
    "data",
    "families",
    "plan",
    "rollout.pool",
    "rollout.guard",
    "rollout.serve",
    "cli.parser",
    "prepare.needs",
    "experiments.run",
    "selftest.suite",
    "report.run",
]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """`(line, module)` of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            if node.module == "unisd_megatron":
                yield from ((node.lineno, f"unisd_megatron.{alias.name}") for alias in node.names)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_rooms_import_only_what_lies_below() -> None:
    wrong = []
    for path in files():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = GROUND | {room} | MAY_IMPORT.get(room, set())
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "unisd_megatron" and len(parts) > 1 and parts[1] not in allowed and parts[1] != "__version__":
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_listed() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()}
    assert rooms == GROUND | MAY_IMPORT.keys()


def test_heavy_dependencies_have_one_door() -> None:
    wrong = []
    for path in files():
        relative = str(path.relative_to(PACKAGE))
        for line, module in imports(path):
            doors = ONLY_IN.get(module.split(".")[0])
            if doors and not relative.startswith(doors):
                wrong.append(f"{relative}:{line} imports {module}; its door is {' or '.join(doors)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", FLOORS_WITHOUT_MEGATRON)
def test_lower_floors_load_no_megatron(module: str) -> None:
    light = module not in ("losses", "mechanisms.objective", "data", "rollout.pool")
    absent = ["megatron", "vllm", "transformer_engine", "transformers"] + (["torch"] if light else [])
    code = f"import sys, unisd_megatron.{module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_files_stay_readable_in_one_sitting() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in files() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
