"""The whole model on the Triton kernels, in their interpreter or on a GPU, trains to the losses of the CPU's code."""
# B batch, T tokens.

import math

import pytest
import torch

from tests.kernels.interpreter import repair
from transmamba.config import ModelConfig
from transmamba.kernels import backend
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.transpoint import layer_kinds

B, T, VOCAB, N_STEPS = 1, 70, 90, 20


def train(kind: str, transpoints: list[float], starts: list[list[int]], device: str) -> tuple[list[float], list[float]]:
    """Losses of the first steps of AdamW on one small batch a step, and the gradient's norm at each."""
    config = ModelConfig.model_validate(
        {"kind": kind, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 16, "ssm_head_dim": 16, "ssm_state": 8}
    )
    model = Model(config, layer_kinds(config), n_tokens_known=VOCAB, n_rows=128, seed=1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    draw = torch.Generator().manual_seed(0)
    documents, weight_BT = Documents.from_starts(starts, T, device), torch.ones(B, T, device=device)
    losses, norms = [], []
    for _ in range(N_STEPS):
        ids_BT = torch.randint(0, VOCAB, (B, T + 1), generator=draw).to(device)
        sums = model(ids_BT[:, :-1], ids_BT[:, 1:], weight_BT, transpoints, documents)
        optimizer.zero_grad()
        (sums.loss / (B * T)).backward()
        losses.append(sums.nll.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return losses, norms


@pytest.mark.parametrize(
    ("kind", "transpoints", "starts"),
    [
        pytest.param("transmamba", [7.0, math.inf], [[0, 30]], id="packed"),
        pytest.param("transmamba", [0.0, 33.0], [[0]], id="whole", marks=pytest.mark.long),
        pytest.param("mamba2", [0.0, 0.0], [[0, 9]], id="mamba2", marks=pytest.mark.long),
    ],
)
def test_twenty_steps_match(
    kind: str, transpoints: list[float], starts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, norms = train(kind, transpoints, starts, "cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        repair(monkeypatch)
        monkeypatch.setattr(backend, "runs_triton", lambda stream: True)
    found_losses, found_norms = train(kind, transpoints, starts, device)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=3e-4)  # steps of Adam amplify rounding

    assert len(set(losses)) == N_STEPS
