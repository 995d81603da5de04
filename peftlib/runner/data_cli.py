"""`python -m peftlib data`: what notebook 01_data does, from the command line."""

import argparse

from peftlib.core.config import PROFILES, from_text, resolve
from peftlib.core.env import output_root
from peftlib.core.study import Study
from peftlib.storage.mirror import open_mirror

_STUDY_SIZED = PROFILES["t4"]  # where row counts are given, what else the data need comes from the study's profile


def main(argv):
    """Build a study's data and freeze its config; returns 0. PeftlibError: as build_data, Study.resolve and resolve."""
    args = _parser().parse_args(argv)
    folder = output_root() / resolve(args.profile, study=args.study).study
    open_mirror(folder)
    study = Study.resolve(profile=args.profile, **_given(args, is_new=not (folder / "config.json").exists()))
    cfg = study.cfg
    print(f"study {cfg.study}, profile {cfg.profile}, in {study.folder}")
    print("  ".join(f"{name}={value!r}" for name, value in {"model": cfg.model, **cfg.fields_of("data")}.items()))

    from peftlib.data import build_data

    manifest = build_data(cfg, study.data_dir)
    study.freeze()
    print(summary(manifest))
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m peftlib data",
        description="Sources to train, valid and test rows in a study folder.",
        epilog="With --train or --test and without --profile, max_length and the share of validation rows are those of "
        "the full study, and the model that of the hardware's profile.",
    )
    parser.add_argument("--study", required=True, help="name of the study folder")
    parser.add_argument("--profile", help="demo, t4, gpu or auto (default: by the hardware)")
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME=FILE[,TESTFILE]",
        help="JSONL, JSON, CSV or Parquet, plain or gzip; or NAME=hub, NAME=sample. Once for each source",
    )
    parser.add_argument("--train", type=int, metavar="N", help="training rows a source")
    parser.add_argument("--valid", type=int, metavar="N", help="validation rows a source")
    parser.add_argument("--test", type=int, metavar="N", help="test rows a source")
    parser.add_argument("--seed", type=int, metavar="S", help="split seed")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="any setting")
    return parser


def _given(args, *, is_new):
    given = {
        "study": args.study,
        "sources": "; ".join(args.source) if args.source else None,
        "train_rows": args.train,
        "valid_rows": args.valid,
        "test_rows": args.test,
        "split_seed": args.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= {name: from_text(name, text) for name, text in args.p}
    if is_new and args.profile is None and (args.train or args.test):
        for name in ("train_rows", "test_rows", "max_length", "max_new_tokens"):
            given.setdefault(name, _STUDY_SIZED[name])
        share = _STUDY_SIZED["valid_rows"] / _STUDY_SIZED["train_rows"]
        given.setdefault("valid_rows", round(share * given["train_rows"]))
    return given


def summary(manifest):
    """Counts, rejects and conversions of a manifest as lines of text."""
    lines = [f"split {manifest['split_hash']}"]
    for name in manifest["sources"]:
        counts = ", ".join(f"{split} {manifest['counts'][split][name]:,}" for split in ("train", "valid", "test"))
        lines.append(f"{name}: {counts}; read {manifest['read'][name]:,}, not needed {manifest['unused'][name]:,}")
        for kind in ("rejected", "conversions"):
            named = ", ".join(f"{key} {n:,}" for key, n in manifest[kind][name].items())
            lines.append(f"  {kind}: {named or 'none'}")
    return "\n".join(lines)
