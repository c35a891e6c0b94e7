"""Documents of any length in one call of torch's FlashAttention: no padding."""

# B batch, T tokens, A tokens that attend, H heads, N key and value width.

from typing import cast

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from transmamba.kernels.attention.gathering import Gathering, Put, Take
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope_qk

# (left, right) of the diagonal: all that came before, nothing that comes after.
_CAUSAL = (-1, 0)


def attend_packed(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    documents: Documents,
    prefix: int | float,
    scale: float,
    rope_theta: float | None,
) -> Tensor:
    """`prefix_attention` of rows with several documents, for what `backend.runs_varlen` allows: y_BTHN."""
    plan = documents.packed(prefix)
    q_AHN, k_AHN, v_AHN = (stream.flatten(0, 1) for stream in (q_BTHN, k_BTHN, v_BTHN))
    gathering = None if plan.tokens is None else Gathering(plan.tokens, plan.tokens)
    if gathering is not None:
        q_AHN, k_AHN, v_AHN = (Take.apply(stream, gathering) for stream in (q_AHN, k_AHN, v_AHN))
    if rope_theta is not None:
        q_AHN, k_AHN = (x[0] for x in rope_qk(q_AHN[None], k_AHN[None], plan.pos[None], rope_theta))
    y_AHN = v_AHN
    if plan.longest:
        lengths = (plan.edges, plan.edges, plan.longest, plan.longest)
        y_AHN = cast(Tensor, varlen_attn(q_AHN, k_AHN, v_AHN, *lengths, scale=scale, window_size=_CAUSAL))
    if gathering is not None:
        y_AHN = Put.apply(y_AHN, gathering, documents.n_rows * documents.n_tokens)
    return y_AHN.unflatten(0, v_BTHN.shape[:2])
