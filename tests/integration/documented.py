"""The commands of the documentation: found in the text, and how each is executed by `test_readme.py`.

A new command needs one row in `ROWS`, with the text as it is written; most are `RUN`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "data_pipeline", "launch", "kernels", "transmamba/planning")
_STARTERS = "make|python|torchrun|transmamba|pytest|touch|sbatch|srun"
_BEFORE_COMMENT = re.compile(r"""(?:'[^']*'|"[^"]*"|[^'"#]|(?<=\S)#)*""")
_MEMBERS = "kernels|step|read|prepare|checkpoint|layer|model"  # `bench step` beside `transmamba bench kernels`


@dataclass(frozen=True)
class Row:
    """How a command is executed.

    It runs as it is written, in a folder that holds what the documentation's names stand for. Training commands get
    tiny sizes for keys that they do not give.
    """

    replaced: str | None = None  # what is run instead
    codes: tuple[int, ...] = (0,)  # exit codes that are right
    makes: str | None = None  # a file that must be there afterwards
    is_long: bool = False
    reason: str = ""  # why something else is run


RUN = Row()
DRY = Row(reason="looked up in the Makefile")
RANKS = Row(reason="its layout is validated; the long tests run it")


def instead(command: str, reason: str, *, makes: str | None = None, codes: tuple[int, ...] = (0,),
            is_long: bool = False) -> Row:  # fmt: skip
    """Another command in its place, and why."""
    return Row(command, codes, makes, is_long, reason)


