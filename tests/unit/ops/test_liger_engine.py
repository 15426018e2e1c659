"""The optional Liger engine: what it is handed, what it refuses, and that a wrong kernel is caught.

Liger's kernel needs a Hopper GPU (tests/gpu runs the real one). Here a module of the same name and
signature, in plain torch, stands in.
"""

import sys
from types import ModuleType

import pytest
import torch

from megatron_slm.ops import liger_engine, linear_cross_entropy
from tests.unit.ops.test_linear_cross_entropy import TRUE_V, error, truth, upstream

N, H, V = 90, 64, 160
CPU = torch.device("cpu")


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator).bfloat16().requires_grad_()
    weight_VH = (torch.randn(V, H, generator=generator) * 0.4).bfloat16().requires_grad_()
    target_N = torch.randint(0, TRUE_V, (N,), generator=generator)
    target_N[[4, 50]] = -100
    return hidden_NH, weight_VH, target_N


def plain_kernel(calls: list, factor: float = 1.0):
    """Liger 0.8.5's fused_scaled_cross_entropy_backward in plain torch.

    A `factor` on its weight gradient makes it a wrong one.
    """

    def fused_scaled_cross_entropy_backward(
        grad_output,
        x_padded,
        weight_padded,
        target,
        lse,
        temperature,
        ignore_index,
        hidden_size,
        entropy=None,
        grad_entropy=None,
        input_dtype=torch.bfloat16,
        selected_token_ids=None,
        grad_selected=None,
    ):
        assert x_padded.shape[1] == hidden_size
        assert hidden_size % 64 == 0
        assert x_padded.dtype == torch.bfloat16
        calls.append(len(x_padded))
        rows, weight = x_padded.float(), weight_padded.float()
        onehot = (target[:, None] == torch.arange(len(weight))).float()
        p = ((rows @ weight.t()) / temperature - lse[:, None]).exp() - onehot
        upstream = torch.where(target == ignore_index, 0.0, grad_output)
        dz = (p * upstream[:, None] / temperature).bfloat16().float()
        return (dz @ weight).to(input_dtype), (factor * dz.t() @ rows).to(input_dtype)

    return fused_scaled_cross_entropy_backward


@pytest.fixture
def install(monkeypatch):
    """install(kernel): a machine with a Hopper GPU and that kernel."""
    liger_engine._verify.cache_clear()

    def with_kernel(kernel):
        module = ModuleType(liger_engine.KERNEL_MODULE)
        if kernel is not None:
            module.fused_scaled_cross_entropy_backward = kernel
        monkeypatch.setitem(sys.modules, liger_engine.KERNEL_MODULE, module)
        monkeypatch.setattr(liger_engine, "_is_hopper", lambda device: True)

    yield with_kernel
    liger_engine._verify.cache_clear()


@pytest.mark.parametrize("case", ["all", "weighted", "one", "none"])
def test_gradients_equal_fp64_and_the_kernel_sees_kept_rows_only(case, install):
    calls = []
    install(plain_kernel(calls))
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V, engine="liger")
    assert torch.equal(
        loss, linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V, mode="recompute")
    ), "losses are ours"
    verified = len(calls)
    (loss * upstream(case)).sum().backward()
    kept = int(((upstream(case) != 0) & (target != -100)).sum())
    assert calls[verified:] == ([kept] if kept else [])
    _, d_hidden, d_weight, _ = truth(hidden, weight, target, upstream(case))
    assert error(hidden.grad, d_hidden) < 6e-3
    assert error(weight.grad, d_weight) < 6e-3
    assert not weight.grad[TRUE_V:].any()


def test_main_grad_accumulates_and_verification_runs_once(install):
    calls = []
    install(plain_kernel(calls))
    hidden, weight, target = problem()
    parameter = torch.nn.Parameter(weight.detach().clone())
    parameter.main_grad = torch.ones(V, H)
    for _ in range(2):
        loss = linear_cross_entropy(
            hidden,
            parameter,
            target,
            vocabulary_size=TRUE_V,
            accumulate_into_main_grad=True,
            engine="liger",
        )
        (loss * upstream("weighted")).sum().backward()
    assert len(calls) == 3, "one verification, two backwards"
    _, _, d_weight, _ = truth(hidden, weight, target, upstream("weighted"))
    assert error(parameter.main_grad.double() - 1, 2 * d_weight) < 6e-3


def test_a_row_whose_target_another_rank_owns_keeps_its_softmax(install):
    install(plain_kernel([]))
    hidden, weight, target = problem()
    hidden, weight, target = hidden.detach(), weight.detach(), target.clamp(min=0)
    logits = hidden.float() @ weight.float().t()
    owned = torch.arange(N) % 2 == 0
    _, d_weight = liger_engine.liger_gradients(
        hidden, weight, target, owned, torch.ones(N), logits.logsumexp(1)
    )
    p = logits.softmax(1) - owned[:, None] * torch.nn.functional.one_hot(target, V)
    assert error(d_weight, p.double().t() @ hidden.double()) < 6e-3


@pytest.mark.parametrize(
    "kernel, message",
    [
        (plain_kernel([], 1.1), "disagrees with plain torch.*weight"),
        (plain_kernel([], float("nan")), "disagrees"),
        (None, r"pip install 'liger-kernel\[cutedsl\]"),
    ],
)
def test_a_kernel_that_is_wrong_or_missing_is_refused(kernel, message, install):
    install(kernel)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*problem(), engine="liger")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mode="keep"), "keeps nothing"),
        (dict(z_loss=0.1), "z_loss is 0.1"),
        (dict(engine="triton"), "one of torch, liger"),
    ],
)
def test_what_it_cannot_do_is_an_error(change, message, install):
    install(plain_kernel([]))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*problem(), **{"engine": "liger"} | change)


@pytest.mark.parametrize(
    "dtype, hidden_size, message",
    [
        (torch.float32, 64, "float32 operands"),
        (torch.bfloat16, 72, "hidden size 72"),
        (torch.bfloat16, 64, "compute capability 9.0.*on the cpu"),
    ],
)
def test_where_it_cannot_run_is_an_error(dtype, hidden_size, message):
    with pytest.raises(ValueError, match=message):
        liger_engine.check_liger(dtype, CPU, hidden_size)
