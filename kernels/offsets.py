"""Read Triton's intermediate code for what no test of numbers finds: narrow offsets, transposed accumulators.

An offset that is multiplied out in 32 bits is right until a tensor passes 2^31 elements. A left operand of a dot
that is a transposed result of another dot is miscompiled for Hopper by Triton 3.4 to 3.7.0.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

NAME = r"%[\w.$-]+(?:#\d+)?"
RUNTIME = ("tt.get_program_id", "tt.get_num_programs", "load", "argument")
TRUTHS = ("arith.cmpi", "arith.cmpf")


class Size(IntEnum):
    """How far an integer can be known to stay small."""

    CONSTANT = 0  # known to the compiler
    POSITION = 1  # of a loop: it counts along one axis
    RUNTIME = 2  # program ids, sizes, strides, what was loaded


@dataclass(eq=False)
class Value:
    """What one operation yields.

    Attributes:
        op: the operation; "argument", "loop index" and "carried" for what regions and functions bind.
        inputs: values it is made of.
        type_text: its type as printed.
        place: file and line in the source, when the text says.
    """

    op: str
    inputs: list["Value"] = field(default_factory=list)
    type_text: str = ""
    place: str = ""

    @property
    def is_narrow(self) -> bool:
        """A 32-bit integer, or a tensor of them."""
        return re.fullmatch(r"i32|tensor<[\dx]*xi32>", self.type_text) is not None


@dataclass
class _Region:
    names: dict[str, Value]
    results: list[Value] = field(default_factory=list)
    carried: list[Value] = field(default_factory=list)


def narrow_offsets(ttir: str) -> tuple[str, ...]:
    """Lines whose 32-bit product or sum of runtime values becomes a pointer's offset.

    Sums and products of a loop's index with constants pass, and so does a constant added to a runtime value.
    """
    found: dict[str, None] = {}
    sizes: dict[Value, Size] = {}
    for value in parse(ttir):
        if value.op == "tt.addptr" and len(value.inputs) > 1:
            _size(value.inputs[1], sizes, found)
    return tuple(found)


def dots_of_transposed_sums(ttir: str) -> tuple[str, ...]:
    """Lines with a dot whose left operand is made by transposing the result of another dot."""
    found: dict[str, None] = {}
    for value in parse(ttir):
        if value.op.endswith("dot") and value.inputs:
            turned = [part for part in _reached(value.inputs[0]) if part.op == "tt.trans"]
            if any(part.op.endswith("dot") for turn in turned for part in _reached(turn)):
                found[f"{value.place}: a dot's left operand is a transposed accumulator"] = None
    return tuple(found)


def parse(ttir: str) -> list[Value]:
    """All operations of a module in the order of the text, with what they are made of."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    values: list[Value] = []
    regions = [_Region({})]
    for line in ttir.splitlines():
        text, place = _without_place(line.strip(), places)
        if text.startswith("}"):
            closed = regions.pop()
            if text.startswith(("} else", "} do")):
                regions.append(_Region(dict(regions[-1].names), closed.results, closed.carried))
        elif text.startswith(("scf.yield", "scf.condition")):
            _yield(text, regions[-1])
        elif text.startswith(("tt.func", "^")):
            bound = {name: Value("argument", [], kind) for name, kind in re.findall(rf"({NAME}): ([!\w.<>]+)", text)}
            regions[-1].names.update(bound)
        elif text and text[0] in '%tas"':
            values.append(_operation(text, place, regions))
        if text.endswith("{") and not text.startswith(("}", "%", '"', "scf.")):
            regions.append(_Region(dict(regions[-1].names)))
    return values


