"""A real ComfyUI as a server with the pack in it, as users get it: the zip, unpacked."""

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import comfyui
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def make_zip(path):
    """`comfy node pack` where comfy-cli is there, else the same: tracked files without those of .comfyignore."""
    if shutil.which("comfy"):
        subprocess.run(["comfy", "--skip-prompt", "node", "pack"], cwd=ROOT, capture_output=True, check=True)
        shutil.move(ROOT / "node.zip", path)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(comfyui.packed_files(ROOT)):
            archive.write(ROOT / name, name)


class Server:
    """A running ComfyUI and its log."""

    def __init__(self, base, port, log):
        self.base, self.url, self.log = base, f"http://127.0.0.1:{port}", log

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return answer.read()

    def json(self, path):
        return json.loads(self.get(path))

    def post(self, path, content):
        body = json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def submit(self, graph):
        """Put an API workflow into the queue; returns its id."""
        answer = json.loads(self.post("/prompt", {"prompt": graph}))
        assert not answer["node_errors"], answer["node_errors"]  # ComfyUI runs the outputs that it finds valid
        return answer["prompt_id"]

    def queue(self, graph, limit=600):
        """Run an API workflow; returns its history entry."""
        prompt = self.submit(graph)
        for _ in range(limit * 5):
            history = self.json(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            time.sleep(0.2)
        raise AssertionError(f"The workflow did not end within {limit} s.")

    def drop(self):
        """Empty the queue, and stop what runs."""
        self.post("/queue", {"clear": True})
        self.post("/interrupt", {})

    def images(self, entry, node):
        """The images that a node showed: [B, H, W, 3] in 0..1."""
        found = []
        for image in entry["outputs"][node]["images"]:
            query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            found.append(np.asarray(Image.open(io.BytesIO(self.get(f"/view?{query}"))).convert("RGB")))
        return torch.from_numpy(np.stack(found)).float() / 255


def install(base):
    """ComfyUI's folders under `base`, with the pack from its zip."""
    make_zip(base / "pack.zip")
    with zipfile.ZipFile(base / "pack.zip") as archive:
        archive.extractall(base / "custom_nodes" / "ba-solver")


@contextmanager
def serve(base, *arguments):
    """A ComfyUI on a free port, with its own folders, and further arguments of the command line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "server.log"
    with log.open("w") as out:
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", *arguments]
        process = subprocess.Popen(command, cwd=comfyui.find(), stdout=out, stderr=subprocess.STDOUT)
        try:
            server = Server(base, port, log)
            for _ in range(600):
                if process.poll() is not None:
                    raise AssertionError(f"ComfyUI ended while starting:\n{log.read_text()[-3000:]}")
                try:
                    server.json("/system_stats")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait(120)
