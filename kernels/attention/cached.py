"""One query against cached keys and values: attention while decoding."""

# B batch, T tokens, H heads, N key width, V value width.

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_cached(q_BHN: Tensor, k_BTHN: Tensor, v_BTHV: Tensor) -> Tensor:
    """Softmax attention of the newest token of every row to all cached ones, its own included.

    Args:
        q_BHN: the newest token's query; the logits are scaled by 1 / sqrt(N).
        k_BTHN, v_BTHV: keys and values of all tokens so far, at least one.

    Returns:
        y_BHV.
    """
    k_BHTN, v_BHTV = k_BTHN.transpose(1, 2), v_BTHV.transpose(1, 2)
    return scaled_dot_product_attention(q_BHN[:, :, None], k_BHTN, v_BHTV)[:, :, 0]
