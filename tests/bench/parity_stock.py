"""The stock side of parity.py: transformers, PEFT, bitsandbytes and galore_torch in a plain training loop."""

import statistics
import time

MICRO_BATCH = 8


def train_stock(study, method, initial, attention):
    """As train_ours, by stock libraries; no model where a step was not finite."""
    import torch

    from peftlib import load_split
    from peftlib.core.env import resolve_device, training_precision
    from peftlib.train.placement import PeakMemory
    from peftlib.train.step import StepPlan, learning_rate_factor

    cfg, device = study.cfg, resolve_device(study.cfg.device)
    precision, _ = training_precision(device, cfg.precision)
    if precision == "fp16":
        raise SystemExit("the stock side has no loss scaler: use a card with bf16, or --set precision=fp32")
    rows = load_split(study.data_dir, "train")
    plan = StepPlan(len(rows), cfg.batch_size, cfg.epochs, cfg.seed, cfg.max_steps)
    found = {
        "cap_gib": 0.0,
        "micro_batch": MICRO_BATCH,
        "recompute": "off",
        "precision": precision,
        "attention": attention,
    }
    times, losses, model = [], [], None
    with PeakMemory(device) as memory:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = stock_model(cfg, method, attention, dtype, device, initial)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = stock_optimizer(model, cfg, method)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step in range(plan.steps):
            wait(device)
            started, numbers = time.perf_counter(), plan.rows_of(step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, plan.steps, cfg)
            part = [rows[n] for n in numbers]
            scored, total = sum(sum(row["is_scored"]) for row in part), torch.zeros((), device=device)
            for at in range(0, len(part), MICRO_BATCH):
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(**padded(part[at : at + MICRO_BATCH], device), num_items_in_batch=scored).loss
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm or float("inf"))
            finite = {"loss": bool(total.isfinite()), "gradient": bool(norm.isfinite())}
            if not all(finite.values()):
                found["nan_step"], found["nan_in"] = step + 1, [name for name, fine in finite.items() if not fine]
                model = None
                break
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            wait(device)
            times.append((sum(row["n_tokens"] for row in part), time.perf_counter() - started))
            losses.append(float(total))
    found |= {**speed_of(times), "losses": losses, "peak_gib": memory.peak_bytes / 2**30}
    found["first_step_s"] = times[0][1] if times else None
    if model is not None:
        del optimizer, trained
        model = as_plain(model, cfg, initial.with_name(f"{method}-{attention}"), dtype, device)
    return found, model


def stock_model(cfg, method, attention, dtype, device, initial):
    """The model as a user of transformers and PEFT would set it up; what trains is in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from peftlib.models.inspect import PROJECTIONS

    model = load_stock(cfg, dtype, device, four_bit=method == "qlora", attention=attention)
    if method in ("qlora", "lora"):
        sizes = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout}
        model = get_peft_model(model, LoraConfig(**sizes, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"))
        start = load_file(initial, device=device)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.data = p.data.float().copy_(start.pop(name))
        if start:
            raise SystemExit(f"our adapters have weights that stock's lack: {', '.join(sorted(start)[:3])}")
    else:
        for name, p in model.named_parameters():
            p.requires_grad_("embed" not in name and "lm_head" not in name)
            if p.requires_grad:
                p.data = p.data.float()
    return model.train()


def load_stock(cfg, dtype, device, *, four_bit, attention):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": attention}
    if four_bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(cfg.model, **settings)
    model.config.use_cache = False
    return model


def stock_optimizer(model, cfg, method):
    """torch's AdamW, bitsandbytes' 8-bit one for full training as ours, or galore_torch's, with our config's values."""
    import torch

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.ndim == 2]},
        {"params": [p for p in named.values() if p.ndim < 2]},
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = cfg.weight_decay, 0.0
    how = {"betas": (0.9, 0.999), "eps": 1e-8}
    if method == "galore":
        from galore_torch import GaLoreAdamW

        gap, scale = cfg.galore_update_interval, cfg.galore_scale
        groups[0] |= {"rank": cfg.galore_rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
        groups[1]["lr"] = cfg.galore_learning_rate * cfg.galore_scale
        return GaLoreAdamW(groups, lr=cfg.galore_learning_rate, no_deprecation_warning=True, **how)
    if method == "full":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=cfg.full_learning_rate, **how)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lora_learning_rate, **how)


def padded(rows, device):
    """input_ids, attention_mask and labels of rows, right-padded to the longest."""
    import torch

    width = max(row["n_tokens"] for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        own, n = torch.tensor(row["input_ids"]), row["n_tokens"]
        ids[i, :n], mask[i, :n] = own, 1
        labels[i, :n] = torch.where(torch.tensor(row["is_scored"]), own, -100)
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def as_plain(model, cfg, folder, dtype, device):
    """The trained model in float32 as our load_trained makes it: adapters merged into dequantized matrices, full
    weights rounded to 16 bits as they are saved."""
    import torch
    from peft import PeftModel

    if not hasattr(model, "peft_config"):
        return model.to(dtype).float()
    model.save_pretrained(folder)
    is_four_bit = getattr(model.get_base_model(), "is_loaded_in_4bit", False)
    base = load_stock(cfg, dtype, device, four_bit=is_four_bit, attention="eager")
    base = base.dequantize(dtype=torch.float32) if is_four_bit else base
    return PeftModel.from_pretrained(base.float(), folder).merge_and_unload()


def speed_of(times):
    """Useful tokens a second by [(tokens, seconds), ...] of the steps: the median after the second, and their mean."""
    rest = times[2:] or times
    if not rest:
        return {"tok_s": None}
    tokens, seconds = map(sum, zip(*rest, strict=True))
    return {"tok_s": statistics.median(n / s for n, s in rest), "tok_s_mean": tokens / seconds}


def wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
