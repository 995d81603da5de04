"""Greedy generation on the same rows: our engine against libraries, each at the best of its settings.

The libraries are transformers' plain `generate` by batch size, its continuous batching by a small grid, and vLLM where
it can be imported. The last line is the verdict: our speed over that of the fastest of them.

    python tests/bench/generate.py OUT.json [--model DIR] [--prompts FILE] [...]     (make bench-generate)
    python tests/bench/generate.py --make-prompts FILE [--data DIR] [--a-source N] [--max-length N]

A row is a prompt as token ids and its reference's number of tokens. The packaged model is not tuned and would babble
to the limit, so every row ends at its reference's length (or the token limit, or a stop token), on both sides alike:
plain `generate` through a stopping criterion by row, ours through a limit by row. Counted are useful tokens, up to
the first stop token. Plain batches are left-padded, rows in file order; where a size is
measured on fewer rows than all, they are spread over the file, and ours answers the same. With --free (for a tuned
model, which stops by itself) rows end at a stop token or the token limit alone. Results of other devices in OUT stay.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "bench")]

FILES = {"alpaca": "alpaca.jsonl.gz", "tulu": "tulu_v2.jsonl.gz", "ultrachat": "ultrachat_200k.jsonl.gz"}
LENGTHS = "each row ends at its reference's length, on both sides"
FREE = "each row ends at a stop token or the token limit, on both sides"
BATCHES = {"cpu": [16, 32], "cuda": [512, 1024, 256, 128]}  # where time runs out, the last are left out
WARM_ROWS, WARM_TOKENS = {"cpu": 8, "cuda": 1024}, 4
TRIAL_ROWS = 48  # on which a CPU looks for plain generate's best batch size
GRID_ROWS = {"cpu": 24, "cuda": 256}  # on which the best setting of continuous batching is looked for
PLAIN_BATCHES = 6  # of each size on a GPU; ours then answers the same rows
REST_SECONDS = 45.0  # that our own runs need


def make_prompts(path, data_dir, *, a_source, max_length):
    """Write test rows of the shared data as {"rows": [{"ids", "reference_tokens", "source"}, ...]}, in file order."""
    from peftlib import data
    from peftlib.core import config
    from peftlib.models.chat_template import encode, encode_prompt

    sources = "; ".join(f"{name}={data_dir / file}" for name, file in FILES.items())
    sizes = {"train_rows": 1, "valid_rows": 0, "test_rows": a_source}
    cfg = config.resolve("demo", sources=sources, max_length=max_length, **sizes)
    tokenizer = data.load_tokenizer(cfg.model)
    rows = []
    with tempfile.TemporaryDirectory(prefix="peftlib-bench-") as folder:
        data.build_data(cfg, folder, log=lambda line: None)
        for row in data.load_split(folder, "test"):
            ids = encode_prompt(tokenizer, row["messages"][:-1])
            whole = encode(tokenizer, row["messages"]).input_ids
            rows.append({"ids": ids, "reference_tokens": len(whole) - len(ids) - 1, "source": row["source"]})
    path.write_text(json.dumps({"max_length": max_length, "rows": rows}) + "\n", encoding="utf-8")
    return rows


class Bench:
    """The rows, the model and what was measured. deadline: time.monotonic() after which nothing new starts."""

    def __init__(self, args, rows):
        import torch
        import transformers

        from peftlib.core import record

        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = args.dtype or ("bf16" if self.device == "cuda" else "fp32")
        self.deadline = args.started + (args.seconds or 1e9)
        self.prompts = [row["ids"] for row in rows]
        longest = [args.max_new_tokens if args.free else row["reference_tokens"] for row in rows]
        self.limits = [max(1, min(limit, args.max_new_tokens)) for limit in longest]
        self.facts = {
            "device": record.device_name(self.device),
            "model": args.model_name,
            "max_new_tokens": args.max_new_tokens,
            "lengths": FREE if args.free else LENGTHS,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        self.results = []

    def measure(self, model, engine, *, batch, rows, seconds=None):
        """{rows, useful_tokens, seconds, tok_s, answers, ...} of one engine; plain stops at a batch's end after
        `seconds`.

        rows: their numbers, in file order.
        """
        made, started, worked = {}, time.perf_counter(), time.process_time()
        for number, ids in self._answers(model, engine, batch, rows):
            made[rows[number]] = ids
            late = seconds and time.perf_counter() - started > seconds
            if engine == "generate" and late and len(made) % batch == 0:
                break
        self._wait()
        spent = time.perf_counter() - started
        useful = sum(len(_useful(ids)) for ids in made.values())
        found = {"rows": len(made), "useful_tokens": useful, "seconds": spent, "tok_s": useful / spent, "answers": made}
        if self.device == "cpu":
            found["processor_seconds"] = (
                time.process_time() - worked
            )  # of all cores; other work on them adds less to it
        return found

    def _answers(self, model, engine, batch, rows):
        import continuous

        from peftlib.evaluation.inference.engines import generate_plainly, generate_rows

        prompts, limits = [self.prompts[i] for i in rows], [self.limits[i] for i in rows]
        if engine == "generate":
            return generate_plainly(model, prompts, limits, batch=batch, order=range(len(prompts)))
        if engine == "vllm":
            longest = max(map(len, self.prompts)) + self.args.max_new_tokens
            return continuous.generate_with_vllm(model, prompts, limits, longest=longest)
        if engine != "slots":
            attention, settings = engine
            return continuous.generate_continuously(model, prompts, limits, attention=attention, settings=settings)
        return generate_rows(model, prompts, limits, engine="slots", batch=batch)

    def warm(self, model, engine, batch):
        """What a first call sets up (kernels, threads, buffers) is no part of either side."""
        rows = WARM_ROWS[self.device] if engine != "generate" or self.device == "cpu" else batch
        limits, self.limits = self.limits, [min(limit, WARM_TOKENS) for limit in self.limits]
        self.measure(model, engine, batch=batch, rows=self.spread(rows))
        self.limits = limits

    def spread(self, rows):
        """Numbers of so many rows from all over the file, in its order; of all, where it has no more."""
        return spread(range(len(self.prompts)), rows)

    def add(self, found, against, **facts):
        """Keep a result beside its baseline: printed, and written at once."""
        numbers = {key: value for key, value in found.items() if key != "answers"}
        compared = {"baseline_tok_s": against["tok_s"], "ratio": found["tok_s"] / against["tok_s"]}
        if against is not found:
            both = found["answers"].keys() & against["answers"].keys()
            same = sum(_useful(found["answers"][i]) == _useful(against["answers"][i]) for i in both)
            compared["same_answers"] = same / max(1, len(both))
        self.results.append({**self.facts, "dtype": self.dtype, **facts, **numbers, **compared})
        print(line_of(self.results[-1]), flush=True)
        write(self.args.out, self.before, self.results)

    def has_time(self, seconds=0.0):
        """Whether something of so many seconds may start."""
        return time.monotonic() + seconds < self.deadline

    def _wait(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def load(self, dtype):
        import torch

        from peftlib.models.saved import load_plain

        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        return load_plain(self.args.model, device=self.device, dtype=kinds[dtype])


def spread(rows, n):
    """n of the rows at even distances, in their order; all where there are no more."""
    return [rows[i * len(rows) // n] for i in range(n)] if n < len(rows) else list(rows)


def _useful(ids):
    from peftlib.models.chat_template import STOP_IDS

    return ids[:-1] if ids and ids[-1] in STOP_IDS else ids


def line_of(result):
    what = f"{result['engine']}, {result['batch'] or 'own'} rows at a time"
    same = f"  same answers {result['same_answers']:.1%}" if "same_answers" in result else ""
    return (
        f"{what:<44}{result['dtype']:<6}{result['rows']:>6} rows {result['seconds']:8.2f} s {result['tok_s']:10,.1f} tok/s"
        f"  {result['ratio']:6.2f}x {result['baseline']}{same}"
    )


def plain_runs(bench, model):
    """{batch: found} of plain generate at batch 64 and at others, among them its best."""
    if bench.device == "cpu":
        sizes, most, cap = [64, _trial(bench, model)], len(bench.prompts), None
    else:
        sizes, most, cap = [64, *(bench.args.batches or BATCHES["cuda"])], PLAIN_BATCHES, bench.args.cap
    found = {}
    for batch in dict.fromkeys(sizes):
        if found and not bench.has_time((cap or 0.0) + REST_SECONDS):
            print(f"generate, batch {batch}: no time", flush=True)
            continue
        rows = bench.spread(most * batch)
        run = _plain(bench, model, batch, rows, cap)
        if run is None:
            print(f"generate, batch {batch}: out of memory", flush=True)
            continue
        found[batch] = run
        bench.add(run, found.get(64, run), engine="generate", batch=batch, baseline="generate, batch 64")
    return found


def _trial(bench, model):
    """Plain generate's best batch size on a part of the rows, for a CPU that has no time to try all on all."""
    speeds = {}
    sizes = bench.args.batches or BATCHES["cpu"]
    bench.warm(model, "generate", min(sizes))
    for batch in sizes:
        rows = bench.spread(max(batch, TRIAL_ROWS))
        speeds[batch] = bench.measure(model, "generate", batch=batch, rows=rows)["tok_s"]
        print(f"trial: generate, batch {batch} on {len(rows)} rows: {speeds[batch]:,.1f} tok/s", flush=True)
    return max(speeds, key=speeds.get)