def _operation(text: str, place: str, regions: list[_Region]) -> Value:
    """Define what a line defines; a line that opens a region opens it here, with what the region binds."""
    outer = regions[-1]
    left, body = text.split(" = ", 1) if text[0] == "%" else ("", text)
    op = body.lstrip('"').split("(")[0].split('"')[0].split()[0]
    used = re.findall(NAME, re.sub(r"iter_args\(.*?\)", "", body))
    inputs = [outer.names[name] for name in used if name in outer.names]
    value = Value(op, inputs, _result_type(body), place)
    names = [
        name if not count else f"{name}#{index}"
        for name, count in re.findall(r"(%[\w.$-]+)(?::(\d+))?", left)
        for index in range(int(count or 1))
    ]
    inner = _Region(dict(outer.names))
    if op in ("scf.for", "scf.while"):
        starts = re.findall(rf"({NAME}) = ({NAME})", body)
        bound = {name: Value("carried", [outer.names[start]], "", place) for name, start in starts}
        if op == "scf.for":
            first = starts[0][0]
            bound[first] = Value("loop index", [], "", place)
        inner.names.update(bound)
        inner.carried = [part for part in bound.values() if part.op == "carried"]
    if op.startswith("scf."):
        inner.results = [Value(op, inner.carried[index : index + 1], "", place) for index in range(len(names))]
        outer.names.update(zip(names, inner.results, strict=True))
    else:
        outer.names.update(dict.fromkeys(names, value))
    if text.endswith("{"):
        regions.append(inner)
    return value


def _yield(text: str, region: _Region) -> None:
    given = [region.names[name] for name in re.findall(NAME, text.split(")", 1)[-1]) if name in region.names]
    for targets in (region.results, region.carried):
        for target, value in zip(targets, given, strict=False):
            target.inputs.append(value)


def _size(value: Value, sizes: dict[Value, Size], found: dict[str, None]) -> Size:
    if value in sizes:
        return sizes[value]
    if value.op == "loop index" or value.op.endswith(RUNTIME):
        sizes[value] = Size.POSITION if value.op == "loop index" else Size.RUNTIME
        return sizes[value]
    sizes[value] = Size.RUNTIME if value.op == "carried" else Size.CONSTANT  # for a loop that leads back here
    parts = [_size(part, sizes, found) for part in value.inputs if part.op not in TRUTHS]
    low, high = min(parts, default=Size.CONSTANT), max(parts, default=Size.CONSTANT)
    is_product = value.op in ("arith.muli", "arith.shli") and (high == Size.RUNTIME or low > Size.CONSTANT)
    is_sum = value.op == "arith.addi" and low > Size.CONSTANT
    grows = value.op == "arith.addi" and any(part.op == "carried" and value in part.inputs for part in value.inputs)
    if value.is_narrow and (is_product or is_sum or grows):
        found[f"{value.place}: {value.op} in 32 bits leads to an offset"] = None
    if value.op == "arith.subi" and parts[1:] == [Size.POSITION]:  # a loop that counts down
        high = Size.POSITION
    sizes[value] = max(high, sizes[value])
    return sizes[value]


def _reached(value: Value) -> Iterable[Value]:
    """A value and what it is made of, as far as the results of dots and what was loaded."""
    seen: dict[Value, None] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen[part] = None
            if not (part.op.endswith("dot") or part.op.endswith("load")):
                waiting.extend(part.inputs)
    return seen


def _result_type(body: str) -> str:
    """The type after the last arrow or colon; of several results the first."""
    kinds = body.removesuffix("{").rstrip().rsplit(" : ", 1)[-1].rsplit(" -> ", 1)[-1]
    return kinds.strip("() ").split(", ")[0]


def _without_place(line: str, places: dict[str, str]) -> tuple[str, str]:
    """A line without its trailing location, and that location's file and line."""
    match = re.search(r" loc\((.*?)\)$", line)
    text = re.sub(r' loc\((?:"[^"]*"\()?#?\w*\)?\)', "", line)
    location = match[1] if match else ""
    for _ in range(8):
        known = re.search(r'"([^"]+)":(\d+)', location)
        if known is not None:
            return text, f"{known[1].rsplit('/', 1)[-1]}:{known[2]}"
        references = re.findall(r"#loc\d*", location)
        if not references:
            break
        location = places.get(references[0], "")
    return text, "?"
