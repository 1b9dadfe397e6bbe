"""Qwen2: the config from which its model is built."""

import logging
from pathlib import Path

import pytest

from tools.checkpoints.families import FAMILIES, config_of
from vlqc.frontend.streamed_model import build_meta_model


@pytest.mark.every_transformers
def test_a_window_that_is_not_used_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    """Catches attention that is limited to the window of a config that does not use it, and warnings about it or about
    arguments of the model's constructor."""
    config = config_of(FAMILIES["qwen2"].shape, "bfloat16", tied=False, family="qwen2")
    assert config["sliding_window"] and not config["use_sliding_window"]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not pass messages on to the root logger
    try:
        model = build_meta_model(Path("float"), config)
    finally:
        logger.removeHandler(caplog.handler)
    assert model.config.sliding_window is None and config["sliding_window"]
    assert caplog.messages == []
