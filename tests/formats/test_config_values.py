"""Values of no sense in any Config of the house are refused by the name of their field."""

import math
from dataclasses import dataclass, fields, replace
from types import NoneType, UnionType
from typing import get_args

import pytest

import bert
import gpt
import lora
import moe
import train
from formats.config_values import check_values
from language import deberta, deberta_v3, electra, masking

CONFIGS = {
    "gpt": gpt.SIZES["tiny"],
    "moe": moe.SIZES["tiny"],
    "bert": bert.SIZES["tiny"],
    "electra": electra.SIZES["tiny"],
    "deberta": deberta.SIZES["tiny"],
    "deberta_v3": deberta_v3.SIZES["tiny"],
    "masking": masking.Config(),
    "lora": lora.Config(),
}


def senseless(config, field):
    """Return values that make no sense for a field, by its annotation."""
    kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    zero = [] if field.name in getattr(config, "MAY_BE_ZERO", ()) else [0]
    none = [] if NoneType in kinds else [None]
    if tuple[int, ...] in kinds:
        return [-1, "a", (0.5,), (-1,), ("a",), (True,), 2.5, [0], *none]
    if int in kinds:
        return [-1, 2.5, 2.0, "2", True, math.nan, *zero, *none]
    if float in kinds:
        return [-1.0, math.nan, math.inf, -math.inf, "2", True, *map(float, zero), *none]
    return [1, "true", *none] if kinds == (bool,) else []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_every_config_is_checked(name):
    config, checked = CONFIGS[name], 0
    for field in fields(config):
        for value in senseless(config, field):
            with pytest.raises(ValueError) as raised:
                replace(config, **{field.name: value})
            assert str(raised.value).startswith(f"{field.name} {value!r}: "), raised.value
            assert "\n" not in str(raised.value)
            checked += 1
    assert checked >= (9 if name in ("masking", "lora") else 90)


def test_what_may_be_zero_or_none_is_accepted():
    @dataclass(frozen=True)
    class Config:
        width: int = 1
        depth: int | None = None
        share: float = 0.5
        ends: int | tuple[int, ...] | None = (0, 3)
        kind: str = "a"
        either: bool | str = False
        MAY_BE_ZERO = ("share", "depth")

    for changes in ({}, {"depth": 0, "share": 0, "ends": 0}, {"share": 0.0, "ends": None, "width": 2**40}):
        check_values(Config(**changes), kind=("a", "b"), either=(False, "all"))
    with pytest.raises(ValueError, match="kind 'c': expected a or b"):
        check_values(Config(kind="c"), kind=("a", "b"))


@pytest.mark.parametrize(
    "change, message",
    [
        ("n_layers=-1", "n_layers -1: expected at least 1"),
        ("n_layers=0", "n_layers 0: expected at least 1"),
        ("n_layers=None", "n_layers None: expected a whole number of at least 1"),
        ("n_kv_heads=0", "n_kv_heads 0: expected at least 1"),
        ("window=0", "window 0: expected at least 1"),
        ("window=-1", "window -1: expected at least 1"),
        ("window=wide", "window 'wide': expected a whole number of at least 1"),
        ("d_ff=-8", "d_ff -8: expected at least 1"),
        ("n_heads=256", "d_head 0"),
        ("rope_theta=0", "rope_theta 0: expected a number above 0"),
        ("norm_eps=-1e-5", "norm_eps -1e-05: expected a number above 0"),
        ("logit_softcap=0", "logit_softcap 0: expected a number above 0"),
    ],
)
def test_set_refuses_them_in_one_line_before_any_work(change, message, tmp_path, capsys):
    flags = ["--model", "gpt", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train.main([*flags, "--set", change, *(["n_kv_heads=256"] if "256" in change else [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: --set ") and message in err
