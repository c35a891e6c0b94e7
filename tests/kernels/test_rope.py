import pytest
import torch

from transmamba.kernels.rope import rope
from transmamba.kernels.rope.reference import rope_reference
from transmamba.kernels.testing import assert_close, assert_matches_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rope_matches_complex_rotation(dtype: torch.dtype) -> None:
    inputs = {"x_BTHN": torch.randn(2, 9, 3, 6).to(dtype), "pos_BT": torch.randint(0, 5000, (2, 9))}
    tol = 1e-4 if dtype == torch.float32 else None  # an angle of 5000 radians in float32 is good to 5e-4 at worst
    found = assert_matches_reference(
        lambda x_BTHN, pos_BT: rope(x_BTHN, pos_BT, 100.0),
        lambda x_BTHN, pos_BT: rope_reference(x_BTHN, pos_BT, 100.0, angle_dtype=torch.float64),
        inputs,
        tol,
    )
    assert found["output 0"].dtype == dtype


def test_scores_depend_on_distance_only() -> None:
    q_BTHN, k_BTHN = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)
    scores = [
        (rope(q_BTHN, torch.tensor([[7 + shift]])) * rope(k_BTHN, torch.tensor([[3 + shift]]))).sum(-1)
        for shift in (0, 100)
    ]
    assert_close(scores[1], scores[0])


def test_leading_dimensions_may_be_turned() -> None:
    x_BTHN, pos_BT = torch.randn(2, 5, 3, 4), torch.arange(10).view(2, 5)
    turned = rope(x_BTHN.transpose(0, 1), pos_BT.T)
    assert torch.equal(turned.transpose(0, 1), rope(x_BTHN, pos_BT))


def test_odd_width_and_wrong_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="even head width, got 5"):
        rope(torch.ones(1, 2, 3, 5), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="do not match"):
        rope(torch.ones(1, 2, 3, 4), torch.zeros(1, 3))
