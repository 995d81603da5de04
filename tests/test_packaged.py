import hashlib

import pytest

from peftlib import packaged
from peftlib.errors import ModelError


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


def test_a_finished_conversion_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    folder = packaged.packaged_folder()
    folder.mkdir()
    (folder / "provenance.txt").write_text("done")
    assert packaged.packaged_model() == folder
