"""Settings of a tiny study that `peftlib study` runs."""

import pytest
from tiny import TINY

from peftlib.runner.suite_jobs import Settings


@pytest.fixture
def settings(tiny_model, make_study):
    """settings(**changes): two methods, two seeds, a sweep of two rates, in a study whose data stand."""

    def made(name="tiny", max_steps=2, epochs=1, **changes):
        fields = {**TINY, "model": str(tiny_model), "max_steps": max_steps, "epochs": epochs}
        make_study(study=name, max_steps=max_steps, epochs=epochs)
        given = {"profile": "demo", "study": name, **fields}
        chosen = {"methods": ("base", "qlora", "galore"), "seeds": (0, 1), "factors": (0.3, 1.0), "rows": 4}
        return Settings(given, **{**chosen, **changes})

    return made
