"""Numbers in the hand-written prose of README and docs: from results/, or measured once and listed here."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import plan_tables
import pytest
import update
from bench_tables import best_of_grids
from result_tables import Results

from peftlib.core.config import resolve
from peftlib.evaluation.benchmarks.tasks import RETENTION, SETS
from peftlib.methods import find
from peftlib.models.shapes import CARDS, find_card, shape_of
from peftlib.notebook import planner
from peftlib.runner.suite_plan import plan_lines
from peftlib.train import estimate
from peftlib.train.memory_model import HEADROOM, trained_numbers

R = Results()
BENCH = Path(__file__).resolve().parents[2] / "results" / "bench"
LATER_RUN = "two cards, later that day"  # the second run of the second day
DAYS = "2026-11-27", "2026-11-28"  # on which ours ran beside Unsloth: on an H100, on an H200
PAGES = {page.name: page for page in update.pages()}
# Thousands with commas, decimals, and whole percents; no dates, versions or parts of names.
NUMBER = re.compile(r"(?<![\w.,/-])(?:\d{1,3}(?:,\d{3})+|\d+\.\d+|\d+(?= %))(?![\d.]*[\w/-])")


def bench(**wanted):
    """The one row of results/bench/methods.json with these values."""
    [row] = [row for row in R.methods if wanted.items() <= row.items()]
    return row


def as_planned(name):
    """The row of a setting at the planner's choice."""
    return bench(name=name, is_planned=True)


def halves(method):
    """Seconds of the second half of a method's steps over those of the first, without the first two."""
    steps = as_planned(f"{method}_fp16")["steps_s"][2:]
    return sum(steps[len(steps) // 2 :]) / sum(steps[: len(steps) // 2])


def galore_with_refreshes():
    """Tokens/s of GaLore with one of its steps that make new bases in 33."""
    steps = as_planned("galore_fp16")["steps_s"][2:]
    return 33 * 16 * 1024 / (32 * statistics.median(steps) + max(steps))


def work(method, rank):
    """Operations of a token at a rank over those at the default one."""
    shape, default = shape_of("gemma-3-1b"), resolve("gpu")
    if method == "galore":
        of = {
            r: estimate.flops_per_token(shape, find(method), length=1024, rank=r) for r in (rank, default.galore_rank)
        }
        return of[rank] / of[default.galore_rank]
    base = estimate.flops_per_token(shape, find(method), length=1024)
    adapters = (6 * trained_numbers(shape, method, resolve("gpu", lora_rank=r)) for r in (rank, default.lora_rank))
    high, low = (base + each for each in adapters)
    return high / low


def benchmark(task):
    """Score and rows of the untrained model, on the most rows that were scored."""
    rows = json.loads((BENCH / "benchmarks.json").read_text("utf-8"))["rows"]
    best = max((row for row in rows if (row["method"], row["task"]) == ("base", task)), key=lambda row: row["n"])
    return [best["score"], best["n"]]


def score_of(method, task):
    """The row of a trained method on a GPU."""
    rows = json.loads((BENCH / "benchmarks.json").read_text("utf-8"))["rows"]
    return next(row for row in rows if (row["method"], row["task"]) == (method, task) and "NVIDIA" in row["device"])


def checkpoint():
    return next(row["checkpoint_gib"] for row in R.methods if "checkpoint_gib" in row)


def slower(name, than):
    """By how much more time a token takes in one row than in another."""
    return bench(name=than)["tok_s"] / bench(name=name)["tok_s"] - 1


def graphed(has_fault):
    """GaLore's first losses with CUDA graphs, before or after a fault was mended."""
    rows = [row for row in bench_file("graphs") if row["way"] == "graphs" and row["precision"] == "bf16"]
    return next(row["losses"] for row in rows if ("before" in row["code"]) == has_fault)


def ratio(ours, peer, day=DAYS[0]):
    """Speed of ours over the best of a peer's grid on that day."""
    for mine, best in best_of_grids(R.methods):
        for a in (row for row in mine if (row["name"], row["date"]) == (ours, day)):
            for b in (row for row in best if row["grid"] == peer):
                return a["tok_s"] / b["tok_s"]


def quick():
    """{part: minutes at the slow end} of the profile quick on a T4, and both ends of the sum."""
    cfg, (name, card) = resolve("quick"), find_card("t4")
    found = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model))
    parts = {part: high / 60 for part, (_, high) in planner.notebooks_parts(found).items()}
    low, high, _ = planner.notebooks_cost(found)
    n = len(cfg.sources.split(";"))
    return {
        **vars(cfg),
        **parts,
        "low": low / 60,
        "high": high / 60,
        "all_rows": n * cfg.train_rows,
        "tested": n * cfg.test_rows,
    }


