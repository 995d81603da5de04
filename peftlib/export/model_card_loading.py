"""How to load an export, in stock code for its model card; the tests run it as it stands there."""

import json

from peftlib.core.paths import TORCHAO_MIN
from peftlib.export.gguf import MODELFILE, gguf_name
from peftlib.models.inspect import PROJECTIONS

_TORCH_NAMES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
_ASK = """
messages = [{"role": "user", "content": "Name three rivers of Europe."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
_ANSWER = 'print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'


def loading_lines(form, *, quant, base, four_bit, precision, is_split, repository):
    """Lines of Markdown with the code that loads an export.

    quant: of a GGUF file. base: name of the base model. four_bit: projections that were held in NF4. precision: of training. is_split: whether
    weights lie beside the adapter. repository: USER/REPO, None for a folder.
    """
    where = ["", 'folder = "."  # where this card lies']
    if repository:
        where = [
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({_literal(repository)})",
        ]
    if form == "gguf":
        return _gguf_lines(where, gguf_name(quant))
    if form == "merged":
        return _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            *where,
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            _ASK + "made = model.generate(**inputs, max_new_tokens=64)",
            _ANSWER,
        )
    return _adapter_lines(where, base, four_bit, precision, is_split)


def _adapter_lines(where, base, four_bit, precision, is_split):
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if four_bit else []), "GenerationConfig"]
    lines = [
        f'# On Colab first: pip install -U "torchao>={TORCHAO_MIN}". PEFT refuses the older one there for any model.'
    ]
    lines += ["import torch", "from peft import PeftModel"]
    lines += ["from safetensors.torch import load_file"] if is_split else []
    lines += [f"from transformers import {', '.join(names)}", *where]
    lines += [f"base = {_literal(base)}  # id or folder of the base model"]
    if four_bit:
        skipped = [name for name in PROJECTIONS if name not in four_bit]
        skip = f", llm_int8_skip_modules={[*skipped, 'lm_head']}".replace("'", '"') if skipped else ""
        lines += [
            "# As in training: NF4 weights. Dequantized, for merging or answering in 4 bits rounds once more.",
            f'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True{skip})',
            f"model = AutoModelForCausalLM.from_pretrained(base, dtype={_TORCH_NAMES[precision]}, quantization_config=nf4)",
            "model = model.dequantize(dtype=torch.float32).float()",
        ]
    else:
        lines += [f"model = AutoModelForCausalLM.from_pretrained(base, dtype={_TORCH_NAMES[precision]}).float()"]
    lines += ["model = PeftModel.from_pretrained(model, folder)"]
    if is_split:
        lines += [
            "# The attention weights were trained in full: PEFT does not load them, and the adapter is wrong without them.",
            'attention = load_file(f"{folder}/attention.safetensors")',
            "assert not model.load_state_dict(attention, strict=False).unexpected_keys",
        ]
    lines += ["model.eval()", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    lines += [_ASK + "stops = GenerationConfig.from_pretrained(folder)"]
    lines += ["made = model.generate(**inputs, generation_config=stops, max_new_tokens=64)", _ANSWER]
    return _python(*lines)


def _gguf_lines(where, file):
    return [
        "llama.cpp, with Gemma's chat template from the file:",
        "",
        "```bash",
        f"llama-cli -m {file} --jinja --temp 0",
        "```",
        "",
        f"Ollama, with the `{MODELFILE}` beside it:",
        "",
        "```bash",
        f"ollama create mine -f {MODELFILE} && ollama run mine",
        "```",
        "",
        "transformers, widened again:",
        "",
        *_python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig",
            *where,
            f'file = "{file}"',
            "tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)",
            "model = AutoModelForCausalLM.from_pretrained(",
            "    folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True)",
            ")",
            _ASK + "made = model.generate(**inputs, eos_token_id=[1, 106], do_sample=False, max_new_tokens=64)",
            _ANSWER,
        ),
    ]


def _literal(text):
    """A text as a Python literal on one line, without what would end the block of code."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def _python(*lines):
    return ["```python", *"\n".join(lines).split("\n"), "```"]
