from typing import Any

import pytest
import torch

import fxpass
from fxpass import DynamicLossScale, HeadroomLossScale, MixedPrecision, OptionError, StaticLossScale
from tests.support.helpers import Mlp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype='int8'.*float16, bfloat16 or float32"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
        ({"loss_scale": "sometimes"}, "loss_scale='sometimes'"),
        ({"loss_scale": -1.0}, r"scale=-1.0.*> 0"),
        ({"loss_scale": True}, "loss_scale=True"),
        ({"max_norm": 0}, "max_norm=0"),
        ({"max_norm": "1.0"}, "max_norm='1.0'"),
        ({"norm_type": 1.0}, "norm_type=1.0.*2.0 or inf"),
        ({"clip_value": float("nan")}, "clip_value=nan"),
        ({"clip_per": "layer", "max_norm": 1.0}, "clip_per='layer'.*'global' or 'optimizer' or 'group' or"),
        ({"clip_per": "parameter"}, "clip_per='parameter' without max_norm"),
        ({"adaptive_clip": 0.0}, "adaptive_clip=0.0"),
        ({"adaptive_clip": 0.01, "max_norm": 1.0}, "adaptive_clip and max_norm"),
        ({"adaptive_clip": 0.01, "clip_value": 1.0}, "adaptive_clip and clip_value"),
        ({"grads": "sometimes"}, "grads='sometimes'.*'drop' or 'keep'"),
        ({"keep_fp32": "norm"}, "keep_fp32='norm'.*tuple"),
        ({"verify": 1}, "verify=1"),
        ({"inductor": []}, r"inductor=\[\]"),
        ({"skip": "never"}, "skip='never'.*'step' or 'tensor'"),
        ({"release": 1}, "release=1.*False or True"),
        ({"memory_budget": 1.5}, "memory_budget=1.5.*from 0 to 1"),
        ({"memory_budget": True}, "memory_budget=True"),
        ({"skip": "tensor", "max_norm": 1.0}, "(?s)skip='tensor' with max_norm=1.*use release=True"),
        ({"skip": "tensor", "release": True}, "(?s)release=True with skip='tensor'.*drop release"),
        ({"grads": "keep", "release": True}, "(?s)release=True with grads='keep'.*drop one"),
    ],
)
def test_wrong_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        MixedPrecision(**options)  # pyrefly: ignore[bad-argument-type]
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backoff_factor": 1.0}, "backoff_factor=1.0.*between 0 and 1"),
        ({"growth_interval": 0}, "growth_interval=0.*integer >= 1"),
        ({"growth_factor": 0.5}, "growth_factor=0.5"),
        ({"hysteresis": 1.5}, "hysteresis=1.5"),
        ({"min_scale": 2.0**20}, "min_scale=1048576.0.*at most init_scale"),
        ({"max_scale": 2.0}, "max_scale=2.0.*at least init_scale"),
        ({"init_scale": float("inf")}, "init_scale=inf"),
    ],
)
def test_wrong_scale_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DynamicLossScale(**settings)  # pyrefly: ignore[bad-argument-type]


def test_defaults_follow_the_dtype() -> None:
    assert MixedPrecision().loss_scale == DynamicLossScale()
    assert MixedPrecision(dtype="bf16").loss_scale is None
    assert MixedPrecision(dtype="torch.float32").dtype is torch.float32
    assert MixedPrecision(loss_scale=128).loss_scale == StaticLossScale(128.0)
    assert MixedPrecision(loss_scale="headroom").loss_scale == HeadroomLossScale()
    assert MixedPrecision(keep_fp32=["norm"]).keep_fp32 == ("norm",)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("text", ["128.0", "128", " 1.28e2 ", "2**7", "2 ^ 7"])
def test_a_static_scale_as_text(text: str) -> None:
    assert MixedPrecision(loss_scale=text).loss_scale == StaticLossScale(128.0)
    assert StaticLossScale(text).init == 128.0  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("text", ["0.0", "-2", "nan", "inf", "2**200", "2**-200", "2**99999", "3**2", ""])
def test_text_that_is_no_scale(text: str) -> None:
    with pytest.raises(OptionError, match="scale"):
        MixedPrecision(loss_scale=text)


