"""`python -m peftlib plan`: which method fits a GPU, in which micro-batch, and for how long."""

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError
from peftlib.core.gpus import card_at_hand, find_card
from peftlib.models.shapes import shape_of
from peftlib.train import estimate

_FULL_PROFILE_GIB = 17  # as env.profile_for_hardware draws the line


def lines(gpu, model, overrides, study=None):
    """The plan as lines of text. gpu: a name; None: the one here, or a t4, which is said. overrides: {field: value} of the config. study: a Study whose config and data hold.

    ConfigError: an unknown GPU or setting, or a card on which no method fits. ModelError: see cards.shape_of.
    """
    name, card = find_card(gpu) if gpu else card_at_hand() or find_card("t4")
    if gpu is None:
        yield f"no --gpu given: planned for a {name}"
    cfg = _config(card, model, overrides, study)
    manifest = study.manifest() if study is not None and study.manifest_path.exists() else None
    found = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest)
    if found.refusal:
        raise ConfigError(found.refusal)
    yield from found.lines()


def _config(card, model, overrides, study):
    given = {name: value for name, value in overrides.items() if name != "profile"}
    if model is not None:
        given["model"] = model
    if study is not None:
        return study.cfg.replace(**given)
    profile = overrides.get("profile") or ("gpu" if card.gib > _FULL_PROFILE_GIB and card.precision == "bf16" else "t4")
    return resolve(profile, **given)
