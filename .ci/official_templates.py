"""ComfyUI's official templates with this pack in them: which are valid, which run, what the others say.

Each template that samples an image or a video is opened in ComfyUI's own page, which makes a prompt of it. In the
prompt, Apply SideNet goes in front of every sampler, and `ba_solver` in its place. ComfyUI checks the prompt; where all
models are of one kind that `tests/comfy_models.py` knows, it is run, in small, on random models of that kind.

    COMFYUI_PATH=… python .ci/official_templates.py FOLDER-OF-TEMPLATES [ComfyUI's arguments …]

FOLDER is `templates` of the package comfyui-workflow-templates-json, unpacked. Needs `playwright` and Chromium. Writes
`official_templates.csv`.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
import urllib.error
import wave
from collections import Counter
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import comfyui  # noqa: E402

comfyui.require()

import av  # noqa: E402
import comfy_models  # noqa: E402
import folder_paths  # noqa: E402
from comfy_server import install, serve  # noqa: E402
from PIL import Image  # noqa: E402

# What tells the kind of a model file; the first that fits. None: no stand-in of its class.
KINDS = (
    (r"flux[-.]?2|flux3|fill|kontext|canny|depth|pid_flux", None),
    (r"flux[-.]?1|flux\.1", "flux"),
    (r"sd3", "sd3"),
    (r"wan2\.[12]_t2v|wan2\.1_t2v", "wan"),
    (r"sd_?xl_(base|turbo)", "sdxl"),
    (r"neta|lumina", "lumina2"),
)
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
MODEL_LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
INPUT_FILES = {
    "LoadImage": ("image", "example.png"),
    "LoadImageMask": ("image", "example.png"),
    "LoadVideo": ("file", "example.mp4"),
    "LoadAudio": ("audio", "example.wav"),
}
SMALL = {"width": 64, "height": 64, "length": 5, "batch_size": 1, "steps": 4, "frames": 5, "num_frames": 5}


def kind_of(name):
    """The stand-in's kind for a model file; None where there is none."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, name.lower())), None)


def with_ba_solver(prompt, sidenet):
    """A prompt with Apply SideNet in front of every sampler and `ba_solver` in its place."""
    changed = {key: {**part, "inputs": dict(part["inputs"])} for key, part in prompt.items()}
    added = {}

    def applied(link):
        key = f"ba:apply:{link[0]}:{link[1]}"
        inputs = {"model": link, "sidenet_name": sidenet, "strength": 1.0}
        added[key] = {"class_type": "BASolverApplySideNet", "inputs": inputs}
        return [key, 0]

    for part in changed.values():
        inputs = part["inputs"]
        if part["class_type"] not in SAMPLERS:
            continue
        if "sampler_name" in inputs:
            inputs["sampler_name"] = "ba_solver"
        else:
            inputs["sampler"] = ["ba:sampler", 0]
            added["ba:sampler"] = {"class_type": "BASolverSampler", "inputs": {"method": "bi_anchor"}}
        takers = [inputs]
        if "guider" in inputs and inputs["guider"][0] in changed:
            takers = [changed[inputs["guider"][0]]["inputs"]]
        for taker in takers:
            for name in [name for name in taker if name.startswith("model")]:
                if isinstance(taker[name], list):
                    taker[name] = applied(taker[name])
    return changed | added


def in_small(prompt, kind):
    """A prompt whose files are a kind of stand-in, of small pictures and few steps."""
    for part in prompt.values():
        for name, value in part["inputs"].items():
            if isinstance(value, str) and value.endswith(".safetensors") and not part["class_type"].startswith("BA"):
                part["inputs"][name] = kind
            if isinstance(value, int) and not isinstance(value, bool) and name in SMALL:
                part["inputs"][name] = min(value, SMALL[name])
    return prompt


class Page:
    """ComfyUI's page, for making prompts of workflows."""

    def __init__(self, browser, url):
        self.page = browser.new_page()
        self.page.goto(url)
        self.page.wait_for_function("window.app && window.app.graph && window.app.canvas", timeout=180_000)
        self.page.wait_for_timeout(5000)

    def prompt(self, content):
        self.page.evaluate("async content => { await window.app.loadGraphData(content) }", content)
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")