def parity(who, name):
    """A number of every method's parity row of one side."""
    return [row[name] for row in R.parity if row["who"] == who]


def compiling_saves(method):
    """By how much shorter a step is with compiled layers."""
    plain, compiled = (
        next(row for row in R.parity if (row["method"], row["who"]) == (method, who)) for who in ("ours", "compiled")
    )
    return 1 - plain["tok_s"] / compiled["tok_s"]


def first_steps(cache, *only):
    """Least and most seconds of the first steps of some methods, of all but DoRA if none is named."""
    rows = [row for row in bench_file("first_steps") if row["cache"] == cache]
    found = [row["first_step_s"] for row in rows if (row["method"] in only if only else row["method"] != "dora")]
    return min(found), max(found)


def bench_file(name):
    return json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))


# (page, its words with a format for each number, the numbers).
FROM_RESULTS = [
    ("running.md", "{:,.0f} rows in {:.0f} steps, the packaged 270M",
     [R.sweeps[0][name] for name in ("rows", "steps")]),
    ("README.md", "three to five seeds, {:,} real test rows", [R.reference["n_test"]]),
    ("README.md", "fp16 within a T4's {} GiB", [as_planned("qlora_fp16")["cap_gib"]]),
    ("README.md", "16 rows of {:,} tokens a step", [R.methods[0]["seq"]]),
    ("README.md", "{:.1f} million tokens", [R.reference["train_tokens"][0] / 1e6]),
    ("README.md", "not which method is better: {} test rows", [R.demo["rows"]["test"]]),
    ("memory.md", "16 sequences of {:,} tokens a step", [R.methods[0]["seq"]]),
    ("memory.md", "only {} GiB usable", [as_planned("qlora_fp16")["cap_gib"]]),
    ("memory.md", "for the {:,} training tokens", R.reference["train_tokens"]),
    ("memory.md", "measured on rows of {:,} tokens, while rows of the study average {:.0f},",
     [R.methods[0]["seq"], R.reference["tokens_per_row"]]),
    ("memory.md", "({train:,} training rows, {tokens:.1f} million tokens)",
     {"train": R.reference["rows"]["train"], "tokens": R.reference["train_tokens"][0] / 1e6}),
    ("memory.md", "at ${:.2f} on a T4, ${:.2f} on an L4 and ${:.2f} on an A100", [CARDS[name].dollars for name in ("t4", "l4", "a100")]),
    ("memory.md", "for the {:,} test rows", [R.reference["n_test"]]),
    ("memory.md", "not measured above {:,} tokens", [R.methods[0]["seq"]]),
    ("memory.md", "with {:,} tokens in every step", [16 * R.methods[0]["seq"]]),
    ("memory.md", "took {:.2f} (`qlora`), {:.2f} (`hybrid`) and {:.2f} (`galore`) times as", [halves(m) for m in ("qlora", "hybrid", "galore")]),
    ("memory.md", "took {:.2f} s instead of {:.2f}.", [f(as_planned("galore_fp16")["steps_s"][2:]) for f in (max, statistics.median)]),
    ("memory.md", "would be {:,.0f} tokens/s", [galore_with_refreshes()]),
    ("memory.md", "At {seq:,} tokens GaLore has to recompute {recomputed} of 26 layers", as_planned("galore_2048_tokens")),
    ("memory.md", "which costs {:.0%} more a token", [as_planned("galore_fp16")["tok_s"] / as_planned("galore_2048_tokens")["tok_s"] - 1]),
    ("memory.md", "at LoRA rank 64 a token costs {:.0%} more than at 16", [slower("qlora_rank_64", "qlora_rank_16")]),
    ("memory.md", "it costs the same within {:.0%}", [abs(slower("qlora_rank_8", "qlora_rank_16"))]),
    ("memory.md", "GaLore costs {:.0%} more at rank 256", [slower("galore_rank_256", "galore_rank_128")]),
    ("memory.md", "because {recomputed} layers must be recomputed", bench(name="galore_rank_256")),
    ("memory.md", "it would be {:.0%}.", [work("galore", 256) - 1]),
    ("memory.md", "with {recomputed} recomputed layers, which was", bench(name="galore_rank_32")),
    ("memory.md", "{:.0%} slower than rank 128", [slower("galore_rank_32", "galore_rank_128")]),
    ("memory.md", "ranks 8 and 32 cost {:.0%} less", [-slower("hybrid_ranks_8_32", "hybrid_ranks_16_128")]),
    ("memory.md", "same cap of {} GiB;", [14.5]),
    ("memory.md", "(micro-batch 4 to 32, recomputation on and off; {} settings)",
     [sum("grid" in row and row["date"] == "2026-11-26" for row in R.methods)]),
    ("memory.md", "at {:.2f} times Unsloth's best speed, on the H200 at {:.2f} times", [ratio("qlora", "unsloth", day) for day in DAYS]),
    ("memory.md", "{peak_gib:.2f} GiB at micro-batch 16, for {tok_s:,.0f} tokens/s on the H100", bench(name="unsloth_16_on", date=DAYS[0])),
    ("memory.md", "and {tok_s:,.0f} on the H200", bench(name="unsloth_16_on", date=DAYS[1])),
    ("memory.md", "Unsloth takes {peak_gib:.2f} GiB at micro-batch 4, for {tok_s:,.0f}.", bench(name="unsloth_4_on", date=DAYS[1])),
    ("memory.md", "ours takes {peak_gib:.2f} GiB at micro-batch 16, for {tok_s:,.0f} tokens/s", bench(name="qlora_memory_16")),
    ("memory.md", "and {peak_gib:.2f} GiB at micro-batch 4, for {tok_s:,.0f}.", bench(name="qlora_memory", date=DAYS[1])),
    ("memory.md", "losses went from {:.1f} to {:.1f} and {:.1f}", [graphed(True)[i] for i in (0, -2, -1)]),
    ("memory.md", "Now they go to {:.1f} and {:.1f}", graphed(False)[-2:]),
    ("memory.md", "GaLore ran at {:,.0f} tokens/s with it and at {:,.0f} without",
     [bench(name="galore", date=DAYS[0])["tok_s"], bench(name="galore_real_lengths", date=DAYS[1])["tok_s"]]),
    ("memory.md", "micro-batch {micro_batch} with {recomputed} recomputed layers, which ran at {tok_s:,.0f} tokens/s on an H200",
     bench(name="galore", date=DAYS[1], run=LATER_RUN)),
    ("memory.md", "micro-batch {micro_batch} without recomputation, which ran at {tok_s:,.0f}.", bench(name="galore_3_off")),
    ("memory.md", "micro-batch {micro_batch} without recomputation ran at {tok_s:,.0f} (", bench(name="galore_real_lengths", date=DAYS[1])),
    ("memory.md", "Ours took {peak_gib:.2f} GiB at micro-batch 8 for {tok_s:,.0f} tokens/s", bench(name="qlora_8_on")),
    ("memory.md", "16 rows of {:,} tokens a card and step", [R.scale[0]["seq"]]),
    ("memory.md", "steps got {:.0%} (`full`) to {:.0%} (`lora`) shorter", [compiling_saves(m) for m in ("full", "lora")]),
    ("memory.md", "it leaves {:.0%} of the memory free", [1 - HEADROOM]),
    ("memory.md", "at most {most:.2f} GiB of {cap_gib}; this setting is predicted at {predicted_gib:.2f}",
     {**bench(name="galore_real_lengths", date=DAYS[1]), "most": 14.5 * HEADROOM}),
    ("methods.md", "took {gradients_gib:.2f} GiB there, of {predicted_gib:.2f} planned",
     next(row for row in bench_file("first_steps") if (row["method"], row["cache"]) == ("dora", "empty"))),
    ("memory.md", "in the first step, took {:.0f} to {:.0f} s", [f(parity("compiled", "first_step_s")) for f in (min, max)]),
    ("memory.md", "at {:.2f} and {:.2f} times, in {:.2f} GiB",
     [*(ratio("qlora_lean", "unsloth", day) for day in DAYS), bench(name="qlora_lean", date=DAYS[0])["peak_gib"]]),
    ("README.md", "our QLoRA runs at {tok_s:,.0f} tokens/s", bench(name="qlora", date=DAYS[0])),
    ("README.md", "ran at {:.2f} to {:.2f} times the speed of one", [f(r["ratio"] for r in R.scale if r["gpus"] == 4) for f in (min, max)]),
    ("memory.md", "{:.0f} to {:.0f} s (`dora` {:.0f} s) on two cores of an H200's host with an empty cache, {:.0f} to {:.0f} s with a filled one",
     [*first_steps("empty"), first_steps("empty", "dora")[0], *first_steps("filled")]),
    ("memory.md", "take {:.2f} (`qlora`) and {:.2f} (`galore`) of the time, at {:.1f} and {:.1f} times the rate of one",
     [*(r["products_share"] for r in bench_file("cpu")["rows"]), *(r["products_of_ceiling"] for r in bench_file("cpu")["rows"])]),
    ("memory.md", "by at most {:.1e} (`qlora`), {:.1e} (`galore`), {:.1e} (`hybrid`) and {:.1e} (`full`) of the loss",
     [r["largest_relative_loss_difference"] for m in ("qlora", "galore", "hybrid", "full")
      for r in bench_file("resume_gpu") if r["method"] == m]),
    ("README.md", "{:.2f} times Unsloth's speed", [ratio("qlora", "unsloth")]),
    ("memory.md", "({matrices} matrices, rank {rank}) GaLore's fast bases capture at least {cold_min:.2%}", R.fp16["energy"]),
    ("memory.md", "from scratch, and at least {warm_min:.2%} when refreshed after {steps_apart} steps", R.fp16["energy"]),
    ("memory.md", "for these steps captures at least {stale_min:.0%}, and {stale_median:.0%} in the median", R.fp16["energy"]),
    *(("benchmarks.md", f"| {published} | {{:.3f}} | {{}} |", benchmark(task))
      for published, task in (("0.577", "arc_easy"), ("0.677", "piqa"), ("0.614", "boolq"),
        ("none found", "winogrande"), ("none found", "lambada_openai"))),
    ("benchmarks.md", "after QLoRA on {:,} real rows it answers {:.3f} of `gsm8k` correctly, and follows all instructions in {:.3f} of `ifeval`",
     [R.reference["rows"]["train"], *(R.reference["benchmarks"]["tasks"][task]["methods"]["qlora"]["value"] for task in ("gsm8k", "ifeval"))]),
    ("benchmarks.md", "takes {:.0f} seconds for one model",
     [sum(score_of("qlora", task)["seconds"] for task in SETS[RETENTION])]),
    ("resume.md", "checkpoint of the 1B has {:.2f} GiB", [checkpoint()]),
    ("running.md", "{train} training and {test} test rows, {steps} steps", {**R.demo["rows"], "steps": R.demo["steps"]}),
    ("running.md", "| {train_rows} / {valid_rows} / {test_rows}, from the first {max_read_rows:,} rows of each |", quick()),
    ("running.md", "is planned at {low:.1f} to {high:.1f} minutes for all five", quick()),
    ("running.md", "| three trainings of {all_rows:,} rows, all of {max_length} tokens | {training:.1f} |", quick()),
    ("running.md", "four models answer {tested} rows, all to the limit of {max_new_tokens} tokens | {answering:.1f} |", quick()),
    ("running.md", "read the test rows and {general_tokens:,} tokens of general text | {reading:.1f} |", quick()),
    ("running.md", "demonstrations; 45 s each are allowed | {opening:.1f} |", quick()),
    ("data.md", "reads the first {max_read_rows:,} rows of each source", quick()),
    ("running.md", "with {} rows the intervals are wide", [R.demo["rows"]["test"]]),
]  # fmt: skip
# (page, words) whose numbers are settings, published facts, or were measured by hand at the date the page tells.
KNOWN = [
    *((name, words) for name in PAGES for words in ("95 % interval",
      "Python 3.11, 3.12 or 3.13", "Python 3.11, 3.12 and 3.13", "CC BY-NC 4.0")),
    *(("benchmarks.md", words) for words in ("| accuracy | 0.25 |", "| accuracy | 0.50 |", "| 0.62, by always saying yes |",
      "| accuracy, by length | 0.25 |", "cut to 2,048 tokens")),
    ("cli.md", "on 1,500 rows"),
    ("running.md", "on 1,500 rows"),
    ("running.md", "| 5,000 / 200 / 2,000 |"),
    ("running.md", "cosine above 0.99 to 4,706 others"),
    ("data.md", "at least 0.8 on word 5-grams"),
    ("data.md", "(21,600 rows kept of 26,851 read,"),
    ("data.md", "3 s from cache, and 1.1 GiB"),
    ("evaluation.md", "81 to 87 % of the answers"),
    ("evaluation.md", "on 256 rows"),
    ("evaluation.md", "uses 80 % of the free memory"),
    ("evaluation.md", "vLLM 0.32.0 looks faster"),
    ("evaluation.md", "reached 0.42 of its speed on 24 rows in float32"),  # vllm.json
    ("evaluation.md", "used 1.56 times its processor time"),
    ("evaluation.md", "AlpacaEval 2.0"),
    ("export.md", "torchao 0.10"),
    ("export.md", "logits are 0.003 apart"),
    ("export.md", "logits are at most 0.13 apart"),
    ("running.md", "trains on the first 1,500 rows at"),
    ("running.md", "more than 0.5 nats"),
    ("running.md", "is more than 0.5 nats"),
    ("memory.md", "(torch 2.11)"),
    ("memory.md", "A T4 counts as 14.6 GiB"),
    ("memory.md", "about 2,600 to 2,900"),
    *(("memory.md", words) for words in ("within 0.5 % of those without graphs", "on other rows, within 0.7 %.",
      "the difference falls below 0.1 %")),  # held to the results by a test below
    ("memory.md", "A profiled step of 2,688 tokens on an H100"),
    ("memory.md", "| 37.2 | 2,887 | 21.0 | 5.1 | 2.0 | 1.9 | 1.4 |"),
    ("memory.md", "| 40.2 | 2,685 | 20.0 | 6.9 | none | 1.9 | 1.4 |"),
    ("memory.md", "| 37.9 | 2,817 | 21.2 | 5.4 | 1.6 | 1.9 | 1.4 |"),
    ("memory.md", "of 11 s that we profiled"),
    ("memory.md", "autograd took 4 s, generating code 5.5 s"),
    ("memory.md", "quarter of the 104 s"),
    ("memory.md", "saved only 2 % of the compiler's"),
    ("memory.md", "estimated as 40 % of each remaining step"),
    ("memory.md", "an H100's host with"),
    ("memory.md", "at step 5 (transformers 5.17"),
    ("memory.md", "machine had transformers 5.17,"),
    ("memory.md", "over 24 steps of the 1B shape, killed after step 14"),
    ("memory.md", "same 4,800 real rows in the same order, 300 steps of 16"),
    ("memory.md", "(600 rows, one seed)"),
    ("memory.md", "as users run it within 14.5 GiB"),
    ("memory.md", "18 to 25 s on 64."),
    ("README.md", "the losses of stock libraries within 0.1 %"),  # held to the results by a test below
    ("memory.md", "layers took 0.07 s on 2026-11-25"),
    ("memory.md", "Unsloth 2026.10.9"),
    ("methods.md", "capability 8.0"),
    *(("reference-study.md", words) for words in ("at rank 256", "256 is the highest rank possible", "about 19 minutes on four GPUs", "benchmarks of seeds 0 and 2", "| Gemma 3 270M", "262 of 8,188 are genuine", "UltraChat's 1,200 are genuine",
      "at rank 32 instead of 128", "with rows of 1,024 tokens", "**4 GiB**", "**8 GiB**", "**15 GiB**", "**24 GiB**",
      "do not contain 0", "have 256 rows")),
    ("resume.md", "at 0.3 times"),
    ("resume.md", "less than 2 % of the time"),
    ("resume.md", "(2.60 float32 weights, 0.70 bases and moments), 2.83 with `moment_bits = 8`, and 1.53 with"),
    ("resume.md", "A QLoRA checkpoint has 0.15."),
    ("resume.md", "1,363 faults"),
]  # fmt: skip


