"""Nothing that is inf or nan changes a run or is written, in any precision; and the run can go on at other rates."""

import pytest
import torch

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, NonFiniteLossError
from peftlib.models.inspect import trainable
from peftlib.models.precision import apply_step, loss_scaler
from peftlib.notebook import training_panel
from peftlib.optim.apollo import ApolloAdamW
from peftlib.optim.galore import GaLoreAdamW
from peftlib.report import figures
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train import run_record
from peftlib.train.callbacks import Callback
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper

INF = float("inf")


def run_of(study, method, lines=None):
    return TrainingRun(study, method, log=(lambda line: None) if lines is None else lines.append)


def optimizer_tensors(run):
    """{(weight's number, name): tensor} of what the optimizer keeps; bitsandbytes nests it."""
    found = {}
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            parts = value if isinstance(value, dict) else {name: value}
            found |= {(number, part): t for part, t in parts.items() if isinstance(t, torch.Tensor)}
    return found


def state_of(run):
    """All that a step may change, copied."""
    tensors = {**trainable(run.model), **optimizer_tensors(run)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_unchanged(run, before):
    now = state_of(run)
    assert now.keys() == before.keys()
    for name, kept in before.items():
        assert torch.equal(now[name], kept), name


def spoil_gradient(run, leaf, step):
    """Make the gradient of the last weight whose name ends in `leaf` inf in one step, counted from 1; its name."""
    name, weight = [pair for pair in trainable(run.model).items() if pair[0].endswith(leaf)][-1]
    build = run._build_optimizer

    def spoilt(grad):
        return grad * INF if run.progress.step == step - 1 else grad

    def build_and_spoil():
        build()
        view = getattr(run.optimizer, "_views", {}).get(weight)
        if view is None:
            weight.register_hook(spoilt)
        else:  # whose layer makes what is projected, or the whole gradient, of the gradient of its output
            low = view.low
            view.low = lambda g, x: low(spoilt(g), x)

    run._build_optimizer = build_and_spoil
    return name


LEAVES = {
    "qlora": "up_proj.lora_B.default.weight",
    "lora": "up_proj.lora_B.default.weight",
    "galore": "mlp.up_proj.weight",
    "hybrid": "self_attn.q_proj.weight",
    "full": "mlp.up_proj.weight",
    "apollo": "mlp.up_proj.weight",
    "muon": "mlp.up_proj.weight",
}
SLOW = pytest.mark.slow
CASES = [
    *(pytest.param(m, "fp32", 4, marks=() if m in ("galore", "full") else SLOW) for m in LEAVES),
    *(pytest.param(m, "bf16", 3, marks=() if m == "hybrid" else SLOW) for m in LEAVES),
    pytest.param("qlora", "fp32", 6),  # the last step
]


@pytest.mark.parametrize("method, precision, step", CASES)
def test_an_inf_gradient_stops_the_run_before_it_changes_anything(make_study, method, precision, step):
    study = make_study(save_steps=2, precision=precision)
    run = run_of(study, method)
    name = spoil_gradient(run, LEAVES[method], step)
    seen, one = [], run._step
    run._step = lambda: (seen.append(state_of(run)), one())
    with pytest.raises(NonFiniteLossError) as caught:
        run.train()
    told = str(caught.value)
    assert (
        f"the gradient of {name} of step {step} is inf or nan (1 of " in told and f"({precision}, learning rate" in told
    )
    kept = (step - 1) // 2 * 2
    assert f"The last checkpoint is kept (step {kept})" in told and "-p resume_rate_factor=0.3" in told
    assert_unchanged(run, seen[-1])
    record = records.load(study, method, 0)
    assert (record["status"], record["steps"]) == ("failed", step - 1) and name in record["error"]
    assert CheckpointDir(study.checkpoint_dir(method, 0), keep=1).newest()[0].state["progress"]["step"] == kept
    assert not study.weights_dir(method, 0).exists()


def test_a_loss_that_is_not_finite_stops_the_run_though_its_gradients_are(make_study, monkeypatch):
    run = run_of(make_study(), "qlora")
    real = Stepper.gradients
    monkeypatch.setattr(
        Stepper, "gradients", lambda *a, **kw: real(*a, **kw) + (INF if run.progress.step == 1 else 0.0)
    )
    seen, one = [], run._step
    run._step = lambda: (seen.append(state_of(run)), one())
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 is inf .*There is no checkpoint yet"):
        run.train()
    assert_unchanged(run, seen[-1])


def plant(run, kind):
    """Put an inf into one kind of what a step has summed; the loss that the step reports."""
    optimizer = run.optimizer
    if kind == "whole":
        assert optimizer._full, "no basis is due"
        next(iter(optimizer._full.values()))[0, 0] = INF
    elif kind == "projected":
        optimizer._gather()
        next(iter(optimizer._low.values()))[0, 0] = INF
    elif kind == "plain":
        next(p for group in optimizer.param_groups if "rank" not in group for p in group["params"]).grad[0] = INF


@pytest.mark.parametrize("method", ["hybrid", "galore"])
def test_fp16_skips_and_counts_each_kind_of_overflow_and_changes_nothing(make_study, monkeypatch, method):
    kinds = {0: "whole", 2: "projected", 3: "plain", 4: "loss", 6: "whole"}  # a basis is due in every step: gap 3
    lines = []
    run = run_of(make_study(precision="fp16", epochs=2, max_steps=8), method, lines)
    real, unchanged = Stepper.gradients, []

    def gradients(*args, **settings):
        loss = real(*args, **settings)
        plant(run, kinds.get(run.progress.step))
        return loss * (INF if kinds.get(run.progress.step) == "loss" else 1.0)

    one = run._step

    def step():
        at, before = run.progress.step, state_of(run)
        one()
        if at in kinds:
            assert_unchanged(run, before)
            unchanged.append(at)

    monkeypatch.setattr(Stepper, "gradients", gradients)
    run._step = step
    record = run.train()
    assert unchanged == list(kinds) and record["skipped_steps"] == 5 and record["status"] == "ok"
    assert [entry["step"] - 1 for entry in record["history"] if entry["grad_norm"] is None] == [0, 2, 3, 6]
    assert [entry["step"] - 1 for entry in record["history"] if entry["loss"] is None] == [4]
    assert any("loss not finite" in line for line in lines) and record["train_loss"] > 0


def projected(cls):
    torch.manual_seed(0)
    weight, vector = torch.nn.Parameter(torch.randn(8, 12)), torch.nn.Parameter(torch.ones(8))
    group = {"params": [weight], "rank": 2, "update_gap": 2, "scale": 1.0}
    return weight, vector, cls([group, {"params": [vector]}], lr=1e-2, max_grad_norm=1.0)


@pytest.mark.parametrize("cls", [GaLoreAdamW, ApolloAdamW])
@pytest.mark.parametrize("where", ["weight", "vector"])
def test_the_weight_with_the_inf_is_known_though_clipping_spoils_all_gradients(cls, where):
    weight, vector, optimizer = projected(cls)
    culprit = {"weight": weight, "vector": vector}[where]
    loss = (weight.sum(1) * vector).sum() + culprit.flatten()[0] * INF
    loss.backward()
    done = apply_step(optimizer, loss_scaler("cpu", "fp32"), torch.tensor(1.0))
    assert not done.is_applied and optimizer.nonfinite_weights() == [culprit] and not optimizer.state[weight]


def test_an_inf_in_a_pass_for_bases_alone_is_found():
    torch.manual_seed(0)
    weight, other = (torch.nn.Parameter(torch.randn(8, 12)) for _ in range(2))
    optimizer = GaLoreAdamW(
        [{"params": [weight, other], "rank": 2, "update_gap": 2, "scale": 1.0}], lr=1e-2, whole_gradient_bytes=1
    )
    for at, _ in enumerate(optimizer.basis_passes()):
        ((weight * other).sum() + (weight.flatten()[0] * INF if at == 0 else 0.0)).backward()
    (weight * other).sum().backward()
    _, found_inf = optimizer.finish_accumulation()
    assert found_inf == 1 and optimizer.nonfinite_weights() == [weight]
    optimizer.zero_grad()
    (weight * other).sum().backward()
    assert optimizer.finish_accumulation()[1] == 0


@pytest.mark.parametrize("at", [2, 6], ids=["checkpoint", "final weights"])
@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_not_finite_is_not_saved_but_named(make_study, at, what):
    study = make_study(save_steps=1)
    run = run_of(study, "lora")
    one = run._step
    name, weight = list(trainable(run.model).items())[3]

    def step():
        one()
        if run.progress.step == at:
            (weight.data if what == "weight" else run.optimizer.state[weight]["exp_avg"]).view(-1)[1] = float("nan")

    run._step = step
    if (at, what) == (6, "moment"):
        assert run.train()["status"] == "ok"  # moments are no part of what stays
        return
    named = name if what == "weight" else f"exp_avg of {name}"
    with pytest.raises(NonFiniteLossError, match=f"{named} contains inf or nan, so the .* was not saved"):
        run.train()
    assert CheckpointDir(study.checkpoint_dir("lora", 0), keep=1).newest()[0].state["progress"]["step"] == at - 1
    assert not study.weights_dir("lora", 0).exists()


def test_a_validation_loss_that_is_nan_is_recorded_as_unknown_and_told(make_study, monkeypatch):
    monkeypatch.setattr("peftlib.train.loop.mean_loss", lambda *args, **settings: float("nan"))
    lines, shown = [], []

    class Looker(Callback):
        def show(self, snapshot):
            shown.append(training_panel.ending(snapshot, lines)["text/plain"])
            figures.loss_curves([vars(snapshot)])

    looker = Looker()
    run = run_of(make_study(eval_steps=2, max_steps=2, report_to="tensorboard"), "qlora", lines)
    record = run.train([looker])
    assert record["status"] == "ok" and record["valid_history"] == [{"step": 2, "valid_loss": None}]
    assert "step 2/2  validation loss is nan: recorded as unknown" in lines
    assert not looker.is_dropped and shown and not any("was disabled" in line for line in lines)
    assert figures.loss_curves([record]).alt


def test_losses_of_an_evaluation_that_are_nan_are_recorded_as_unknown(make_study, monkeypatch):
    from peftlib.evaluation.evaluate import evaluate

    study, lines = make_study(), []
    monkeypatch.setattr("peftlib.evaluation.evaluate.mean_loss", lambda *args, **settings: float("nan"))
    record = evaluate(study, "base", log=lines.append)
    assert record["eval_loss"] is None and record["evaluation"]["general_loss"] is not None
    assert "base: eval_loss is nan: recorded as unknown" in lines


def failing(study, at, method="qlora"):
    """A run of the study that meets an inf at a step; its error in words."""
    run = run_of(study, method)
    spoil_gradient(run, LEAVES[method], at)
    with pytest.raises(NonFiniteLossError) as caught:
        run.train()
    return str(caught.value)


def rates_of(record):
    return [entry["learning_rate"] for entry in record["history"]]


def test_a_run_goes_on_at_lower_rates_from_its_checkpoint_and_says_so(make_study):
    straight = rates_of(run_of(make_study(study="straight"), "qlora").train())
    fields = {"study": "diverged", "save_steps": 1}
    assert "resume_rate_factor=0.3" in failing(make_study(**fields), at=3)
    lowered = make_study(**fields, resume_rate_factor=0.25, max_seconds=1e-9)
    lines = []
    record = run_of(lowered, "qlora", lines).train()  # one step, then cut
    assert record["steps"] == 3 and any("0.25 times the study's from step 2 on" in line for line in lines)
    assert "resume_rate_factor=0.075" in failing(make_study(**fields), at=5)  # without the setting, at the same rates
    record = run_of(make_study(**fields, resume_rate_factor=0.25), "qlora").train()  # again: not multiplied twice
    assert record["status"] == "ok" and record["rate_factor"] == 0.25
    assert rates_of(record) == straight[:2] + [0.25 * rate for rate in straight[2:]]
    [change] = record["changes"]
    assert change.pop("at") and change == {"step": 2, "what": "rate_factor", "from": 1.0, "to": 0.25}
    told = next(run_record.change_sentences(record))
    assert told.startswith(
        "qlora (seed 0) was not trained like the others: from step 2 on, its learning rates were 0.25"
    )


def test_a_run_without_a_checkpoint_starts_over_at_lower_rates_and_a_fresh_one_does_not(make_study):
    straight = rates_of(run_of(make_study(study="straight"), "qlora").train())
    failing(make_study(), at=2)
    lines = []
    record = run_of(make_study(resume_rate_factor=0.5), "qlora", lines).train()
    assert rates_of(record) == [0.5 * rate for rate in straight]
    assert [(c["step"], c["from"], c["to"]) for c in record["changes"]] == [(0, 1.0, 0.5)]
    record = run_of(make_study(study="fresh", resume_rate_factor=0.5), "qlora", lines).train()
    assert rates_of(record) == straight and record["changes"] == [] and record["rate_factor"] == 1.0
    assert any("this run starts with the study's learning rates" in line for line in lines)


@pytest.mark.parametrize("value", [0.0, -1.0, 101.0, float("nan")])
def test_a_rate_factor_out_of_range_is_refused(make_study, value):
    with pytest.raises(ConfigError, match="resume_rate_factor="):
        make_study(resume_rate_factor=value)
