"""The embedded corpus is real text, the same for any number of workers, and says what it left out."""

from __future__ import annotations

import ast
import itertools
import textwrap

from transmamba.data_pipeline import docstrings
from transmamba.data_pipeline.docstrings import extract_docstrings, list_modules, read_installed_docstrings

SMALL = 300_000


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


def test_the_corpus_does_not_depend_on_the_number_of_workers_and_says_where_it_stops() -> None:
    one = read_installed_docstrings(workers=1, max_chars=SMALL)
    three = read_installed_docstrings(workers=3, max_chars=SMALL)
    assert one == three
    sizes = [len(document.text) for document in one.documents]
    assert sum(sizes[:-1]) < SMALL <= sum(sizes)
    assert one.n_unread > 0
    assert one.last_module == one.documents[-1].name
    assert f"up to {SMALL:,} characters (last module {one.last_module}, {one.n_unread} of" in one.description


def test_the_standard_library_comes_first_and_tests_are_left_out() -> None:
    modules = list_modules()
    names = [name for name, _ in modules]
    assert names.index("argparse") < names.index("numpy")
    assert names == [name for name, _ in list_modules()]
    parts = set(itertools.chain.from_iterable(name.split(".") for name in names))
    assert not parts & {"tests", "test", "_vendor", "transmamba"}
    assert not [name for name in names if name.rpartition(".")[2].startswith("test_")]


def test_a_docstring_seen_before_is_left_out_and_modules_are_real_text() -> None:
    corpus = read_installed_docstrings(workers=1, max_chars=SMALL)
    paragraphs = [document.text for document in corpus.documents]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(text) > docstrings.MIN_CHARS for text in paragraphs)
    seen: set[bytes] = set()
    sections = [("f", "words " * 100), ("g", "words " * 100)]
    text = docstrings._join_new_sections(sections, seen)
    assert text.startswith("f\n\n")
    assert "g\n\n" not in text
    assert docstrings._join_new_sections(sections, seen) == ""


def test_the_text_is_that_of_the_running_library() -> None:
    corpus = read_installed_docstrings(workers=1, max_chars=SMALL)
    document = next(document for document in corpus.documents if document.name == "argparse")
    file = dict(list_modules())["argparse"]
    with open(file, encoding="utf-8") as source:
        docstring = ast.get_docstring(ast.parse(source.read()))
    assert docstring is not None
    assert document.text.startswith(docstring)