def prose(name, has_comments=False):
    """A page's hand-written sentences, one line: without tables between markers, code blocks and link targets.

    Numbers that a comment behind them states are test_stated.py's: they are left out with it unless has_comments.
    """
    text = PAGES[name].read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^    .*$|^\d+\. ", "", text, flags=re.MULTILINE)
    text = " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())
    return text if has_comments else re.sub(r"[\d.,]+( %)?<!-- = .*? -->|<!-- is .*? -->", "", text)


def filled(words, numbers):
    made = words.format(**numbers) if isinstance(numbers, dict) else words.format(*numbers)
    return made.replace("%", " %")


@pytest.mark.parametrize("name, words, numbers", FROM_RESULTS, ids=lambda value: str(value)[:40])
def test_a_number_in_prose_is_the_one_in_results(name, words, numbers):
    assert filled(words, numbers) in prose(name)


@pytest.mark.parametrize("name", PAGES)
def test_every_number_in_prose_has_a_source(name):
    text = prose(name)
    told = [filled(words, numbers) for page, words, numbers in FROM_RESULTS if page == name]
    for words in (*told, *(words for page, words in KNOWN if page == name)):
        text = text.replace(words, "")
    text = re.sub(r"`[^`]*`", "", text)
    left = [text[max(0, found.start() - 40) : found.end() + 15] for found in NUMBER.finditer(text)]
    assert left == [], "add a line to FROM_RESULTS, or to KNOWN if it is not from results/"


