"""The shape of the package: who imports whom, which door a library enters by, and what may appear nowhere."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, environment

MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "toolkit").rglob("*.py"))
TOP_LEVEL = {
    "toolkit", "recipes", "tests", "setup.cfg", "pyproject.toml", "README.md", "Makefile", "LICENSE", "constraints.txt",
}  # fmt: skip

# What each part of the package may import of the package, beside itself.
LEAVES = (
    "toolkit.errors",
    "toolkit.failpoint",
    "toolkit.config",
    "toolkit.redact",
    "toolkit.disk",
    "toolkit.strict_json",
)
ALLOWED = {
    "toolkit.errors": ("toolkit.redact",),
    "toolkit.redact": (),
    "toolkit.disk": ("toolkit.failpoint",),
    "toolkit.strict_json": (),
    "toolkit.failpoint": (),
    "toolkit.config": ("toolkit.errors",),
    "toolkit.data": LEAVES,
    "toolkit.model": LEAVES,
    "toolkit.evaluation": (*LEAVES, "toolkit.data", "toolkit.model"),
    "toolkit.training.trainer": (*LEAVES, "toolkit.data", "toolkit.model", "toolkit.evaluation", "toolkit.training"),
    "toolkit.training.resume_worker": ("toolkit",),
    "toolkit.training": (*LEAVES, "toolkit.data", "toolkit.model", "toolkit.evaluation"),
    "toolkit.recipe": ("toolkit",),
    "toolkit.cli": ("toolkit",),
}
TRAINS = ("toolkit.training.trainer", "toolkit.training.resume_worker", "toolkit.recipe")
DOORS = {
    "accelerate": {"toolkit/training/trainer.py"},
    "wandb": {"toolkit/training/wandb_mirror.py", "toolkit/training/wandb_worker.py", "toolkit/training/wandb_sync.py"},
    "tiktoken": {"toolkit/data/tokenizer.py"},
    "tokenizers": {"toolkit/data/tokenizer.py"},
    "datasets": {"toolkit/data/sources.py", "toolkit/data/hub.py"},
    "pyarrow": {"toolkit/data/sources.py"},
    "safetensors": {
        "toolkit/training/checkpoint.py",
        "toolkit/training/tensor_file.py",
        "toolkit/model/huggingface.py",
    },
    "tyro": {"toolkit/recipe.py", "toolkit/cli.py"},
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            inside = [f"{module}.{alias.name}" for alias in node.names]
            if module.startswith("toolkit") and all(_is_module(name) for name in inside):
                yield from ((name, node.lineno) for name in inside)
            else:
                yield module, node.lineno


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    name = module_name(path)
    part = next((part for part in ALLOWED if name == part or name.startswith(part + ".")), None)
    if part is None:
        assert name == "toolkit"
        return
    for imported, line in imports(path):
        if not imported.startswith("toolkit"):
            continue
        allowed = (*ALLOWED[part], part)
        assert any(imported == a or imported.startswith(a + ".") for a in allowed), f"{path}:{line} imports {imported}"
        assert imported != "toolkit.training.trainer" or part in TRAINS, f"{path}:{line} imports the trainer"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_third_party_packages_enter_by_their_door(path: Path) -> None:
    for imported, line in imports(path):
        package = imported.partition(".")[0]
        assert str(path) in DOORS.get(package, {str(path)}), f"{path}:{line} imports {package}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_pickles_evaluates_or_prints(path: Path) -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for imported, line in imports(path):
        assert imported.partition(".")[0] not in forbidden, f"{path}:{line} imports {imported}"
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{path}:{node.lineno} calls {called}"
        assert called not in {"torch.load", "torch.save", "eval", "exec", "yaml.load", "pandas.read_pickle"}, where
        assert not any(k.arg == "allow_pickle" for k in node.keywords), where
        assert not any(k.arg == "trust_remote_code" for k in node.keywords), where
        assert not called.endswith(("broadcast_object_list", "all_gather_object", "gather_object")), where
        if str(path) not in ("toolkit/cli.py", "toolkit/errors.py"):
            assert called != "print", where


def test_every_module_imports_without_the_optional_packages() -> None:
    """wandb, datasets and the extras can be missing: only what needs them stops working."""
    optional = ("wandb", "datasets", "pyarrow", "transformers", "tokenizers", "matplotlib")
    names = [module_name(path) for path in MODULES if path.name != "wandb_worker.py"]
    code = f"import sys, importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    blocked = f"for name in {optional!r}:\n    sys.modules[name] = None"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}\n{code}"], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_settings_need_no_torch() -> None:
    code = "import sys, toolkit.config, toolkit.recipe, recipes.train_124m; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_top_level_holds_what_the_design_names() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split(
        "\n"
    )
    assert {name.partition("/")[0] for name in tracked if name and not name.startswith(".")} <= TOP_LEVEL


def test_every_public_name_of_a_public_module_has_a_docstring() -> None:
    for path in MODULES:
        module = importlib.import_module(module_name(path)) if path.name != "wandb_worker.py" else None
        if module is not None and path.name != "__init__.py":
            assert module.__doc__, f"{path} has no docstring"


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "FAULTS.md").read_text()))
    source = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 50
    assert sorted(name for name in named if f"def {name}(" not in source) == []


def test_no_wall_clock_decides_anything() -> None:
    """Durations come from the monotonic clock; the time of day is only ever written down."""
    for path in MODULES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"time.time", "time.time_ns", "datetime.utcnow"}, (
                    f"{path}:{node.lineno} calls {called}"
                )
                assert not called.endswith((".st_mtime", "getmtime")), f"{path}:{node.lineno} calls {called}"
