"""Losses of a study's runs with their adapters merged into the dequantized base and into the one in 16 bits.

    python tests/bench/merges.py STUDY OUT.json [METHOD ...]

STUDY: the folder of a study whose METHODs (qlora) are trained. In nats per token on its test rows, float32 on a CPU.
"""

import argparse
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def measured(study, method):
    from peftlib import data
    from peftlib.core.files import read_json
    from peftlib.models.saved import facts_of, load_plain, load_rounded, load_trained
    from peftlib.train.batching import Rows, mean_loss

    def loss_of(model):
        return mean_loss(model, rows, device="cpu", precision="fp32")

    def quiet(line):
        """What load_trained could not check is no part of the figures."""

    rows, weights = Rows(data.load_split(study / "data", "test")), study / "weights" / f"{method}-s0"
    facts, counts = facts_of(weights), read_json(study / "data" / "manifest.json")["counts"]
    name, four_bit, precision = (facts[name] for name in ("model", "four_bit", "precision"))
    return {
        "run": study.name,
        "train_rows": sum(counts["train"].values()),
        "test_rows": len(rows),
        "method": method,
        "base_16_bit": loss_of(load_plain(name, device="cpu")),
        "base_nf4": loss_of(load_rounded(name, four_bit, precision=precision, device="cpu")),
        "into_dequantized": loss_of(load_trained(weights, log=quiet)),
        "into_16_bit": loss_of(load_trained(weights, on_16_bit=True, log=quiet)),
    }


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", default=["qlora"])
    args = parser.parse_args(argv)
    rows = [measured(args.study, method) for method in args.methods]
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(sys.argv[1:])
