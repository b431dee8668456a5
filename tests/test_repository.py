"""The house rules of DESIGN: rooms, relative imports, lazy entry point, shipped files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import packed_files

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ROOT / "__init__.py",
    *(p for room in ("bas_core", "nodes", "training", "lab") for p in (ROOT / room).rglob("*.py")),
]
CORE_MAY_IMPORT = {"torch", "safetensors", "numpy", "einops"}


def imports(path):
    """(level, dotted name) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def room_reached(path, level, name):
    """The room that a relative import of `path` ends in."""
    folder = path.parent
    for _ in range(level - 1):
        folder = folder.parent
    target = folder.joinpath(*name.split(".")) if name else folder
    return target.relative_to(ROOT).parts[:1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_between_rooms_run_one_way(path):
    """nodes and lab -> training -> bas_core; the core imports what ComfyUI users have; comfy is for nodes alone."""
    room = path.relative_to(ROOT).parts[0]
    forbidden = {
        "bas_core": {"training", "nodes", "lab"},
        "training": {"nodes", "lab"},
        "nodes": {"lab"},
        "lab": {"nodes"},
    }.get(room, set())
    for level, name in imports(path):
        top = name.split(".")[0]
        if level:
            assert not forbidden & set(room_reached(path, level, name)), f"{path} reaches into {name}"
            continue
        assert top != "ba_solver", f"{path} imports its own package absolutely"
        if room != "nodes":
            assert top not in ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"), path
        if room == "bas_core":
            assert top in CORE_MAY_IMPORT or top in sys.stdlib_module_names, f"{path} imports {name}"
            assert top not in ("argparse", "tkinter"), path


# What passes through each house, in order; a room knows those before it alone. CONTRIBUTING says the same.
ORDERS = {
    "bas_core": (
        ("flow", "guidance", "grids", "quadrature", "files"),
        ("sit", "sidenet"),
        ("prediction",),
        ("strength", "schedule"),
        ("solver", "selection"),
        ("checkpoint", "editing"),
    ),
    "training": (
        ("baselines", "backbones"),
        ("recording",),
        ("network",),
        ("schedules",),
        ("measuring", "drawing"),
        ("demo", "train", "presets", "extra_cfg", "make", "sample", "compare"),
        ("cli",),
    ),
    "nodes": (
        ("models",),
        ("sampling",),
        ("editing", "comparing", "making"),
        ("compare_nodes", "edit_nodes", "make_nodes", "sampling_nodes", "sidenet_nodes", "sit_nodes", "ksampler"),
    ),
}


@pytest.mark.parametrize(("house", "room"), [(h, r) for h, order in ORDERS.items() for rooms in order for r in rooms])
def test_one_goes_from_room_to_room_and_never_back(house, room):
    names = [set(rooms) for rooms in ORDERS[house]]
    place = next(number for number, rooms in enumerate(names) if room in rooms)
    later = set().union(*names[place + 1 :])
    found = [*(ROOT / house / room).rglob("*.py"), *(ROOT / house).glob(f"{room}.py")]
    assert found, f"{house}/{room} is not there (any more)"
    for path in found:
        for level, name in imports(path):
            if level and path.parents[level - 1] == ROOT / house:
                assert name.split(".")[0] not in later, f"{path} reaches up to {name}"


def test_functions_are_short():
    """At most 60 lines each; ruff holds the number of their parameters."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} has too many lines"


def test_no_v1_mappings_anywhere():
    """NODE_CLASS_MAPPINGS would silently disable the V3 entry point."""
    assert not [p for p in SOURCES if "NODE_CLASS_MAPPINGS" in p.read_text()]


def run_without(blocked, code):
    """Run code in a process of its own, where some modules cannot be imported."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd="/", check=False)


def test_imports_without_comfyui_or_extras():
    """The package and the core import where only torch, numpy, einops and safetensors are."""
    blocked = ["matplotlib", "tyro", "tqdm", "diffusers", "torchdiffeq", "comfy", "comfy_api", "scipy"]
    code = """
import ba_solver, ba_solver.bas_core, ba_solver.nodes, ba_solver.training
print(callable(ba_solver.comfy_entrypoint), ba_solver.bas_core.get_rule("lobatto4").exactness)
from ba_solver.training.cli import main
sys.exit(main(["demo"]))
"""
    done = run_without(blocked, code)
    assert done.stdout.split() == ["True", "5"], done.stderr
    assert done.returncode == 1 and "pip install 'ba-solver[bench]'" in done.stderr


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("tyro", ["train"], "train"),
        ("matplotlib", ["evaluate"], "train"),
        ("diffusers", ["record", "--backbone", "diffusers:x", "--prompts", "p", "--out", "o"], "diffusers"),
        ("torchdiffeq", ["demo"], "bench"),
    ],
)
def test_a_missing_extra_is_named(missing, command, extra, tmp_path):
    """In a process of its own, which has not imported the module before it goes missing."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.path[:0] = {sys.path!r}\n"
        f"from ba_solver.training.cli import main; sys.exit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert f"{missing} is not installed. Install the extra: pip install 'ba-solver[{extra}]'" in done.stderr
    assert done.returncode == 1


def test_ci_runs_the_very_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    command = next(line for line in readme.splitlines() if line.startswith("python3 -m venv") and "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_example_runs():
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "6 2 5.0\n", done.stderr


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT / "weights").iterdir()) <= 12e6


def test_what_makes_sidenets_in_comfyui_needs_no_more_than_comfyui_has():
    """From the zip's files alone, without the libraries of the command line."""
    blocked = ["accelerate", "tyro", "tomli", "matplotlib", "tensorboard", "diffusers", "torchdiffeq", "scipy"]
    code = """
import ba_solver.training.make, ba_solver.training.presets
print(sorted(name for name in sys.modules if name.startswith("ba_solver.training")))
"""
    done = run_without(blocked, code)
    assert done.returncode == 0, done.stderr
    shipped = {
        name.removesuffix(".py").replace("/", ".") for name in packed_files(ROOT) if name.startswith("training/")
    }
    used = {name.removeprefix("ba_solver.") for name in ast.literal_eval(done.stdout)} - {"training"}
    assert used <= shipped | {name.removesuffix(".__init__") for name in shipped}
