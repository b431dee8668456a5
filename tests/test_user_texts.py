"""Texts that users write: prompts and settings, as editors on any system save them."""

import codecs
import dataclasses

import pytest
import torch
from ba_solver.bas_core.files import CheckpointError
from ba_solver.training.backbones.base import Backbone, BackboneChoice
from ba_solver.training.cli import main
from ba_solver.training.recording.record import Recording, Stretch, describe
from ba_solver.training.settings import UsageError, read_settings
from ba_solver.training.text_files import read_user_text

PROMPTS = ["eine rote Katze", "二匹の犬", "a pier\u2028at dusk\x0b\x85"]
PLAIN = "eine rote Katze\n二匹の犬\n\na pier\u2028at dusk\x0b\x85\n"
MARK = codecs.BOM_UTF8
SAVED = {
    "plain": PLAIN.encode(),
    "mark": MARK + PLAIN.encode(),
    "windows": MARK + PLAIN.replace("\n", "\r\n").encode(),
    "old mac": PLAIN.replace("\n", "\r").encode(),
    "mixed": PLAIN.replace("\n", "\r\n", 1).encode(),
    "put together": MARK + PLAIN[:16].encode() + MARK + PLAIN[16:].encode(),
}
REFUSED = {
    "UTF-16": ("a cat\n".encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "UTF-16, big end first": (codecs.BOM_UTF16_BE + "a cat\n".encode("utf-16-be"), "is UTF-16. Save it as UTF-8"),
    "UTF-16 without mark": ("a cat\n".encode("utf-16-le"), "UTF-16 without its mark.*zero bytes.*Save it as UTF-8"),
    "UTF-32": ("a cat\n".encode("utf-32"), "is UTF-32. Save it as UTF-8"),
    "latin": ("a cat\nein gr\xfcner Hund\n".encode("latin-1"), "line 2 holds the byte 0xfc. Save it as UTF-8"),
    "japanese": ("犬\n".encode("shift-jis"), "line 1 holds the byte 0x8c. Save it as UTF-8"),
    "binary": (bytes(range(256)), "zero bytes"),
}


@pytest.fixture
def read_prompts():
    pytest.importorskip("diffusers")
    from ba_solver.training.backbones.diffusers import read_prompts

    return read_prompts


@pytest.mark.parametrize("form", SAVED)
def test_a_text_is_the_same_however_it_was_saved(form, tmp_path):
    (tmp_path / "text").write_bytes(SAVED[form])
    assert read_user_text(tmp_path / "text") == PLAIN


@pytest.mark.parametrize("form", SAVED)
def test_prompts_are_the_lines_and_nothing_else(form, tmp_path, read_prompts):
    """No mark before the first, and no other line end of Unicode within one takes it apart."""
    (tmp_path / "prompts.txt").write_bytes(SAVED[form].replace(b"Katze", b"Katze  \t"))
    assert read_prompts(tmp_path / "prompts.txt") == [prompt.strip() for prompt in PROMPTS]


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_other_encodings_are_refused_by_name(content, message, tmp_path, read_prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"prompts.txt.*{message}"):
        read_user_text(path)
    with pytest.raises(UsageError, match=rf"--prompts .*prompts.txt cannot be read as text.*{message}"):
        read_prompts(path)


@pytest.mark.parametrize("content", [b"", MARK, MARK + b"\r\n \r\n"], ids=repr)
def test_a_mark_is_no_prompt(content, tmp_path, read_prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts(tmp_path / "prompts.txt")


def test_what_cannot_be_opened_is_refused_in_words(tmp_path, read_prompts):
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(UsageError, match=f"--prompts {path} cannot be read"):
            read_prompts(path)


# --- what a recording keeps of its prompts ----------------------------------------------------------------------------


def prompts_hash(path, content):
    path.write_bytes(content)
    choice = BackboneChoice(backbone="diffusers:x", prompts=path, negative_prompt="blurred")
    backbone = Backbone("x", "diffusers", "00", (4, 8, 8), velocity=lambda x, t, which, scale: x)
    return describe(choice, Recording(), Stretch(path.parent, 8, torch.linspace(1, 0.01, 40)), backbone)["prompts"]


def test_a_recording_can_be_gone_on_with_after_an_editor_saved_the_prompts(tmp_path):
    hashes = {form: prompts_hash(tmp_path / "prompts.txt", content) for form, content in SAVED.items()}
    assert set(hashes.values()) == {hashes["plain"]}
    assert prompts_hash(tmp_path / "prompts.txt", SAVED["plain"] + b"another\n") != hashes["plain"]


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """Some.

    Attributes:
        name: text.
        steps: number.
    """

    name: str = ""
    steps: int = 0


TOML = '# settings\nname = "größer"  \nsteps = 3\n'


@pytest.mark.parametrize(
    "content",
    [
        TOML.encode(),
        MARK + TOML.encode(),
        MARK + TOML.replace("\n", "\r\n").encode(),
        TOML.replace("\n", "\r").encode(),
    ],
    ids=["plain", "mark", "windows", "old mac"],
)
def test_settings_are_read_however_they_were_saved(content, tmp_path):
    pytest.importorskip("tyro")
    (tmp_path / "settings.toml").write_bytes(content)
    assert read_settings(Settings, ["--config", str(tmp_path / "settings.toml")], "x") == Settings("größer", 3)


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_in_other_encodings_are_refused_by_name(content, message, tmp_path):
    pytest.importorskip("tyro")
    (tmp_path / "settings.toml").write_bytes(content)
    with pytest.raises(UsageError, match=rf"settings.toml is no TOML file.*{message}"):
        read_settings(Settings, ["--config", str(tmp_path / "settings.toml")], "x")


def test_the_command_line_says_so_and_uses_its_status_for_wrong_usage(tmp_path, capsys):
    pytest.importorskip("tyro")
    (tmp_path / "settings.toml").write_bytes("points = 9\n".encode("utf-16"))
    assert main(["record", "--config", str(tmp_path / "settings.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "is UTF-16. Save it as UTF-8" in capsys.readouterr().err
