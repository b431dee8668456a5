"""Draw every picture of the README and every thumbnail anew, from the weights that ship.

Run with COMFYUI_PATH set, in a Python that has ComfyUI's requirements, this package with its `bench` extra, and
`playwright` (for which Debian's `chromium` is browser enough). Takes some minutes on a CPU.
"""

import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import comfyui  # noqa: E402

comfyui.require()

from comfy_server import install, serve  # noqa: E402

DOCS, EXAMPLES, WORKFLOWS = ROOT / "docs", ROOT / "example_workflows", ROOT / "tests" / "workflows"
SIDE = 512  # of a thumbnail, pixels
# Thumbnails of workflows that run anywhere: rows of (title of the preview, what is written on it, which images).
DRAWN = {
    "demo": [("BA-Solver, 5 calls", "BA-Solver, 5 calls", (0, 3)), ("Euler, 50 calls", "Euler, 50 calls", (0, 3))],
    "demo_ksampler": [("7 calls", "KSampler: ba_solver, 7 calls", (0, 1)), ("7 calls", "", (2, 3))],
    "inpaint": [("The picture", "before", (0,)), ("Painted anew on the right", "right half anew", (0,))],
    "edit_demo": [("The images", "hearts", (0, 1)), ("Edited", "as stars", (0, 1))],
    "edit_masked": [("The images", "squares", (0, 1)), ("Edited on the right", "discs on the right", (0, 1))],
    "reconstruct": [
        ("There and back: 7 steps each way", "there and back, 7 steps", (0, 1)),
        ("Along the trajectory: exact", "along the trajectory: exact", (0, 1)),
    ],
}
# Those that need a user's model files show their graph.
GRAPHS = {
    "flux": "FLUX",
    "sd3": "SD 3.5",
    "wan_video": "Wan 2.2 video",
    "edit_flux": "FLUX, edited",
    "make_sidenet_flux": "SideNet for FLUX",
}

# One that needs none shows its graph after a run, its right end.
RUN_GRAPHS = {"compare": "Compare", "make_sidenet": "SideNet made here"}


def label(picture, text, place=(8, 8)):
    """A picture with a few words on it."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    box = draw.textbbox((place[0] + 8, place[1] + 4), text, font=font)
    if text:
        draw.rectangle((*place, box[2] + 8, box[3] + 8), fill="black")
        draw.text((place[0] + 8, place[1] + 4), text, fill="white", font=font)
    return picture


def tile(image, side):
    """An image [H, W, 3] in 0..1 as a square picture without smoothing."""
    return Image.fromarray((image.numpy() * 255).round().astype(np.uint8)).resize((side, side), Image.NEAREST)


def previews(server, name):
    """What a workflow's previews show, by title: [B, H, W, 3] in 0..1."""
    graph = json.loads((WORKFLOWS / f"{name}_api.json").read_text())
    entry = server.queue(graph)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"{name}: {entry['status']}")
    nodes = {part["_meta"]["title"]: node for node, part in graph.items() if part["class_type"] == "PreviewImage"}
    return {title: server.images(entry, node) for title, node in nodes.items()}


