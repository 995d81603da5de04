import json
import re

import pytest
import torch
from card_code import logits, run_code_of
from safetensors.torch import load_file

from peftlib import cli as command_line
from peftlib.core.errors import ConfigError
from peftlib.core.files import read_json
from peftlib.export import lora
from peftlib.export.export import export_model
from peftlib.models.load import load_base
from peftlib.models.saved import load_trained


def changes_of(study, method):
    """{name: float32 change} of a fully trained model."""
    base = dict(load_base(study.cfg.model, precision="fp32", device="cpu").named_parameters())
    trained = load_trained(study.weights_dir(method, 0))
    return {name: p.float() - base[name].float() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("method", ["galore", "hybrid"])
def test_with_all_singular_vectors_the_cards_code_loads_the_trained_model(
    finished, tiny_model, tmp_path, monkeypatch, method
):
    study = finished(method)
    made = export_model(study, method, to=tmp_path / "out", form="lora", rank=32)  # the shorter side of k and v
    names, _ = run_code_of(tmp_path / "out", made.card, base=tiny_model)
    kept = read_json(tmp_path / "out" / "study" / "lora.json")
    exact, own = load_trained(study.weights_dir(method, 0)), logits(names["model"])
    layers = kept["layers"]
    assert all(share == pytest.approx(1, abs=1e-4) for name, share in layers.items() if re.search("[kv]_proj", name))
    if method == "galore":  # q, o and the MLP have 64 singular values
        assert 0.5 < kept["kept"] < 1 and 0 < kept["outside"] < 1 and kept["losses"]["on_16_bit"] is None
        assert (own - logits(exact)).abs().max() < 0.2 * (own - logits(_base(study))).abs().max()
        assert f"{kept['outside']:.2%} of it is in norms" in made.card
    else:  # the adapters beside are kept whole
        assert kept["outside"] == 0 and kept["losses"]["on_16_bit"] != kept["losses"]["adapter"]
        theirs = load_file(study.weights_dir(method, 0) / "adapter_model.safetensors")
        ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_%s.weight"
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["rank_pattern"]["up_proj"]
        product = scale * ours[name % "B"] @ ours[name % "A"]
        before = study.cfg.lora_alpha / study.cfg.lora_rank * theirs[name % "B"] @ theirs[name % "A"]
        torch.testing.assert_close(product, before)
    monkeypatch.chdir(tmp_path / "out")  # where the card's code found the base model
    torch.testing.assert_close(logits(load_trained(tmp_path / "out")), own, atol=1e-4, rtol=0)
    assert kept["losses"]["split"] == "valid" and any("nats per token" in line for line in made.notes)
    assert f"{kept['kept']:.1%} of the change" in made.card


def _base(study):
    return load_base(study.cfg.model, precision="fp32", device="cpu").eval()


def test_each_matrix_keeps_what_its_leading_singular_values_hold(finished, tmp_path):
    study = finished("galore")
    export_model(study, "galore", to=tmp_path / "out", form="lora", rank=3)
    layers = read_json(tmp_path / "out" / "study" / "lora.json")["layers"]
    changes, held, total = changes_of(study, "galore"), 0.0, 0.0
    for name, change in changes.items():
        total += float(change.square().sum())
        if name in layers:
            s = torch.linalg.svdvals(change).square()
            held += float(s[:3].sum())
            assert layers[name] == pytest.approx(float(s[:3].sum() / s.sum()), rel=1e-3)
    assert read_json(tmp_path / "out" / "study" / "lora.json")["kept"] == pytest.approx(held / total, rel=1e-3)
    b, a, _ = lora._leading(changes["model.layers.0.self_attn.q_proj.weight"], 3)
    assert b.shape == (64, 3) and a.shape == (3, 64)


def test_what_cannot_be_such_an_adapter_is_refused(finished, tmp_path, capsys):
    study = finished("qlora")
    with pytest.raises(ConfigError, match="qlora has an adapter already: use form='adapter'"):
        export_model(study, "qlora", to=tmp_path / "out", form="lora")
    with pytest.raises(ConfigError, match=r"rank=33 is larger than a layer: use 1\.\.32"):
        export_model(finished("galore"), "galore", to=tmp_path / "out", form="lora", rank=33)
    words = ["export", "galore", "--study", "tiny", "--form", "lora", "--rank", "4", "--to", str(tmp_path / "out")]
    assert command_line.main(words) == 0
    said = capsys.readouterr().out
    assert "rank 4 keeps" in said and "with the adapter (" in said