def _plain(bench, model, batch, rows, cap):
    """What plain generate did in at most `cap` seconds; None where it ran out of memory."""
    import torch

    try:
        bench.warm(model, "generate", batch)
        return bench.measure(model, "generate", batch=batch, rows=rows, seconds=cap)
    except torch.OutOfMemoryError:
        pass
    _free()
    return None


def our_runs(bench, model, plain, libraries):
    """Our engine on exactly the rows that each baseline answered."""
    best = max(plain, key=lambda batch: plain[batch]["tok_s"])
    bench.warm(model, "slots", 0)
    named = {"generate, batch 64": plain.get(64), f"generate at its best batch size, {best}": plain[best], **libraries}
    runs = {}
    for name, found in named.items():
        if found:
            rows = tuple(sorted(found["answers"]))
            runs[rows] = runs.get(rows) or bench.measure(model, "slots", batch=0, rows=rows)
            bench.add(runs[rows], found, engine="slots", batch=0, baseline=name)


def library_runs(bench, model):
    """{name: found} of continuous batching at the best of its grid, and of vLLM, on the rows that ours answers too."""
    import continuous

    trials = {}
    for setting in continuous.grid(bench.device):
        name, rows = continuous.name_of(*setting), bench.spread(GRID_ROWS[bench.device])
        if trials and not bench.has_time(REST_SECONDS):
            print(f"{name}: no time", flush=True)
            continue
        try:
            bench.measure(model, setting, batch=0, rows=rows[: WARM_ROWS["cpu"]])
            trials[name] = (bench.measure(model, setting, batch=0, rows=rows)["tok_s"], setting)
            print(f"trial: {name} on {len(rows)} rows: {trials[name][0]:,.1f} tok/s", flush=True)
        except Exception as error:  # noqa: BLE001  a setting that this machine or version cannot run is a result too
            print(f"trial: {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        _free()
    engines = {max(trials, key=trials.get): trials[max(trials, key=trials.get)][1]} if trials else {}
    engines |= {"vllm": "vllm"} if continuous.has_vllm() else {}
    found, rows = {}, bench.spread(bench.args.grid_rows)
    for name, engine in engines.items():
        bench.warm(model, engine, 0)
        found[name] = bench.measure(model, engine, batch=0, rows=rows)
        bench.add(found[name], found[name], engine=name, batch=0, baseline=name)
        _free()
    return found


def _free():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def verdict(bench):
    """Print our speed over that of the fastest library, each on the rows that both answered."""
    ours = [row for row in bench.results if row["engine"] == "slots"]
    worst = max(ours, key=lambda row: row["baseline_tok_s"])
    print(
        f"VERDICT ours / best library ({worst['baseline']}): {worst['ratio']:.2f} "
        f"({worst['tok_s']:,.0f} / {worst['baseline_tok_s']:,.0f} tok/s, {worst['same_answers']:.1%} equal answers)"
    )


def merging(bench):
    """What merging an adapter gains: our engine on 4-bit matrices with LoRA beside, and on the merged model."""
    import torch

    from peftlib.models.saved import load_trained

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows = bench.spread(bench.args.merge_rows)
    with tempfile.TemporaryDirectory(prefix="peftlib-bench-") as folder:
        adapter = _adapter(bench, Path(folder) / "adapter")
        found = {}
        for name, merge in (("unmerged", False), ("merged", True)):
            model = load_trained(adapter, device=bench.device, merge=merge, dtype=kinds[bench.dtype])
            bench.warm(model, "slots", 0)
            found[name] = bench.measure(model, "slots", batch=0, rows=rows)
            baseline = "slots, adapter unmerged in 4 bit (the gain from merging)"
            bench.add(found[name], found["unmerged"], engine=f"slots, adapter {name}", batch=0, baseline=baseline)


def _adapter(bench, folder):
    """A folder with random small LoRA of the study's rank on the 4-bit model, as training saves it."""
    import torch

    from peftlib.core import config
    from peftlib.methods import qlora
    from peftlib.models.load import load_base
    from peftlib.models.saved import save_trained

    class NoTokenizer:
        def save_pretrained(self, folder):
            """Nothing that this benchmark reads."""

    base = load_base(bench.args.model, precision=bench.dtype, device=bench.device, four_bit=qlora.SPEC.four_bit)
    model = qlora.prepare(base, config.resolve("demo"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 1e-3)
    facts = {"model": str(bench.args.model), "four_bit": list(qlora.SPEC.four_bit), "precision": bench.dtype}
    return save_trained(model, NoTokenizer(), folder, facts)


def equality(bench):
    """Our engine and plain batches of 64 in float32: the share of equal rows, and the widest margin of the others."""
    rows, limits = bench.spread(bench.args.equal_rows), bench.limits
    model = bench.load("fp32")
    bench.limits = [min(limit, 64) for limit in limits]
    plain = bench.measure(model, "generate", batch=64, rows=rows)
    ours = bench.measure(model, "slots", batch=0, rows=rows)
    others = [i for i in rows if plain["answers"][i] != ours["answers"][i]]
    margins = [_margin(model, bench.prompts[i], plain["answers"][i], ours["answers"][i]) for i in others]
    bench.limits, dtype, bench.dtype = limits, bench.dtype, "fp32"
    facts = {"max_new_tokens": min(64, bench.args.max_new_tokens), "widest_margin": max(margins, default=None)}
    bench.add(ours, plain, engine="slots, equality in fp32", batch=0, baseline="generate, batch 64", **facts)
    print(
        f"fp32: {len(rows) - len(others)} of {len(rows)} answers equal; margins where others part: {margins[:5]}",
        flush=True,
    )
    bench.dtype = dtype


def _margin(model, prompt, plain, ours):
    """Between plain generate's two best logits where ours first differs."""
    import torch

    at = next(i for i, (a, b) in enumerate(zip(plain, ours)) if a != b)
    ids = torch.tensor([prompt + plain[:at]], device=model.device)
    with torch.no_grad():
        best = model(ids, logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def write(path, before, results):
    """Write the results of this device, and what the file held of others."""
    devices = {result["device"] for result in results}
    kept = [result for result in before if result["device"] not in devices]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + results, indent=1) + "\n", encoding="utf-8")


def run(args):
    if args.prompts:
        rows = json.loads(args.prompts.read_text(encoding="utf-8"))["rows"]
    else:
        with tempfile.TemporaryDirectory(prefix="peftlib-bench-") as folder:
            some = -(-args.rows // len(FILES))
            rows = make_prompts(Path(folder) / "rows.json", args.data, a_source=some, max_length=args.max_length)
    rows = spread(rows, args.rows) if args.rows else rows
    bench = Bench(args, rows)
    width, most = sum(map(len, bench.prompts)) / len(rows), sum(bench.limits) / len(rows)
    print(
        f"{bench.facts['device']}: {len(rows)} rows, prompts of {width:.0f} and answers of {most:.0f} tokens on average"
    )
    model = bench.load(bench.dtype)
    plain = plain_runs(bench, model)
    our_runs(bench, model, plain, library_runs(bench, model) if bench.has_time(2 * REST_SECONDS) else {})
    del model
    for part, seconds in ((equality, 30.0), (merging, 20.0)):
        if getattr(args, f"{'equal' if part is equality else 'merge'}_rows") and bench.has_time(seconds):
            gc.collect()
            part(bench)
    print("\n" + "\n".join(map(line_of, bench.results)), flush=True)
    verdict(bench)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="JSON file that gets the results of this device")
    parser.add_argument("--make-prompts", type=Path, metavar="FILE", help="only write the rows, as token ids")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--a-source", type=int, default=600, help="rows of each source in --make-prompts")
    parser.add_argument(
        "--max-length", type=int, default=None, help="of a conversation; 1024, made for a CPU here: 256"
    )
    parser.add_argument("--prompts", type=Path, help="rows that --make-prompts wrote; else made from --data")
    parser.add_argument("--model", default=None, help="folder; the packaged 270M if not given")
    parser.add_argument("--model-name", default="Gemma 3 270M, packaged")
    parser.add_argument("--rows", type=int, default=None, help="take the first so many; 210 on a CPU")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="256 on a GPU, 48 on a CPU")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], help="of plain generate")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seconds", type=float, default=0.0, help="start nothing after so many")
    parser.add_argument("--cap", type=float, default=40.0, help="seconds of one plain run on a GPU")
    parser.add_argument("--grid-rows", type=int, default=None, help="of continuous batching; 1,800 on a GPU, else 64")
    parser.add_argument("--free", action="store_true", help="end rows at stop tokens or the token limit alone")
    parser.add_argument("--equal-rows", type=int, default=None, help="of the float32 check; 500 on a GPU, 0 on a CPU")
    parser.add_argument("--merge-rows", type=int, default=None, help="of merged against unmerged; all, 32 on a CPU")
    args = parser.parse_args(argv)
    if not args.out and not args.make_prompts:
        parser.error("give OUT.json, or --make-prompts FILE")
    return args


def main(argv):
    args = arguments(argv)
    args.started = time.monotonic()
    if args.make_prompts:
        args.max_length = args.max_length or 1024
        rows = make_prompts(args.make_prompts, args.data, a_source=args.a_source, max_length=args.max_length)
        size = args.make_prompts.stat().st_size / 2**20
        print(f"{args.make_prompts}: {len(rows)} rows, {size:.1f} MiB")
        return
    import torch

    is_gpu = torch.cuda.is_available()
    defaults = {"rows": 0 if is_gpu else 210, "max_new_tokens": 256 if is_gpu else 48}
    defaults |= {"max_length": 1024 if is_gpu else 256}  # as in the study, and in the demo
    defaults |= {"equal_rows": 500 if is_gpu else 0, "merge_rows": 10**6 if is_gpu else 32}
    defaults |= {"grid_rows": 1800 if is_gpu else 64}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.model is None:
        from peftlib.models.packaged import packaged_model

        args.model = str(packaged_model())
    run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