def thumbnail(shown, rows):
    """Rows of images, each with a few words."""
    picture = Image.new("RGB", (SIDE, SIDE), "#1b1b1b")
    single = len(rows[0][2]) == 1  # one image a row: side by side instead
    for number, (title, words, which) in enumerate(rows):
        for column, index in enumerate(which):
            place = (number, 0.5) if single else (column, number)
            picture.paste(tile(shown[title][index], SIDE // 2), tuple(int(p * SIDE / 2) for p in place))
        corner = (8 + number * SIDE // 2, SIDE // 4 - 44) if single else (8, 8 + number * SIDE // 2)
        label(picture, words, corner)
    return picture


def pairs(columns, side=128, gap=4, between=16):
    """Images above, their edits below; one list of (above, below) a group."""
    width = sum(len(group) * (side + gap) - gap for group in columns) + between * (len(columns) - 1)
    picture, left = Image.new("RGB", (width, 2 * side + gap), "white"), 0
    for group in columns:
        for above, below in group:
            picture.paste(tile(above, side), (left, 0))
            picture.paste(tile(below, side), (left, side + gap))
            left += side + gap
        left += between - gap
    return picture


# What a fresh ComfyUI puts over the canvas; with it off, a picture shows the graph alone.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.VueNodes.Enabled": False,
}
MARGIN = 20  # around the graph, in its own units
MENU = 60  # pixels above the picture, where the page keeps a button
# Moves the canvas: the graph's top left corner to (0, MENU), `scale` pixels a unit. Returns the graph's size.
PLACE = """([margin, menu, scale]) => {
    const { graph, canvas } = window.app;
    const boxes = graph._nodes.map(node => node.getBounding());
    const [left, top] = [0, 1].map(side => Math.min(...boxes.map(box => box[side])) - margin);
    const [right, bottom] = [0, 1].map(side => Math.max(...boxes.map(box => box[side] + box[side + 2])) + margin);
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = -left;
    canvas.ds.offset[1] = -top + menu / scale;
    canvas.setDirty(true, true);
    return [right - left, bottom - top];
}"""


class Page:
    """ComfyUI in a browser, the canvas alone."""

    def __init__(self, browser, server):
        self.server, self.page = server, browser.new_page()
        self.page.goto(server.url)
        self.page.wait_for_function("window.app && window.app.graph && window.app.canvas", timeout=180_000)
        self.page.wait_for_timeout(5000)
        self.page.evaluate("() => window.app.extensionManager.command.execute('Workspace.ToggleFocusMode')")

    def picture(self, name, scale, run=False):
        """An example workflow, `scale` pixels a unit of the graph, after a run of it if wanted."""
        content = json.loads((EXAMPLES / f"{name}.json").read_text())
        self.page.evaluate("async content => { await window.app.loadGraphData(content) }", content)
        self.page.wait_for_timeout(2000)
        if run:
            self.page.evaluate("async () => { await window.app.queuePrompt(0) }")
            self._wait()
        width, height = (int(side * scale) for side in self.page.evaluate(PLACE, [MARGIN, MENU, scale]))
        self.page.set_viewport_size({"width": width, "height": height + MENU})
        self.page.evaluate(PLACE, [MARGIN, MENU, scale])
        self.page.wait_for_timeout(2000)
        shot = self.page.screenshot(clip={"x": 0, "y": MENU, "width": width, "height": height})
        return Image.open(io.BytesIO(shot)).convert("RGB")

    def _wait(self):
        """Until the queue has been seen empty twice, and what was drawn is on the page."""
        for _ in range(2):
            self.page.wait_for_timeout(2000)
            while any(self.server.json("/queue").values()):
                self.page.wait_for_timeout(500)


def pretend_models(base):
    """Empty files under the names that the examples ask for, or their loaders would be framed in red."""
    for name in GRAPHS:
        for node in json.loads((EXAMPLES / f"{name}.json").read_text())["nodes"]:
            for value in node.get("widgets_values") or []:
                if str(value).endswith(".safetensors"):
                    for folder in ("diffusion_models", "text_encoders", "vae", "checkpoints"):
                        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
                        (base / "models" / folder / value).touch()
    (base / "input").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(base / "input" / "example.png")


def draw(base):
    install(base)
    pretend_models(base)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    with serve(base) as server:
        shown = {name: previews(server, name) for name in DRAWN}
        for name, rows in DRAWN.items():
            thumbnail(shown[name], rows).save(EXAMPLES / f"{name}.jpg", quality=90)
        whole, masked = shown["edit_demo"], shown["edit_masked"]
        edits = zip(whole["The images"], whole["Edited"], strict=True)
        halves = zip(masked["The images"], masked["Edited on the right"], strict=True)
        pairs([list(edits), list(halves)]).save(DOCS / "editing.png")
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = Page(browser, server)
            page.picture("demo", 0.65, run=True).save(DOCS / "comfyui_demo.png")
            for name, words in {**GRAPHS, **RUN_GRAPHS}.items():
                # At a smaller scale ComfyUI leaves the words out.
                graph = page.picture(name, 0.7, run=name in RUN_GRAPHS)
                graph = (
                    graph.crop((max(0, graph.width - graph.height), 0, *graph.size)) if name in RUN_GRAPHS else graph
                )
                corner = graph.crop((0, 0, *[min(graph.size)] * 2)).resize((SIDE, SIDE), Image.LANCZOS)
                label(corner, f"BA-Solver: {words}").save(EXAMPLES / f"{name}.jpg", quality=90)
            browser.close()
    command = [sys.executable, "-m", "ba_solver.training", "demo", "--out", str(base / "demo")]
    subprocess.run(command, check=True)
    shutil.copy(base / "demo" / "images.png", DOCS / "demo_images.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        draw(Path(base))
