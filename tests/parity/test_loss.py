"""The loss over a spread vocabulary is torch's over the whole one, and megatron-core's."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.parity.forkserver import run
from tests.parity.job import loss_job
from transmamba.parallel.loss import vocab_cross_entropy
from transmamba.parallel.shards import WHOLE

pytestmark = pytest.mark.xdist_group("ranks")


def test_two_halves_of_a_vocabulary_give_the_loss_of_the_whole() -> None:
    for errors in run(2, loss_job):
        assert max(errors.values()) < 2e-6, errors


def test_gradients_of_both_outputs_in_float64() -> None:
    logits_TBE = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    targets_TB = torch.tensor([[0, 4], [1, 2], [3, 3]])
    assert gradcheck(lambda logits: tuple(vocab_cross_entropy(logits, targets_TB, WHOLE)), logits_TBE)