# Text of a command that stands for something else in the tests' folder.
STANDS_FOR = {"s3://bucket/": "data/", "step: 100,": "step: 1,", "step: 9000,": "step: 1,"}
BENCH = "it measures for minutes, as `make bench` does; what it offers is asked for"
ROWS: dict[str, Row] = {
    "make train": DRY,
    "make train VENV=": DRY,
    "make test": DRY,
    'make train ARGS="model=tiny_transformer train.steps=100"': DRY,
    "make lint": DRY,
    "make bench": DRY,
    "make test-long": DRY,
    "make gpu-kernels": DRY,
    "make gpu-layer": DRY,
    "make gpu-model": DRY,
    "source .venv/bin/activate": RUN,
    "touch runs/NAME/STOP": Row(makes="runs/NAME/STOP"),
    "torchrun --nproc-per-node 4 -m transmamba.train parallel.tp=2 parallel.pp=2 zero.stage=1": RANKS,
    "torchrun --nproc-per-node 8 -m transmamba.train parallel.tp=2 parallel.sp=true parallel.cp=2 zero.stage=3": RANKS,
    "transmamba data prepare /usr/share/doc/python3.11/html/_sources --out data/python-doc": instead(
        "transmamba data prepare MY_TEXT/ --out data/again", "12 MB take a minute", makes="data/again/manifest.json"
    ),
    'python -m transmamba.train data.path=data/python-doc run.dir=runs/python-doc sample.prompt="The function returns"':
        Row(makes="runs/python-doc/loss.png"),
    "python -m transmamba.train --help": instead("transmamba --help", "a test of its own reads it"),
    "python -m transmamba.train transpoint=uniform": RUN,
    "python -m transmamba.train 'transpoint.points=[0,32,inf]'": RUN,
    "python -m transmamba.train 'transpoint.changes=[{step: 100, points: [0]}]'": RUN,
    "python -m transmamba.train model=tiny_transformer": RUN,
    "python -m transmamba.train zero.stage=2 precision=bf16 train.micro_batch=2 train.recompute=full": RUN,
    "python -m transmamba.train --config runs/NAME/config.yaml": RUN,
    "python -m transmamba.train data.sources.a=data/a data.sources.b=s3://bucket/b 'data.blend={a: 0.7, b: 0.3}'": RUN,
    "transmamba plan model=400m data.seq_len=8192": RUN,
    "transmamba data prepare MY_TEXT/ --out data/mine": instead(
        "transmamba data prepare MY_TEXT/ --out data/own", "data/mine is there", makes="data/own/manifest.json"
    ),
    "transmamba runs ls": RUN,
    "transmamba runs show runs/NAME": RUN,
    "transmamba runs plot runs/A runs/B --x time --y loss,grad_norm --out curves.png": Row(makes="curves.png"),
    "transmamba runs compare runs/A runs/B": Row(makes="compare.png"),
    "transmamba runs compare": instead("transmamba runs compare --help", "named in a sentence"),
    'transmamba generate runs/NAME -p "The "': RUN,
    "transmamba evaluate runs/NAME --tasks heldout_choice": instead(
        "transmamba evaluate runs/NAME --max-tokens 500", "lm_eval is an extra; `tests/model/test_tasks.py` runs it",
        makes="runs/NAME/evaluate.json",
    ),
    "transmamba evaluate hf/NAME -- data.path=data/mine": instead(
        "transmamba evaluate runs/NAME --max-tokens 500 -- data.path=data/mine", "the folder is another command's",
    ),
    "transmamba checkpoint to-hf runs/NAME --out hf/NAME": Row(makes="hf/NAME/config.json"),
    "transmamba doctor": Row(codes=(0, 1)),
    "transmamba checkpoint verify runs/NAME": RUN,
    "pytest tests/parity/test_layouts.py --layout-report FILE": instead(
        f"pytest --collect-only -q {ROOT}/tests/parity/test_layouts.py --layout-report FILE",
        "it runs for minutes",
        is_long=True,
    ),
    "transmamba bench kernels": instead("transmamba bench kernels --help", BENCH),
    "transmamba bench step": instead("transmamba bench step --help", BENCH),
    "transmamba bench checkpoint": instead("transmamba bench checkpoint --help", BENCH),
    "transmamba bench read": instead("transmamba bench read --help", BENCH),
    "transmamba bench prepare": instead("transmamba bench prepare --help", BENCH),
    "python benchmarks/debian_docs.py FOLDER": instead(
        f"python -c 'import runpy; runpy.run_path(\"{ROOT}/benchmarks/debian_docs.py\")'",
        "installs packages and trains for 20 minutes",
    ),
    "python benchmarks/schedules.py": instead(
        f"python {ROOT}/benchmarks/schedules.py --help", "trains 36 models; the tests of sweeps train a few"
    ),
    "python benchmarks/length_extension.py runs/ext": instead(
        f"python {ROOT}/benchmarks/length_extension.py --help", "a test of its own runs it with tiny sizes"
    ),
    "python -m transmamba.train -m transpoint=v1,v9 seed=1,2": Row(is_long=True),
    "python -m transmamba.kernels.compiled": instead(
        "python -c 'import transmamba.kernels.compiled'", "compiles for minutes; the tests of the kernels do that"
    ),
    "python -m transmamba.kernels.launches": instead(
        "python -c 'import transmamba.kernels.launches'", "compiles for minutes; the tests of the kernels do that"
    ),
    "sbatch RUN/slurm.sh": instead("transmamba launch slurm --print", "shows the script; the tests with Slurm do it"),
    "srun --kill-on-bad-exit=0 --wait=60": instead(
        f"grep -q 'srun.* --kill-on-bad-exit=0 --wait=60' {ROOT}/launch/slurm.sh.template", "a line of the template"
    ),
    "transmamba plan": RUN,
    "transmamba launch local": instead("transmamba launch local --print", "named in a sentence"),
    "transmamba plan --published": RUN,
    "transmamba plan --published [FILE.csv]": instead("transmamba plan --published", "the brackets mean: or not"),
    "python -m transmamba.planning.fit --leave-out": Row(is_long=True),
    "transmamba data --help": RUN,
    "transmamba data prepare MY_TEXT/ 'more/*.jsonl.gz' s3://bucket/corpus/ --out data/mine": instead(
        "transmamba data prepare MY_TEXT/ 'more/*.jsonl.gz' corpus/ --out data/three", "another folder, no bucket",
        makes="data/three/manifest.json",
    ),
    "transmamba data prepare big.parquet --field body --tokenizer tokenizer.json --dedup --out data/big":
        Row(makes="data/big/manifest.json"),
    "transmamba data tokenizer train MY_TEXT/ --out tokenizer.json --vocab-size 32000": instead(
        "transmamba data tokenizer train MY_TEXT/ --out trained.json --vocab-size 600", "the folder's tokenizer stays",
        makes="trained.json",
    ),
    "transmamba data inspect data/mine --png lengths.png --samples 3": Row(makes="lengths.png"),
    "transmamba data inspect": instead("transmamba data inspect data/mine", "named in a sentence"),
    "transmamba data verify data/mine": RUN,
    "transmamba data export-megatron data/mine --out PREFIX": instead(
        "transmamba data export-megatron data/mine --out OTHER", "PREFIX is there", makes="OTHER.idx"
    ),
    "transmamba data import-megatron PREFIX --tokenizer tokenizer.json --out data/theirs": instead(
        "transmamba data import-megatron PREFIX --tokenizer tokenizer.json --out data/theirs --validation-share 0.2",
        "of so few documents none would be held out", makes="data/theirs/manifest.json",
    ),
    "python -m transmamba.train data.sources.web=data/web data.sources.code=s3://bucket/code "
    "'data.blend={web: 0.7, code: 0.3}' 'data.stages=[{step: 9000, blend: {web: 1, code: 3}}]'": RUN,
    "python -m transmamba.train data.path=data/mine 'data.skip=[\"5000:5100\"]' 'validation.sets={news: data/news}' "
    "data.ledger=true": RUN,
    "python -m transmamba.train data.path=data/mine": RUN,
    "transmamba data audit runs/NAME": RUN,
}  # fmt: skip


