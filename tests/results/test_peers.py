"""Packages that are measured beside ours: where one is not installed, a script says so before work starts."""

import importlib
import sys

import pytest

from results.peers import require


@pytest.mark.parametrize(
    "script, package",
    [
        ("clip_speed", "transformers"),
        ("decode_speed", "transformers"),
        ("expert_speed", "transformers"),
        ("fit_speed", "scipy"),
        ("minhash_speed", "datasketch"),
        ("rl_speed", "trl"),
        ("sampling_speed", "diffusers"),
        ("scoring_speed", "lm_eval"),
        ("t5_speed", "transformers"),
        ("vision_speed", "transformers"),
        ("word2vec_speed", "gensim"),
    ],
)
def test_a_package_that_is_not_installed_is_named(script, package, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which fit_speed sets too, for all that it starts
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"this needs {package}: pip install "):
        importlib.import_module(f"results.{script}").main([])


def test_a_package_that_is_there_is_imported():
    require("json")
