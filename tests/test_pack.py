"""What the ComfyUI pack is made of, as far as it can be tested without ComfyUI."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from ba_solver.lab.shapes import CLASS_NAMES
from ba_solver.nodes.models.classes import CLASSES, DEMO_CLASSES, class_index
from ba_solver.nodes.report import FONT, error_curves, error_plot
from comfyui import packed_files
from PIL import ImageFont

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


def own_ids():
    """Every node id, read off the sources as the Manager's scanner reads them: literal strings."""
    found = []
    for path in (ROOT / "nodes").glob("*_nodes.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "node_id":
                assert isinstance(node.value, ast.Constant), f"{path}: a node id must be a literal"
                found.append(node.value.value)
    return found


def test_node_ids_are_literal_and_unique_and_documented():
    ids = own_ids()
    assert len(ids) == len(set(ids)) == 12
    assert {p.stem for p in (ROOT / "web" / "docs").glob("*.md")} == set(ids)
    assert set(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())) == set(ids)


def test_zip_holds_the_pack_and_its_help_and_not_the_command_line():
    files = packed_files(ROOT)
    assert {name.split("/")[0] for name in files if "/" in name} == {
        "bas_core", "example_workflows", "locales", "nodes", "subgraphs", "training", "web", "weights",
    }  # fmt: skip
    assert not files & {"training/cli.py", "training/backbones/diffusers.py", "training/demo/assets.py"}
    for name in ("web/docs/BASolverSampler.md", "weights/demo_sit.safetensors", "nodes/models/imagenet_classes.txt"):
        assert name in files
    assert sum((ROOT / name).stat().st_size for name in files) < 12e6


def test_registry_metadata_is_complete():
    toml = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    project, comfy = toml["project"], toml["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert project["urls"]["Repository"] and project["license"] == {"file": "LICENSE"}
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["Icon"] and comfy["Banner"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    known = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}
    given = {c.removeprefix("Environment :: ") for c in project["classifiers"] if c.startswith("Environment")}
    assert given <= known, "one unknown classifier makes the registry drop all of them"


def test_requirements_are_empty():
    """ComfyUI brings everything; a package named here could replace a user's CUDA torch."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_needed_comfyui_is_the_same_everywhere():
    from ba_solver.nodes import OLDEST_COMFYUI

    oldest = ".".join(map(str, OLDEST_COMFYUI))
    assert f'requires-comfyui = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
    assert f"comfyui: [v{oldest}, " in (ROOT / ".github" / "workflows" / "comfyui.yml").read_text()


def workflow(name):
    return pytest.importorskip("yaml").safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_a_new_version_is_published_wherever_it_is_in_the_push(tmp_path):
    """The very step of the workflow, on a history of its own."""
    (step,) = (step for step in workflow("publish.yml")["jobs"]["publish"]["steps"] if step.get("id") == "version")

    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    for version, other in (("0.1.0", 0), ("0.2.0", 0), ("0.2.0", 1), ("0.2.0", 2)):
        (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n# {other}\n')
        git("add", ".")
        git("commit", "-qm", "x")
        commits.append(git("rev-parse", "HEAD"))
    for before, expected in ((commits[0], "true"), (commits[1], "false"), (commits[2], "false"), ("0" * 40, "true")):
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        environment = {**os.environ, "BEFORE": before, "GITHUB_OUTPUT": str(output)}
        subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=True)
        assert output.read_text() == f"changed={expected}\n"


def test_workflows_name_files_and_versions_that_are_there():
    steps = workflow("comfyui.yml")["jobs"]["nodes"]
    floor, developed, newest = steps["strategy"]["matrix"]["comfyui"]
    assert (floor, developed, newest) == ("v0.14.0", "v0.29.0", "master")
    commands = [step["run"] for job in (steps, workflow("publish.yml")["jobs"]["publish"]) for step in job["steps"]
                if "run" in step]  # fmt: skip
    assert "pytest -m comfyui" in commands and "bash .ci/run" in commands
    assert (ROOT / ".ci" / "run").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflows_are_whole_and_have_a_picture(path):
    content = json.loads(path.read_text())
    nodes = {node["id"]: node for node in content["nodes"]}
    assert {node["type"] for node in nodes.values()} & set(own_ids())
    for link, source, slot, target, entry, kind in content["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry]["link"] == link and nodes[target]["inputs"][entry]["type"] in (kind, "*")
    assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


def test_class_names():
    assert DEMO_CLASSES == CLASS_NAMES
    assert len(CLASSES) == 1010 and CLASSES["ImageNet 207: golden retriever"] == (207, 1000)
    assert class_index("demo 4: star", -1, 10) == 4 and class_index("demo 4: star", 7, 10) == 7
    for entry, index, known, message in (
        ("demo 4: star", 10, 10, "classes 0 to 9; index is 10"),
        ("demo 4: star", -1, 1000, "one of 10 classes, and this model has 1000.*ImageNet"),
        ("ImageNet 207: golden retriever", -1, 10, "one of 1000 classes, and this model has 10.*demo"),
        ("dog", -1, 10, "no class 'dog'"),
    ):
        with pytest.raises(ValueError, match=message):
            class_index(entry, index, known)


def test_error_tables_are_read_as_the_trainer_writes_them():
    """Each solver on its better grid; rows that are none are left out."""

    def row(label, grid, calls, error):
        return {"label": label, "grid": grid, "nfe": calls, "error": error, "seconds": 1.0}

    rows = [row("BA-solver", "uniform", 5, 0.1), row("BA-solver", "best", 5, 0.08), row("BA-solver", "best", 7, 0.04)]
    rows += [row("BA-solver", "uniform", 7, 0.05), row("Euler", "uniform", 5, 0.2), row("Euler", "uniform", 100, 0.01)]
    expected = {"BA-solver": {5: 0.08, 7: 0.04}, "Euler": {5: 0.2, 100: 0.01}}
    assert error_curves({"endpoint_error": rows, "residual_variance": {"first": 0.5}}) == expected
    spoilt = [row("x", "best", 5, float("nan")), row("x", "best", "5", 0.1), row("x", "best", 5, 0.0), "x", {}]
    assert error_curves({"endpoint_error": [*rows, *spoilt]}) == expected
    assert error_curves({"endpoint_error": "x"}) == error_curves({}) == {}


def test_plots_show_their_curves():
    empty, one = error_plot({}), error_plot({"SideNet": {5: 0.08}})
    two = error_plot({"SideNet": {5: 0.08, 7: 0.04}, "Euler": {5: 0.2, 7: 0.1}})
    assert empty.shape == one.shape == two.shape and empty.dtype == torch.float32
    assert min((a - b).abs().max() for a, b in ((empty, one), (one, two))) > 0.5
    _, top, _, bottom = ImageFont.load_default(FONT).getbbox("H")
    assert bottom - top >= one.shape[1] / 30, "letters can be read on a node"


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_model_files_of_templates_can_be_downloaded(path):
    """ComfyUI offers what a loader's properties name; the demo's files come with the pack."""
    for node in json.loads(path.read_text())["nodes"]:
        files = [value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")]
        offered = node["properties"].get("models", [])
        assert sorted(files) == sorted(model["name"] for model in offered), f"{path.stem}: {node['type']}"
        assert all(model["url"].startswith("https://") and model["directory"] for model in offered)