def test_the_table_of_costs_has_the_figures_that_peftlib_plan_prints():
    tokens = {"train": {"all": {"total": R.reference["train_tokens"][0]}}}
    study = SimpleNamespace(
        cfg=resolve("gpu"),
        manifest_path=BENCH,
        manifest=lambda: {"counts": {"train": {"all": R.reference["rows"]["train"]}}, "tokens": tokens},
    )
    table = [row for row in plan_tables.cards(R) if row[1] != "answering"][1:]
    for name in ("t4", "l4", "a100"):
        rows = [row for row in table if row[0] == name.upper()]
        names = [row[1].strip("`") for row in rows]
        printed = list(plan_lines(name, {"model": "google/gemma-3-1b-it"}, study, names))
        for (_, _, *cells, paid), method, line in zip(rows, names, printed[2:]):
            assert [method, "yes", *cells, "estimate"] == re.split(r"  +", line)
            assert f"{method} {paid}" in printed[-1]


def test_losses_with_cuda_graphs_are_as_near_to_those_without_as_the_page_says():
    def furthest(code, way):
        """Share by which a loss of CUDA graphs differs at most from that of another way."""
        of = {
            row["way"]: row["losses"]
            for row in bench_file("graphs")
            if (row["code"], row["precision"], row["micro_batch"]) == (code, "bf16", 1)
        }
        return max(abs(a / b - 1) for a, b in zip(of["graphs"], of[way], strict=True))

    assert furthest("ffde2b5", "none") < 0.005
    assert furthest("aba94d2", "gathered") < 0.001 and 0.0065 < furthest("aba94d2", "none") < 0.0075


def test_compiling_saves_least_with_full_and_most_with_lora():
    saved = {row["method"]: compiling_saves(row["method"]) for row in R.parity if row["who"] == "compiled"}
    assert (min(saved, key=saved.get), max(saved, key=saved.get)) == ("full", "lora")


def test_losses_are_as_near_to_those_of_stock_libraries_as_readme_says():
    assert {row["method"] for row in R.parity if row["who"] == "ours"} == {"qlora", "lora", "galore", "full"}
    assert max(map(abs, parity("ours", "loss_over_stock") + parity("compiled", "loss_over_stock"))) < 0.001


def test_the_demo_is_too_small_to_tell_what_training_gained_beyond_stopping():
    assert all(gap["is_noise"] for gap in R.demo["rougeL_over_base_cut"].values())
    assert not any(gap["is_noise"] for gap in R.demo["rougeL_over_base"].values())
