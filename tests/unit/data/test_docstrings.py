"""The embedded corpus is real text, the same for any number of workers, and says what it left out."""

from __future__ import annotations

import ast
import itertools
import textwrap
from pathlib import Path

import pytest

from transmamba.data_pipeline import docstrings
from transmamba.data_pipeline.docstrings import (
    Corpus,
    extract_docstrings,
    list_modules,
    read_installed_docstrings,
)

SMALL = 300_000


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The first modules of this machine's corpus, read by one process."""
    return read_installed_docstrings(workers=1, max_chars=SMALL)


def test_docstrings_come_in_source_order_under_their_qualified_names() -> None:
    prose = "Words that say what it is for. " * 10
    source = f'''
        """Module. {prose}"""
        class Outer:
            """Outer. {prose}"""
            def method(self):
                """Method. {prose}"""
                def hidden():
                    """Hidden."""
            class Inner:
                r"""Inner. {prose}"""
        async def work():
            """Work. {prose}"""
        def bare(): pass
    '''
    found = extract_docstrings(textwrap.dedent(source).encode())
    assert [name for name, _ in found] == ["", "Outer", "Outer.method", "Outer.Inner", "work"]
    assert [text.split(".")[0] for _, text in found] == ["Module", "Outer", "Method", "Inner", "Work"]


def test_code_tables_and_broken_source_give_no_text() -> None:
    prose = b"x = '''" + b"words " * 100 + b"'''\n"
    assert extract_docstrings(b'"""Short."""\n') == []
    assert extract_docstrings(b'"""' + b"words " * 100 + b'"""\n' + b"x = 1\n" * 5000) == []
    assert extract_docstrings(prose + b"def (:\n") == []
    assert extract_docstrings(prose + b"\0") == []
    assert extract_docstrings(prose) == []


def test_the_corpus_does_not_depend_on_the_number_of_workers_and_says_where_it_stops(corpus: Corpus) -> None:
    three = read_installed_docstrings(workers=3, max_chars=SMALL)
    assert three == corpus
    sizes = [len(document.text) for document in corpus.documents]
    assert sum(sizes[:-1]) < SMALL <= sum(sizes)
    assert corpus.n_unread > 0
    assert corpus.last_module == corpus.documents[-1].name
    assert f"up to {SMALL:,} characters (last module {corpus.last_module}, {corpus.n_unread} of" in corpus.description


def test_the_standard_library_comes_first_and_tests_are_left_out() -> None:
    modules = list_modules()
    names = [name for name, _ in modules]
    assert names.index("argparse") < names.index("zipimport") < names.index("numpy")
    assert names == [name for name, _ in list_modules()]
    parts = set(itertools.chain.from_iterable(name.split(".") for name in names))
    assert not parts & {"tests", "test", "_vendor", "transmamba"}
    files = [Path(file).name for _, file in modules]
    assert not [name for name in files if name.startswith("test_")]


def test_a_docstring_seen_before_is_left_out_and_modules_are_real_text(corpus: Corpus) -> None:
    paragraphs = [document.text for document in corpus.documents]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(text) > docstrings.MIN_CHARS for text in paragraphs)
    seen: set[bytes] = set()
    sections = [("f", "words " * 100), ("g", "words " * 100)]
    text = docstrings._join_new_sections(sections, seen)
    assert text.startswith("f\n\n")
    assert "g\n\n" not in text
    assert docstrings._join_new_sections(sections, seen) == ""


def test_the_text_is_that_of_the_running_library(corpus: Corpus) -> None:
    files = dict(list_modules())
    n_compared = 0
    for document in corpus.documents[:30]:
        docstring = ast.get_docstring(ast.parse(Path(files[document.name]).read_bytes()))
        if docstring:
            assert document.text.startswith(docstring)
            n_compared += 1
    assert n_compared > 15
