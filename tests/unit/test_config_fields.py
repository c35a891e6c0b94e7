"""Every key refuses what it cannot take, by its name, and random edits never cause another error."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from transmamba.compose import load, to_yaml
from transmamba.errors import ConfigError
from transmamba.keys import leaves
from transmamba.validate import validate

HUGE = 10**30
# Empty is a value here: no prompt, no entries.
MAY_BE_EMPTY = {
    "sample.prompt",
    "data.skip",
    "resume.allow",
    "validation.sets",
    "data.blend",
    "data.sources",
    "data.stages",
    "transpoint.changes",
}


def kinds_of(key: str) -> set[str]:
    node = leaves()[key]
    found = set()
    for choice in node.get("anyOf", [node]):
        found.add("enum" if "enum" in choice or "const" in choice else choice.get("type", "enum"))
    return found - {"null"}


def mutations(key: str) -> Iterator[str]:
    """Overrides that one key cannot take: two wrong types, empty, negative, huge and NaN."""
    kinds = kinds_of(key)
    is_text = kinds == {"string"}
    yield f"{key}=17" if is_text else f"{key}=[[{{a:b}}]]"
    yield f"{key}=true" if kinds != {"boolean"} else f"{key}=1"
    if key not in MAY_BE_EMPTY:
        yield f"{key}="
        yield f"{key}=[]"
    yield f"{key}=-1"
    yield f"{key}={'x' * 5000}" if is_text else f"{key}={HUGE}"
    yield f"{key}=nan"


# Cyrillic letters that look like Latin ones.
ALIKE = str.maketrans("aeopcxy", "аеорсху")


@pytest.mark.parametrize("key", list(leaves()))
def test_every_key_refuses_what_it_cannot_take(key: str) -> None:
    for text in mutations(key):
        with pytest.raises(ConfigError) as error:
            load([text])
            pytest.fail(f"{text[:80]} was taken")
        assert [problem.key for problem in error.value.problems] == [key]
        assert all(line.isprintable() for line in error.value.lines())


@pytest.mark.parametrize("key", list(leaves()))
def test_a_look_alike_key_is_unknown_and_the_real_one_is_suggested(key: str) -> None:
    section, _, name = key.rpartition(".")
    alike = f"{section}.{name.translate(ALIKE)}" if section else name.translate(ALIKE)
    if alike == key:
        alike = f"{key}\u200b"
    with pytest.raises(ConfigError) as error:
        load([f"{alike}=1"])
    (problem,) = error.value.problems
    assert problem.key == alike
    assert problem.problem == "unknown key"


def test_the_generated_cases_are_many() -> None:
    assert sum(1 + len(list(mutations(key))) for key in leaves()) >= 500


WORDS = [
    *(
        "",
        "null",
        "true",
        "yes",
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1",
        "3.5",
        "010",
        "1:30",
        "1e999",
        "50M",
        "2h",
    ),
    *(
        "[]",
        "[1,2]",
        "{}",
        "{a:1}",
        "[[",
        "${",
        "${optim.lr}",
        "${x}",
        "${oc.env:USER}",
        "a,b",
        "'",
        '"',
        "\\",
        "=",
    ),
    *(
        "~",
        "é",
        "\u202e",
        "\ud800",
        "\n",
        "\t",
        " ",
        "%",
        "???",
        "x" * 300,
        str(HUGE),
        "tiny",
        "auto",
        "range(1,3)",
    ),
    *("_target_", "@", "+", "!!python/name:os.system", "1_000", "0x10", ".5", "sort(3,1)", "int(x)", "\x00"),
]
KEYS = [*leaves(), "model", "transpoint", "resume", "optim", "hydra.run.dir", "foo", "", "--config"]
ENVIRONMENT = ("WORLD_SIZE", "RANK", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "NETRC", "HOME")
GOOD = [
    "model=small",
    "optim.lr=1e-4",
    "train.tokens=1M",
    "transpoint=log",
    "~optim.clip",
    "data.seq_len=64",
    "seed=7",
]


def random_argument(draw: random.Random) -> str:
    if draw.random() < 0.3:
        return draw.choice(GOOD)
    key = draw.choice(KEYS)
    if draw.random() < 0.2 and key:
        place = draw.randrange(len(key))
        key = key[:place] + draw.choice(["", ".", "_", "é", "=", "[", "/", "@x"]) + key[place + 1 :]
    value = "".join(draw.choice(WORDS) for _ in range(draw.choice([1, 1, 1, 2, 3])))
    sign, equals = draw.choice(["", "", "", "+", "++", "~", "-"]), draw.choice(["=", "=", "=", "==", ""])
    return f"{sign}{key}{equals}{value}"


def random_file(draw: random.Random, text: str) -> str:
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice([*WORDS, ":", "-", "#", "&", "*", "!", "|", ">"]) + text[place + 3 :]
    return text


@pytest.mark.parametrize("seed", range(10))
def test_random_edits_give_a_configuration_or_a_config_error_and_nothing_else(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    stored = to_yaml(load(["transpoint.points=[0,inf]", "validation.sets.a=/data", "data.skip=['1:2']"]))
    outcomes = {True: 0, False: 0}
    for attempt in range(300):
        argv = [random_argument(draw) for _ in range(draw.choice([1, 1, 2, 4]))]
        if attempt % 6 == 0:
            (tmp_path / "c.yaml").write_bytes(random_file(draw, stored).encode(errors="surrogatepass"))
            argv = ["--config", "c.yaml"]
        environ = {name: draw.choice(WORDS) for name in ENVIRONMENT if draw.random() < 0.1}
        try:
            validate(load(argv), environ)
        except ConfigError as error:
            outcomes[False] += 1
            assert error.problems
            assert all(line.isprintable() for line in error.lines()), argv
        else:
            outcomes[True] += 1
    assert all(outcomes.values())
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
