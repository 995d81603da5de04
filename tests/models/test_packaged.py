import hashlib
import re
from types import SimpleNamespace

import pytest
import transformers

from peftlib.core.errors import ModelError
from peftlib.models import packaged


def test_pieces_are_joined_in_order_and_verified(tmp_path):
    pieces = []
    for i, text in enumerate((b"one ", b"two ", b"three")):
        pieces.append(tmp_path / f"piece{i}")
        pieces[-1].write_bytes(text)
    whole = hashlib.sha256(b"one two three").hexdigest()
    assert packaged.assemble(pieces, tmp_path / "whole", whole).read_bytes() == b"one two three"


def test_a_flipped_byte_is_refused_and_nothing_is_left(tmp_path):
    piece = tmp_path / "piece"
    piece.write_bytes(b"damaged")
    with pytest.raises(ModelError, match="SHA-256 is .* reinstall with pip install"):
        packaged.assemble([piece], tmp_path / "whole", hashlib.sha256(b"sound").hexdigest())
    assert not (tmp_path / "whole").exists()


def test_absent_packages_are_named_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "_PACKAGES", ["peftlib-no-such-package"])
    with pytest.raises(ModelError, match=r"peftlib-no-such-package is missing.*peftlib\[demo\].*make demo"):
        packaged.packaged_model()
    assert not list(tmp_path.glob("gemma3-*"))


def test_a_cut_conversion_is_not_taken_for_a_whole_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    folder = packaged.packaged_folder()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(packaged, "_piece_paths", list)
    with pytest.raises(ModelError, match="SHA-256"):
        packaged.packaged_model()


def test_a_tokenizer_that_transformers_converts_wrongly_is_refused(monkeypatch, tmp_path):
    split = SimpleNamespace(encode=lambda text, **_: [ord(letter) for letter in text])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: split)
    version = re.escape(transformers.__version__)
    with pytest.raises(
        ModelError, match=rf"transformers {version} cannot convert.*start_of_turn.*install 5\.18 or newer"
    ):
        packaged._convert(tmp_path / "model.gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """The folder of a converted model; `conversions` counts how often it was made."""
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "_VERIFIED", set())
    monkeypatch.setattr(packaged, "_piece_paths", list)
    monkeypatch.setattr(packaged, "assemble", lambda pieces, target: target)
    made = []

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(packaged, "_convert", convert)
    return SimpleNamespace(folder=packaged.packaged_model(), conversions=made)


def test_a_finished_conversion_is_used_as_it_is(converted, monkeypatch):
    assert (converted.folder / "provenance.txt").read_text() == packaged.PROVENANCE + "\n"
    monkeypatch.setattr(packaged, "_VERIFIED", set())  # a new process
    assert packaged.packaged_model() == converted.folder and len(converted.conversions) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"weightX", r"model.safetensors is damaged \(SHA-256 differs\)"),
        ("model.safetensors", b"w", "model.safetensors has 1 bytes, not 7"),
        ("config.json", None, "config.json is missing"),
        ("sha256.json", b"{", r"sha256.json cannot be read \(StudyError\)"),
        ("sha256.json", None, r"sha256.json cannot be read \(DiskError\)"),  # of an earlier version
    ],
)
def test_a_damaged_conversion_is_said_and_made_again(converted, monkeypatch, capsys, name, content, said):
    path = converted.folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert packaged.packaged_model() == converted.folder and len(converted.conversions) == 1  # verified in this process
    monkeypatch.setattr(packaged, "_VERIFIED", set())
    assert packaged.packaged_model() == converted.folder and len(converted.conversions) == 2
    assert re.search(f"is damaged \\({said}\\): converting it again", capsys.readouterr().out)
    assert (converted.folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in converted.folder.parent.iterdir()] == [converted.folder.name]
