"""Logits of a training model beside those of the same weights in transformers."""
# B rows, T tokens, E vocabulary entries.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmamba.data_pipeline.progress import show_step
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model

BOUND = 2e-5  # on logits up to REACH; float32 rounds larger ones more coarsely
REACH = 20.0
ROWS_TOKENS = 2048  # at once, if two windows are no longer
FORMS = ("whole windows", "left padding", "packed documents")


@dataclass(frozen=True)
class Comparison:
    """How far logits are apart over the tokens of one form of input."""

    form: str
    n_tokens: int
    difference: float  # largest absolute one
    n_other: int  # whose likeliest token is another
    n_ties: int  # the same, but the two tokens' logits are no further apart than rounding is
    largest_logit: float

    @property
    def bound(self) -> float:
        """The largest difference that counts as rounding."""
        return BOUND * max(1.0, self.largest_logit / REACH)

    @property
    def is_equal(self) -> bool:
        """Whether the two compute the same."""
        return self.difference <= self.bound and self.n_other == 0

    def line(self) -> str:
        """For people."""
        share = 100 * (1 - self.n_other / self.n_tokens)
        ties = f", {self.n_ties} ties" if self.n_ties else ""
        return (
            f"{self.form:<17} {self.n_tokens:>7,} tokens   largest difference of a logit {self.difference:.1e} "
            f"(bound {self.bound:.0e})   same likeliest token {share:.4g} %{ties}"
        )


@torch.no_grad()
def compare(
    ours: Model,
    transpoints: Sequence[int | float],
    theirs: Any,
    *,
    n_tokens: int,
    seq_len: int,
    forms: Sequence[str] = FORMS,
    n_known: int | None = None,
    progress: bool = False,
) -> Iterator[Comparison]:
    """Run both models over tokens that are drawn uniformly, alike in every call.

    Args:
        ours: the training model, whole, in evaluation mode.
        transpoints: of its layers.
        theirs: a causal language model of transformers.
        n_tokens: to compare in every form, at least; 0 compares nothing.
        seq_len: tokens per window.
        forms: of FORMS; "packed documents" needs a model that reads position ids.
        n_known: tokens to draw from and logits to compare; by default all of theirs.
        progress: show it on stderr.
    """
    n_entries = int(theirs.config.vocab_size) if n_known is None else n_known
    n_rows = max(2, min(ROWS_TOKENS, n_tokens) // seq_len)
    draw = torch.Generator().manual_seed(0)
    for form in forms if n_tokens else ():
        difference, largest, n_other, n_ties, n_done = 0.0, 0.0, 0, 0, 0
        with show_step(f"comparing {form}", n_tokens, visible=progress) as advance:
            while n_done < n_tokens:
                ids_BT = torch.randint(0, n_entries, (n_rows, seq_len), generator=draw)
                ours_E, theirs_E = _logits(form, ours, transpoints, theirs, ids_BT, draw)
                ours_E, theirs_E = ours_E[:, :n_entries].float(), theirs_E[:, :n_entries].float()
                difference = max(difference, (ours_E - theirs_E).abs().nan_to_num(torch.inf).max().item())
                largest = max(largest, ours_E.abs().max().item())
                choice_E = theirs_E.argmax(-1, keepdim=True)
                is_other = choice_E != ours_E.argmax(-1, keepdim=True)
                is_tie = is_other & (ours_E.amax(-1, keepdim=True) - ours_E.gather(-1, choice_E) <= 2 * BOUND)
                n_ties += int(is_tie.sum())
                n_other += int(is_other.sum()) - int(is_tie.sum())
                n_done += len(ours_E)
                advance(len(ours_E))
        yield Comparison(form, n_done, difference, n_other, n_ties, largest)


def _logits(
    form: str, ours: Model, transpoints: Sequence[int | float], theirs: Any, ids_BT: Tensor, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits of both for some rows, one token after the other: [tokens, E]."""
    n_rows, n_tokens = ids_BT.shape
    if form == "left padding":
        pads = [0, *torch.randint(1, n_tokens, (n_rows - 1,), generator=draw).tolist()]
        real_BT = torch.arange(n_tokens) >= torch.tensor(pads)[:, None]
        rows = [ids_BT[row : row + 1, n_pad:] for row, n_pad in enumerate(pads)]
        alone = [ours.predict(row, transpoints, Documents.whole(1, row.shape[1]))[:, 0] for row in rows]
        return torch.cat(alone), theirs(ids_BT, attention_mask=real_BT.long(), use_cache=False).logits[real_BT]
    if form == "packed documents":
        places = torch.randint(1, n_tokens, (n_rows, 4), generator=draw).tolist()
        documents = Documents.from_starts([sorted({0, *row}) for row in places], n_tokens)
        theirs_BTE = theirs(ids_BT, position_ids=documents.pos_BT, use_cache=False).logits
    else:
        documents = Documents.whole(n_rows, n_tokens)
        theirs_BTE = theirs(ids_BT, use_cache=False).logits
    return ours.predict(ids_BT, transpoints, documents).transpose(0, 1).flatten(0, 1), theirs_BTE.flatten(0, 1)
