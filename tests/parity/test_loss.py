"""The loss over a spread vocabulary is torch's over the whole one, and megatron-core's; so are its gradients."""
# T tokens, B batch, D model width, E vocabulary entries.

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from tests.parity.forkserver import run
from transmamba.config import ParallelConfig
from transmamba.kernels.cross_entropy import local
from transmamba.parallel import topology as groups
from transmamba.parallel.loss import vocab_cross_entropy
from transmamba.parallel.shards import WHOLE

pytestmark = pytest.mark.xdist_group("ranks")
N_TOKENS, N_ROWS, WIDTH, N_ENTRIES = 7, 3, 8, 24
LIMIT = 2e-6


def differences(n_known: int, is_chunked: bool) -> dict[str, float]:
    """Our loss over this rank's part of a vocabulary against torch's over the whole and megatron-core's."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if is_chunked:
        local.KEPT, local.NARROWEST, local.ALIGNED = 0, 4, 4
    shards = groups.start(ParallelConfig(tp=2)).shards
    draw = torch.Generator().manual_seed(0)
    x_TBD = torch.randn(N_TOKENS, N_ROWS, WIDTH, generator=draw)
    weight_ED = torch.randn(N_ENTRIES, WIDTH, generator=draw) * 2
    targets_TB = torch.randint(0, n_known, (N_TOKENS, N_ROWS), generator=draw)
    dnll_TB, dlog_TB = torch.randn(2, N_TOKENS, N_ROWS, generator=draw)

    whole = [tensor.clone().requires_grad_() for tensor in (x_TBD, weight_ED)]
    logits_TBE = whole[0] @ whole[1][:n_known].T
    wanted_TB = cross_entropy(logits_TBE.flatten(0, 1), targets_TB.flatten(), reduction="none").view(N_TOKENS, N_ROWS)
    log_TB = logits_TBE.logsumexp(-1)
    (wanted_TB * dnll_TB + log_TB * dlog_TB).sum().backward()

    own = [x_TBD.clone().requires_grad_(), shards.slice_of(weight_ED, 0).clone().requires_grad_()]
    n_here = min(max(n_known - shards.tp_rank * N_ENTRIES // 2, 0), N_ENTRIES // 2)
    losses = vocab_cross_entropy(shards.gather_tokens(own[0]), own[1], targets_TB, shards, n_known=n_here)
    (losses.nll_TB * dnll_TB + losses.log_partition_TB * dlog_TB).sum().backward()
    part_TBE = (x_TBD @ own[1].detach().T).masked_fill_(torch.arange(N_ENTRIES // 2) >= n_here, -torch.inf)
    dweights = [tensor.grad for tensor in (own[1], whole[1])]
    assert own[0].grad is not None and whole[0].grad is not None and dweights[0] is not None and dweights[1] is not None
    assert dweights[0][n_here:].eq(0).all()
    pairs = {
        "nll": (losses.nll_TB, wanted_TB),
        "nll of megatron-core": (losses.nll_TB, vocab_parallel_cross_entropy(part_TBE, targets_TB)),
        "log partition": (losses.log_partition_TB, log_TB),
        "gradient of x": (own[0].grad, whole[0].grad),
        "gradient of the weight": (dweights[0], shards.slice_of(dweights[1], 0)),
    }
    return {name: float((found - wanted).norm() / wanted.norm().clamp(1)) for name, (found, wanted) in pairs.items()}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("n_known", [24, 21, 9], ids=lambda n_known: f"{n_known} known")
def test_two_halves_of_a_vocabulary_give_the_loss_of_the_whole(n_known: int, is_chunked: bool) -> None:
    for errors in run(2, differences, n_known, is_chunked):
        assert max(errors.values()) < LIMIT, errors


def test_gradients_of_both_outputs_in_float64() -> None:
    targets_TB = torch.tensor([[0, 4], [1, 2], [3, 3]])
    x_TBD = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight_ED = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def losses(x_TBD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
        return tuple(vocab_cross_entropy(x_TBD, weight_ED, targets_TB, WHOLE))

    assert gradcheck(losses, (x_TBD, weight_ED))
