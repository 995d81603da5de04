import ast
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import peftlib
from peftlib import data, methods
from peftlib.core import config
from peftlib.core.errors import ModelError, PeftlibError
from peftlib.evaluation.judging import backends as judge_backends
from peftlib.models.load import auto_tokenizer, load_base, readable
from peftlib.models.saved import load_plain, load_trained, save_trained
from peftlib.models.shapes import shape_of

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def calls_of(name):
    """(place, name before the dot, {keyword: constant}) of each call of a method in the package."""
    for path in sorted(Path(peftlib.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func.value), given


def test_no_call_of_transformers_leaves_open_whether_code_of_a_model_runs():
    found = [call for call in calls_of("from_pretrained") if call[1].startswith("Auto")]
    assert len(found) > 3
    for place, kind, given in found:
        assert given.get("trust_remote_code") is False, place
        is_gguf = place.startswith("packaged.py")  # whose tensors are in another format
        assert given.get("use_safetensors") is True or "Model" not in kind or is_gguf, place
    [(place, _, given)] = calls_of("LLM")
    assert given.get("trust_remote_code") is False, place
    others = {kind for _, kind, _ in calls_of("from_pretrained") if not kind.startswith("Auto")}
    assert others == {"PeftModel"}  # which takes neither


@pytest.fixture
def base(tmp_path):
    return tiny.model_folder(tmp_path / "base")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """{method: trained folder without a record}; adapters that have not moved."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    cfg = config.resolve("demo", model=str(tiny_model), lora_rank=4, galore_rank=8)
    for name in ("lora", "hybrid", "galore"):
        method = methods.find(name)
        base = load_base(str(tiny_model), precision="fp32", device="cpu", four_bit=method.four_bit)
        facts = {"model": str(tiny_model), "four_bit": list(method.four_bit), "precision": "fp32"}
        found[name] = save_trained(method.prepare(base, cfg), tiny.tokenizer(), folder / name, facts)
    return found


@pytest.fixture
def copy_of(made, tmp_path):
    return lambda method: shutil.copytree(made[method], tmp_path / method)


def quiet(line):
    pass


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def put(path, **tensors):
    """Exchange tensors of a file; None takes one away. __ in a name is a dot."""
    kept = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata={"format": "pt"})


def plant(folder, monkeypatch, names=("config.json", "tokenizer_config.json"), **fields):
    """Code in a folder that would leave a file, wanted by its configs; a question at the terminal would be answered
    yes."""
    ran = folder.parent / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    code = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")} | {
        "AutoTokenizer": ["theirs.C", None]
    }
    for name in names:
        edit(folder / name, auto_map=code, **fields)
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("asked"))
    return ran


@pytest.mark.parametrize("fields", [{}, {"model_type": "theirs"}], ids=["a known kind", "a kind of its own"])
def test_a_base_models_own_code_is_neither_run_nor_asked_about(base, monkeypatch, fields):
    ran = plant(base, monkeypatch, **fields)
    calls = [
        lambda: load_base(str(base), precision="fp32", device="cpu"),
        lambda: load_plain(str(base), device="cpu"),
        lambda: data.load_tokenizer(str(base)),
        lambda: judge_backends.Local(str(base)).ask([], max_tokens=1),
        lambda: auto_tokenizer(base),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="base needs its own Python code .auto_map"):
            call()
    if fields:
        with pytest.raises(ModelError, match="base.*auto_map|base.*has no Gemma-like config"):
            shape_of(str(base))
    assert not ran.exists()


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_a_trained_folders_own_code_is_neither_run_nor_asked_about(copy_of, monkeypatch, method):
    folder = copy_of(method)
    names = ("config.json",) if method == "galore" else ("adapter_config.json",)
    ran = plant(folder, monkeypatch, names, **({"model_type": "theirs"} if method == "galore" else {}))
    with pytest.raises(ModelError, match="auto_map"):
        load_trained(folder, log=quiet)
    assert not ran.exists()


def test_pickled_weights_are_refused_by_name(base, copy_of, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **how: pytest.fail("a pickle was read"))
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="base has pickled weights .pytorch_model.bin.*only safetensors"):
        load_base(str(base), precision="fp32", device="cpu")
    for method, file, pickle in (("lora", ADAPTER, "adapter_model.bin"), ("galore", WEIGHTS, "pytorch_model.bin")):
        folder = copy_of(method)
        torch.save(load_file(folder / file), folder / pickle)
        (folder / file).unlink()
        with pytest.raises(ModelError, match=f"{method} has pickled weights .{pickle}"):
            load_trained(folder, log=quiet)


def test_a_hub_model_without_safetensors_is_named(base, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*args, **how):
        raise OSError("me/m does not appear to have a file named model.safetensors. Do not set `use_safetensors=True`.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="me/m.*no safetensors.*pickle"):
        load_base("me/m", precision="fp32", device="cpu")


def cut(name, share=0.5):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


_UP, _NORM = "model__layers__0__mlp__up_proj__weight", "model__norm__weight"
DAMAGED_MODELS = {
    "weights cut": cut(WEIGHTS),
    "weights empty": cut(WEIGHTS, 0),
    "weights gone": lambda folder: (folder / WEIGHTS).unlink(),
    "a weight gone": lambda folder: put(folder / WEIGHTS, **{_UP: None}),
    "a row that would broadcast": lambda folder: put(folder / WEIGHTS, **{_UP: torch.zeros(1, 64)}),
    "a vector that would broadcast": lambda folder: put(folder / WEIGHTS, **{_NORM: torch.zeros(1)}),
    "config cut": cut("config.json"),
    "config empty": cut("config.json", 0),
    "config gone": lambda folder: (folder / "config.json").unlink(),
    "config a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "another kind": lambda folder: edit(folder / "config.json", model_type="strange"),
    "a text for a number": lambda folder: edit(folder / "config.json", hidden_size="big"),
    "another width": lambda folder: edit(folder / "config.json", hidden_size=32),
    "more layers": lambda folder: edit(folder / "config.json", num_hidden_layers=3, layer_types=None),
    "an unknown activation": lambda folder: edit(folder / "config.json", hidden_activation="none"),
}


@pytest.mark.parametrize("four_bit", [(), ("up_proj",)], ids=["plain", "4-bit"])
@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_damaged_base_is_named(base, damage, four_bit):
    DAMAGED_MODELS[damage](base)
    with pytest.raises(ModelError, match="base"):
        load_base(str(base), precision="fp32", device="cpu", four_bit=four_bit)


@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_damaged_trained_model_is_named(copy_of, damage):
    folder = copy_of("galore")
    DAMAGED_MODELS[damage](folder)
    with pytest.raises(ModelError, match="galore"):
        load_trained(folder, log=quiet)


_A = "base_model__model__model__layers__0__mlp__up_proj__lora_A__weight"
DAMAGED_ADAPTERS = {
    "weights cut": cut(ADAPTER),
    "weights empty": cut(ADAPTER, 0),
    "weights gone": lambda folder: (folder / ADAPTER).unlink(),
    "a weight gone": lambda folder: put(folder / ADAPTER, **{_A: None}),
    "a weight too many": lambda folder: put(folder / ADAPTER, more=torch.zeros(1)),
    "a row that would broadcast": lambda folder: put(folder / ADAPTER, **{_A: torch.zeros(1, 64)}),
    "a number that would broadcast": lambda folder: put(folder / ADAPTER, **{_A: torch.zeros(1)}),
    "config cut": cut("adapter_config.json"),
    "config empty": cut("adapter_config.json", 0),
    "config gone": lambda folder: (folder / "adapter_config.json").unlink(),
    "config a list": lambda folder: (folder / "adapter_config.json").write_text("[1]"),
    "config a number": lambda folder: (folder / "adapter_config.json").write_text("1"),
    "config without fields": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "another kind": lambda folder: edit(folder / "adapter_config.json", peft_type="PROMPT_TUNING"),
    "an unknown kind": lambda folder: edit(folder / "adapter_config.json", peft_type="STRANGE"),
    "another rank": lambda folder: edit(folder / "adapter_config.json", r=2),
    "a text for the rank": lambda folder: edit(folder / "adapter_config.json", r="4"),
    "rank 0": lambda folder: edit(folder / "adapter_config.json", r=0),
    "alpha a list": lambda folder: edit(folder / "adapter_config.json", lora_alpha=[8]),
    "targets a number": lambda folder: edit(folder / "adapter_config.json", target_modules=7),
    "targets of another model": lambda folder: edit(folder / "adapter_config.json", target_modules=["query"]),
    "fewer targets": lambda folder: edit(folder / "adapter_config.json", target_modules=["q_proj"]),
    "attention cut": cut("attention.safetensors"),
    "attention empty": cut("attention.safetensors", 0),
    "attention that would broadcast": lambda folder: save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(1, 64)},
        folder / "attention.safetensors",
    ),
    "facts cut": cut("peftlib.json"),
    "facts without fields": lambda folder: edit(folder / "peftlib.json", is_adapter=None, four_bit="mlp"),
}


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "as trained"])
@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS)
def test_a_damaged_adapter_is_named(copy_of, damage, merge):
    folder = copy_of("hybrid")
    DAMAGED_ADAPTERS[damage](folder)
    with pytest.raises(PeftlibError, match="hybrid"):
        load_trained(folder, merge=merge, log=quiet)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model": 1}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(base, name, content):
    (base / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", '{"model": 1}'):
        pytest.skip("an unknown field harms nothing")
    with pytest.raises(ModelError, match="base"):
        data.load_tokenizer(str(base))


def test_a_folders_tokenizer_is_opened_once_until_a_file_of_it_changes(base):
    first = data.load_tokenizer(str(base))
    assert data.load_tokenizer(str(base)) is first
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert data.load_tokenizer(str(base)) is not first


def test_out_of_memory_stays_what_it_is():
    with pytest.raises(torch.OutOfMemoryError), readable("m"):
        raise torch.OutOfMemoryError("no room")
