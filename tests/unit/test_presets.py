"""Every preset is what it says, and makes a stream of its own."""

from __future__ import annotations

import numpy as np
import pytest

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.presets import load_preset, preset_names, preset_purpose
from ray_pipeline.truth.replay import build_models


def models(settings: Settings) -> dict[int, ShardModel]:
    return build_models(settings, load_catalogue(settings), range(settings.partitions))


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_settings_that_are_not_the_defaults(name: str) -> None:
    settings, default = load_settings(preset=name), load_settings()
    chosen = load_preset(name)
    assert chosen
    for setting in chosen:
        assert getattr(settings, setting) != getattr(default, setting), f"{setting} is as without the preset"
    assert set(chosen) | {"preset"} == {n for n in Settings.model_fields if getattr(settings, n) != getattr(default, n)}
    assert preset_purpose(name)[0].isupper()
    assert len(preset_purpose(name)) <= 100


@pytest.mark.parametrize("name", preset_names())
def test_a_few_thousand_ratings_of_a_preset_are_made_again(name: str) -> None:
    settings = load_settings(preset=name)
    for partition, model in models(settings).items():
        drawn, again = model.draw(0, 3_000), model.draw(1_000, 500)
        assert np.array_equal(drawn.half_stars[1_000:1_500], again.half_stars), partition
        assert np.array_equal(drawn.user_ids[1_000:1_500], again.user_ids), partition
        assert drawn.half_stars.std() > 0


def test_movielens_has_mean_and_spread_of_the_data() -> None:
    half_stars = np.concatenate(
        [m.draw(0, 200_000).half_stars for m in models(load_settings(preset="movielens")).values()]
    )
    assert half_stars.mean() / 2 == pytest.approx(3.53, abs=0.02)
    assert half_stars.std() / 2 == pytest.approx(1.06, abs=0.02)
    assert (half_stars % 2).mean() == pytest.approx(0.297, abs=0.01)