# Families that need no row: those that change nothing run as they are written, and those that start something large
# get the option that makes them say what they would do.
READS_ONLY = ("transmamba plan ", "transmamba runs ")
SAY_ONLY = {"transmamba launch slurm": "--print", "transmamba launch local": "--print", "transmamba sweep": "--dry-run"}


def row_of(command: str) -> Row | None:
    """How a command is executed; None for one that nobody has thought of."""
    if command in ROWS or command.startswith(READS_ONLY):
        return ROWS.get(command, RUN)
    if command.startswith("transmamba sweep show"):
        return instead("transmamba sweep show --help", "wants a finished sweep; its own tests have one")
    for start, option in SAY_ONLY.items():
        if command.startswith(f"{start} "):
            asked = command if option in command else command.replace(start, f"{start} {option}", 1)
            return instead(asked, "says what it would do; its own tests do it")
    return None


def commands(text: str) -> list[str]:
    """Every command of a Markdown text, in order: lines of code blocks without a language or of shell, and code spans.

    Of a block with prompts (`$ `) only those lines count. Comments are left out; `a; b` is two commands.
    """
    found: list[str] = []
    prose: list[str] = []
    for number, part in enumerate(re.split(r"^```", text, flags=re.MULTILINE)):
        if number % 2 == 0:
            prose.append(part)
            continue
        language, _, block = part.partition("\n")
        if language.strip() in ("", "sh", "bash", "shell", "console"):
            lines = block.splitlines()
            asked = [line[2:] for line in lines if line.startswith("$ ")]
            for line in asked or lines:
                whole = _BEFORE_COMMENT.match(line)[0]  # pyright: ignore[reportOptionalSubscript]
                found += [command.strip() for command in whole.split("; ") if command.strip()]
    for span in re.findall(rf"`((?:{_STARTERS}) [^`]+|source [^` ]+)`", "".join(prose)):
        found.append(span)
    for span in re.findall(rf"`bench ({_MEMBERS})`", "".join(prose)):
        found.append(f"transmamba bench {span}")
    return list(dict.fromkeys(found))


def documented() -> dict[str, str]:
    """Every command of the documentation and the file that says it first."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        path = ROOT / folder / "README.md"
        for command in commands(path.read_text(encoding="utf-8")):
            found.setdefault(command, str(path.relative_to(ROOT)))
    return found