def test_settings_of_other_libraries_by_their_own_names() -> None:
    policy = DynamicLossScale.like("deepspeed", initial_scale_power=8, loss_scale_window=5, min_loss_scale=2)
    assert (policy.init_scale, policy.growth_interval, policy.min_scale, policy.hysteresis) == (256, 5, 2, 2)
    policy = DynamicLossScale.like("apex", scale_window=5, max_loss_scale=2.0**20)
    assert (policy.growth_interval, policy.max_scale) == (5, 2.0**20)


@pytest.mark.parametrize(
    ("library", "settings", "message"),
    [
        ("fairseq", {}, "'fairseq'.*'torch' or 'apex' or 'deepspeed'"),
        ("torch", {"loss_scale_window": 5}, "no setting 'loss_scale_window'"),
        ("deepspeed", {"initial_scale_power": 400}, "initial_scale_power=400"),
        ("apex", {"scale_window": 0}, "growth_interval=0"),
    ],
)
def test_wrong_settings_of_other_libraries(library: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DynamicLossScale.like(library, **settings)


def step_of(**kwargs: object):
    weight = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([weight], lr=0.5)

    def step() -> None:
        weight.sum().backward()
        opt.step()
        opt.zero_grad()

    return torch.compile(step, **kwargs), weight  # pyrefly: ignore[no-matching-overload]


def test_an_unknown_name_is_named_with_its_neighbour() -> None:
    step, _ = step_of(backend="mixedprec", options={"max_nrom": 1.0})
    with pytest.raises(OptionError, match=r"'max_nrom' does not exist(.|\n)*did you mean 'max_norm'"):
        step()


def test_options_beside_an_object_are_refused() -> None:
    step, _ = step_of(backend=MixedPrecision(codegen="eager"), options={"max_norm": 1.0})
    with pytest.raises(OptionError, match="with a MixedPrecision object"):
        step()


def test_string_backend_and_its_handle() -> None:
    step, weight = step_of(backend="mixedprec", options={"codegen": "eager", "max_norm": 0.1})
    handle = fxpass.of(step)
    step()
    assert handle.stats().steps == 1
    assert handle.stats().clipped == 1
    assert fxpass.of(step) is handle
    assert not torch.equal(weight, torch.ones(2))


def test_two_compilations_do_not_share_a_scaler() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([weight], lr=0.5)

    def step() -> None:
        weight.sum().backward()
        opt.step()
        opt.zero_grad()

    options = {"codegen": "eager"}
    first = torch.compile(step, backend="mixedprec", options=options)  # pyrefly: ignore[no-matching-overload]
    second = torch.compile(step, backend="mixedprec", options=options)  # pyrefly: ignore[no-matching-overload]
    first()
    first()
    second()
    assert (fxpass.of(first).stats().steps, fxpass.of(second).stats().steps) == (2, 1)


def test_of_something_else_is_an_error() -> None:
    for thing in (print, torch.compile(print, backend="eager"), torch.nn.Linear(1, 1)):
        with pytest.raises(OptionError, match="not a step compiled by fxpass"):
            fxpass.of(thing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nrm": 1.0}, "option 'max_nrm' does not exist\n  to do: did you mean 'max_norm'"),
        ({"inductor": {"max_autotun": True}}, "'max_autotun' is no setting .*\n  to do: .*'max_autotune'"),
        ({"inductor": {"max_autotune": True}, "codegen": "eager"}, "with codegen='eager'"),
    ],
)
def test_names_that_do_not_exist_get_the_nearest_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MixedPrecision(**options)
    with pytest.raises(OptionError, match=message):
        torch.compile(lambda x: x + 1, backend="mixedprec", options=options)(torch.ones(1))


def test_the_advice_works() -> None:
    assert MixedPrecision(max_norm=1.0, inductor={"max_autotune": False}).max_norm == 1.0


def test_a_pattern_of_keep_fp32_that_matches_nothing() -> None:
    net = Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    compile_ = lambda *patterns: torch.compile(  # noqa: E731
        step, backend=MixedPrecision(keep_fp32=patterns, codegen="eager")
    )
    with pytest.raises(OptionError, match=r"'frist' matches no module .*\n  to do: did you mean 'first'"):
        compile_("norm", "frist")(torch.ones(3, 4))
    with pytest.raises(OptionError, match="the modules are first, last, norm"):
        compile_("?")(torch.ones(3, 4))
    torch.compiler.reset()
    run = compile_("first", "*")
    run(torch.ones(3, 4))
    assert fxpass.of(run).stats().steps == 1