def wrong_with(server, prompt):
    """What ComfyUI has against a prompt, in words; where a file is missing, another stands for it."""
    for _ in range(12):
        try:
            told = json.loads(server.post("/prompt", {"prompt": prompt}))
            server.drop()
        except urllib.error.HTTPError as refused:
            told = json.load(refused)
        nodes = told.get("node_errors", {}).items()
        found = [(prompt[key], error) for key, node in nodes for error in node.get("errors", [])]
        unknown = [f"{part['class_type']}: {e['details']}" for part, e in found if not choose_another(part, e)]
        if unknown or not found:
            return "; ".join(unknown) or told.get("error", {}).get("message", "")
    return "files missing again and again"


def choose_another(part, error):
    """Where a node's file is missing, let it take one that is there. Returns whether that was the error."""
    if error["type"] == "custom_validation_failed" and part["class_type"] in INPUT_FILES:
        name, file = INPUT_FILES[part["class_type"]]
        part["inputs"][name] = file
        return True
    if error["type"] != "value_not_in_list":
        return False
    options = error["extra_info"].get("input_config") or [[]]
    listed = options[0] if isinstance(options[0], list) else options[1].get("options") or []
    if listed:
        part["inputs"][error["extra_info"]["input_name"]] = listed[0]
    return bool(listed)


def run(server, prompt):
    """What comes of a prompt, in a word and in the words that the user would read."""
    entry = server.queue(prompt, 300)
    if entry["status"]["status_str"] == "success":
        return "runs", ""
    failed = next((d for k, d in entry["status"]["messages"] if k == "execution_error"), {})
    where, what = failed.get("node_type", ""), str(failed.get("exception_message", "")).strip()
    ours = where in SAMPLERS or where.startswith("BASolver")
    return "fails" if ours else "valid", f"{where}: {what[:200]}"


def prepare(base):
    """The pack, the stand-ins, and a file of each sort to choose."""
    install(base)
    (base / "custom_nodes" / "stand_ins").symlink_to(ROOT / "tests" / "stand_ins")
    for folder in folder_paths.folder_names_and_paths:
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base / "models" / folder / "placeholder.safetensors").touch()
    (base / "input").mkdir()
    Image.new("RGB", (64, 64), "grey").save(base / "input" / "example.png")
    with wave.open(str(base / "input" / "example.wav"), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(32000))
    with av.open(str(base / "input" / "example.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for _ in range(8):
            film.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), "grey"))))
        film.mux(stream.encode(None))
    (base / "models" / "sidenets").mkdir(parents=True, exist_ok=True)
    for kind, tiny in comfy_models.TINY.items():
        comfy_models.make_sidenet(base / "models" / "sidenets" / f"{kind}.safetensors", tiny.latent[0])


def main(templates, *arguments):
    listed = json.loads((templates / "index.json").read_text())
    names = [t["name"] for group in listed for t in group["templates"] if t["mediaType"] in ("image", "video")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        with serve(Path(folder), *arguments) as server, sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = Page(browser, server.url)
            for name in names:
                text = (templates / f"{name}.json").read_text()
                if not any(f'"{sampler}"' in text for sampler in SAMPLERS):
                    continue
                rows.append([name, *attempt(server, page, json.loads(text))])
                print(*rows[-1], sep=" | ", flush=True)  # noqa: T201
            browser.close()
    with Path("official_templates.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["template", "kind", "outcome", "said"], *rows])
    print(Counter(row[2] for row in rows))  # noqa: T201


def attempt(server, page, content):
    """Kind, outcome and what was said, of one template."""
    try:
        prompt = page.prompt(content)
    except Exception as error:
        return "", "not opened", str(error).splitlines()[0][:200]
    files = [
        p["inputs"].get(MODEL_LOADERS[p["class_type"]]) for p in prompt.values() if p["class_type"] in MODEL_LOADERS
    ]
    kinds = {kind_of(file) for file in files if isinstance(file, str)}
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    if not any(part["class_type"] in SAMPLERS for part in prompt.values()):
        return kind or "", "no sampler", "every sampler is bypassed"
    changed = with_ba_solver(prompt, f"{kind or 'flux'}.safetensors")
    if kind is not None:
        changed = in_small(changed, kind)
    wrong = wrong_with(server, changed)
    if "custom node may not be installed" in wrong:
        return kind or "", "newer", wrong
    if wrong:
        return kind or "", "invalid", wrong
    return (kind, *run(server, changed)) if kind is not None else ("", "valid", "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
