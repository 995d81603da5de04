"""fp16 against bf16 on a real model, and what GaLore's fast bases keep of real gradients: one GPU, the normal path.

    python tests/bench/fp16.py STUDY OUT.json [--steps 100] [--seeds 0,1,2] [--model DIR]

STUDY: a study below PEFTLIB_ROOT whose data stand (python -m peftlib data). Each method trains `steps` steps in either
precision for each seed, which shuffles the rows; loss is the mean of the last fifth of the steps. Seeds run side by
side, one process each, for these runs are not timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
from pathlib import Path

METHODS = ("qlora", "galore", "hybrid")
PRECISIONS = ("bf16", "fp16")


def runs(study_name, *, seed, steps, model):
    """[{method, precision, seed, last_losses, skipped_steps, ...}, ...] of one seed, one after the other."""
    for method in METHODS:
        for precision in PRECISIONS:
            yield _trained(study_name, method, model, steps=steps, seed=seed, precision=precision)
    if seed == 0:
        for on_refresh in ("keep", "project"):
            fields = {"galore_on_refresh": on_refresh, "galore_update_interval": 20}
            yield {
                **_trained(study_name, "galore", model, steps=steps, seed=seed, precision="bf16", **fields),
                **fields,
            }


def _trained(study_name, method, model, **fields):
    from peftlib.train.loop import TrainingRun

    steps = fields.pop("steps")
    study = _study(study_name, model, max_steps=steps, eval_steps=steps, save_steps=10**6, compile="off", **fields)
    record = TrainingRun(study, method, log=lambda line: None).train()
    losses = [entry["loss"] for entry in record["history"]]
    return {
        "method": method,
        "precision": record["precision"],
        "seed": fields["seed"],
        "steps": steps,
        "first_loss": losses[0],
        "last_losses": statistics.fmean(losses[-steps // 5 :]),
        "valid_loss": record["valid_history"][-1]["valid_loss"],
        "skipped_steps": record["skipped_steps"],
        "device": record["device"],
    }


def _study(name, model, **fields):
    """The study's data under a config of their own: nothing is written into its folder but this run's record."""
    import tempfile

    from peftlib.core.config import resolve
    from peftlib.core.env import output_root
    from peftlib.core.files import read_json
    from peftlib.core.study import Study

    frozen = read_json(output_root() / name / "config.json")
    given = {**frozen["config"], **({"model": model} if model else {}), **fields}
    study = Study(Path(tempfile.mkdtemp()) / name, resolve(frozen["profile"], study=name, **given))
    study.folder.mkdir(parents=True)
    study.data_dir.symlink_to(output_root() / name / "data")
    study.freeze()
    return study


def energies(study_name, model, *, apart=100):
    """Energy of the fast bases as a share of the exact ones', over all projections: cold, and warm `apart` steps on."""
    import torch

    from peftlib import data
    from peftlib.models.inspect import PROJECTIONS, named_weights
    from peftlib.models.kernels.losses import batch_loss_sum
    from peftlib.models.precision import autocast
    from peftlib.optim import subspace as basis
    from peftlib.train.batching import Rows
    from peftlib.train.loop import TrainingRun

    study = _study(study_name, model, max_steps=apart, eval_steps=10**6, save_steps=10**6, compile="off", seed=0)
    run = TrainingRun(study, "galore", log=lambda line: None)
    rows = Rows(data.load_split(study.data_dir, "train")[: 2 * study.cfg.batch_size])
    half = len(rows) // 2

    def gradients(numbers):
        batch = rows.batch([[n] for n in numbers], run.device)
        weights = named_weights(run.model, PROJECTIONS)
        with autocast(run.device, run.precision):
            loss = batch_loss_sum(run.model, batch)
        made = torch.autograd.grad(loss, list(weights.values()))
        return [basis.turned(grad.float()) for grad in made]

    def share(grads, starts, iterations):
        kept, bases = [], []
        for grad, start in zip(grads, starts, strict=True):
            fast = basis.leading_space(basis.gram(grad)[None], start[None], iterations)[0]
            exact = basis.fit_basis(grad, study.cfg.galore_rank)
            kept.append(basis.energy(grad, fast) / basis.energy(grad, exact))
            bases.append(fast)
        return kept, bases

    first = gradients(range(half))
    rank = study.cfg.galore_rank
    starts = [basis.random_start(len(g), rank, seed=i, device=g.device) for i, g in enumerate(first)]
    cold, bases = share(first, starts, basis.COLD_ITERATIONS)
    run.train()
    for p in named_weights(run.model, PROJECTIONS).values():
        p.requires_grad_(True)
    later = gradients(range(half, 2 * half))
    kept = {"cold": cold, "warm": share(later, bases, basis.WARM_ITERATIONS)[0], "stale": share(later, bases, 0)[0]}
    found = {"rank": rank, "matrices": len(cold), "steps_apart": apart}
    for name, shares in kept.items():
        found |= {f"{name}_min": min(shares), f"{name}_median": statistics.median(shares)}
    return found


def summary(found):
    """Lines of text: for each method and seed the loss in either precision and their relative difference."""
    by_key = {(r["method"], r["seed"], r["precision"]): r for r in found if "galore_on_refresh" not in r}
    for method, seed in sorted({key[:2] for key in by_key}):
        if not all((method, seed, precision) in by_key for precision in PRECISIONS):
            continue  # the benchmark was cut
        bf16, fp16 = (by_key[method, seed, precision] for precision in PRECISIONS)
        apart = fp16["last_losses"] / bf16["last_losses"] - 1
        yield (
            f"{method:<8} seed {seed}  bf16 {bf16['last_losses']:.4f}  fp16 {fp16['last_losses']:.4f}  "
            f"{100 * apart:+.3f} %  skipped {fp16['skipped_steps']}  (first loss {bf16['first_loss']:.3f})"
        )
    for r in found:
        if "galore_on_refresh" in r:
            yield f"moments {r['galore_on_refresh']:<8} seed {r['seed']}  valid {r['valid_loss']:.4f}"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--model", default="")
    parser.add_argument("--one", action="store_true", help="one seed, here and now")
    args = parser.parse_args(argv)
    if args.one:
        for found in runs(args.study, seed=int(args.seeds), steps=args.steps, model=args.model):
            print("RESULT " + json.dumps(found), flush=True)
        if args.seeds == "0":
            print("ENERGY " + json.dumps(energies(args.study, args.model, apart=args.steps)), flush=True)
        return
    again = [sys.executable, __file__, args.study, args.out, "--one", "--steps", str(args.steps), "--model", args.model]
    children = [
        subprocess.Popen([*again, "--seeds", seed], stdout=subprocess.PIPE, text=True) for seed in args.seeds.split(",")
    ]
    found = {"runs": [], "energy": None}
    threads = [threading.Thread(target=_collect, args=(child, found, Path(args.out))) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(summary(found["runs"])))
    print(found["energy"])


def _collect(child, found, out):
    """Take a child's results as they come and write them all down, so that a cut benchmark keeps what it has."""
    for line in child.stdout:
        kind, _, text = line.partition(" ")
        if kind == "RESULT":
            found["runs"].append(json.loads(text))
        elif kind == "ENERGY":
            found["energy"] = json.loads(text)
        else:
            continue
        print(line.rstrip()[:160], flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if child.wait():
        print(f"a seed's process ended with exit code {child.returncode}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
