import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transmamba.kernels.documents import SHORTEST_BUCKET, Documents


@st.composite
def packed_rows(draw: st.DrawFn) -> Documents:
    n_tokens = draw(st.integers(1, 90))
    rows = draw(st.lists(st.sets(st.integers(0, n_tokens - 1), max_size=6), min_size=1, max_size=3))
    return Documents.from_starts([sorted(row | {0}) for row in rows], n_tokens)


def test_positions_and_resets_start_anew_at_every_document() -> None:
    documents = Documents.from_starts([[0, 2, 3], [0]], 5)
    assert documents.pos_BT.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert documents.reset_BT.int().tolist() == [[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert documents.starts == ((0, 2, 3), (0,))
    assert not documents.is_whole


def test_whole_rows_are_one_document_each() -> None:
    documents = Documents.whole(2, 3)
    assert documents.is_whole and documents.pos_BT.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert Documents.from_starts([[0], [0]], 3).is_whole


def test_rows_may_have_no_tokens() -> None:
    documents = Documents.whole(2, 0)
    assert documents.pos_BT.shape == documents.reset_BT.shape == (2, 0)
    assert documents.first_output(0) == 0 and documents.prefix(math.inf).buckets == ()


@pytest.mark.parametrize(
    ("starts", "complaint"),
    [
        ([[]], "begin with 0"),
        ([[0], [1, 2]], "row 1 must begin with 0"),
        ([[0, 3, 3]], "increasing"),
        ([[0, 4, 2]], "increasing"),
        ([[0, 5]], "outside 5 tokens"),
    ],
)
def test_bad_starts_are_refused_by_name(starts: list[list[int]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Documents.from_starts(starts, 5)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(packed_rows(), st.one_of(st.integers(0, 100), st.just(math.inf)))
def test_prefix_plan_holds_every_prefix_token_once(documents: Documents, P: int | float) -> None:
    plan = documents.prefix(P)
    attending = (documents.pos_BT < P).flatten().nonzero().flatten()
    assert torch.equal(plan.tokens.sort().values, attending)
    assert torch.equal(plan.padded_tokens[plan.slots], plan.tokens)
    assert plan.padded_tokens.numel() == sum(n * padded for n, padded in plan.buckets)
    assert documents.prefix(P) is plan
    packed = documents.packed(P)
    tokens = torch.arange(documents.pos_BT.numel()) if packed.tokens is None else packed.tokens
    assert torch.equal(tokens, attending)
    assert torch.equal(packed.pos, documents.pos_BT.flatten()[attending])
    sizes = packed.edges.diff()
    assert packed.longest == int(sizes.max()) and packed.edges.dtype == torch.int32
    assert torch.equal(packed.pos, torch.cat([torch.arange(size) for size in sizes.tolist()]))
    assert documents.packed(P) is packed


@settings(derandomize=True, max_examples=40, deadline=None)
@given(packed_rows(), st.integers(1, 100))
def test_a_bucket_holds_consecutive_tokens_of_one_document_padded_at_the_end(documents: Documents, P: int) -> None:
    plan = documents.prefix(P)
    sizes = [n * padded for n, padded in plan.buckets]
    reset = documents.reset_BT.flatten()
    for (n_prefixes, padded), index in zip(plan.buckets, plan.padded_tokens.split(sizes), strict=True):
        assert padded == documents.n_tokens or (padded >= SHORTEST_BUCKET and padded & (padded - 1) == 0)
        for row in index.view(n_prefixes, padded):
            steps = row.diff()
            n_real = int((steps == 1).sum()) + 1
            assert bool((steps[: n_real - 1] == 1).all()) and bool((steps[n_real - 1 :] == 0).all())
            assert bool(reset[row[0]]) and not bool(reset[row[1:n_real]].any())


@settings(derandomize=True, max_examples=40, deadline=None)
@given(packed_rows(), st.one_of(st.integers(0, 100), st.just(math.inf)))
def test_first_output_is_the_first_column_past_the_prefix(documents: Documents, P: int | float) -> None:
    past = (documents.pos_BT >= P).any(0).nonzero()
    assert documents.first_output(P) == (int(past[0]) if len(past) else documents.n_tokens)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(packed_rows(), st.integers(0, 4))
def test_edge_rows_are_the_first_tokens_of_documents(documents: Documents, n_edge: int) -> None:
    columns, column_index, row_index = documents.edge_rows(n_edge)
    marked = torch.zeros_like(documents.reset_BT)
    marked[row_index, column_index] = True
    assert columns == sorted(columns) == column_index.tolist()
    assert torch.equal(marked, documents.pos_BT < n_edge)
