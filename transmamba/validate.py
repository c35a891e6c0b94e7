"""What can be known to be wrong before torch is imported: keys, environment, data and run folder."""

import itertools
import math
import re
import socket
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transmamba.config import Config, head_width, padded_vocab, tokens_per_step, total_steps
from transmamba.errors import CompleteRunError, ConfigError, Problem
from transmamba.tracking.wandb_key import has_key
from transmamba.transpoint import layer_kinds
from transmamba.validate_data import data_problems
from transmamba.validate_run import complete_at, run_problems

TORCH_FLOOR = (2, 11)
Problems = Iterator[Problem]
_STARTED_BY = "start it with `transmamba launch` or torchrun, which set it, or unset it"


def validate(config: Config, environ: Mapping[str, str]) -> None:
    """Check a composed configuration against itself, the environment, the data and the run folder.

    Args:
        config: what `compose.load` returned.
        environ: usually os.environ; WORLD_SIZE, RANK, MASTER_PORT and the like are read from it.

    Raises:
        ConfigError: all problems, the most basic ones first.
        CompleteRunError: the only one is that the run has all its steps.
    """
    problems = [*_path_problems(config), *_world_problems(environ), *_version_problems()]
    world = 1 if problems else int(environ.get("WORLD_SIZE", "1"))
    problems += _model_problems(config)
    problems += _transpoint_problems(config)
    problems += _length_problems(config)
    problems += _optim_problems(config)
    problems += _wandb_problems(config, environ)
    if not any(problem.key.startswith("model.") for problem in problems):
        problems += layout_problems(config, world)
    if not problems:
        problems += data_problems(config)
    if not any(problem.key.startswith(("data.", "model.", "run.")) for problem in problems):
        problems += run_problems(config)
    if [problem.key for problem in problems] == ["train.steps"] and (step := complete_at(config)) is not None:
        raise CompleteRunError(problems, config.run.dir, step)
    if problems:
        raise ConfigError(problems)


def _path_problems(config: Config) -> Problems:
    paths = {"data.path": config.data.path, "run.dir": config.run.dir}
    paths |= {f"validation.sets.{name}": path for name, path in config.validation.sets.items()}
    for key, path in paths.items():
        if path is not None and ("\0" in path or ".." in Path(path).parts or len(path) > 4096):
            yield Problem(key, "a path with '..' or a NUL character", path, "give an absolute or a plain path")
    for name in config.validation.sets:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            fix = "use letters, digits, - and _ in the names of the sets"
            yield Problem("validation.sets", "not a name for a set", name, fix)


def _world_problems(environ: Mapping[str, str]) -> Problems:
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environ:
        if "RANK" in environ or ("SLURM_PROCID" in environ and tasks.isdigit() and int(tasks) > 1):
            yield Problem("WORLD_SIZE", "not set although this is one of several processes", None, _STARTED_BY)
        return
    world, rank = _whole_number(environ["WORLD_SIZE"]), _whole_number(environ.get("RANK", "0"))
    if world is None or world < 1:
        yield Problem("WORLD_SIZE", "not a number of processes", environ["WORLD_SIZE"], _STARTED_BY)
    elif "RANK" not in environ and world > 1:
        yield Problem("RANK", "not set although WORLD_SIZE is", None, _STARTED_BY)
    elif rank is None or rank >= world:
        yield Problem("RANK", f"not one of 0 to {world - 1}", environ.get("RANK"), _STARTED_BY)
    if "MASTER_PORT" not in environ:
        return
    port = _whole_number(environ["MASTER_PORT"])
    free = "choose a free port, for example MASTER_PORT=29500"
    if port is None or not 0 < port < 65536:
        yield Problem("MASTER_PORT", "not a port between 1 and 65535", environ["MASTER_PORT"], free)
    # Under torchrun the port belongs to its agent, which listens already.
    elif rank == 0 and (world or 1) > 1 and "TORCHELASTIC_RUN_ID" not in environ and not _is_free(port):
        yield Problem("MASTER_PORT", "the port is in use", port, free)


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _version_problems() -> Problems:
    floor = ".".join(map(str, TORCH_FLOOR))
    fix = f"install it: pip install 'torch>={floor}'"
    try:
        found = version("torch")
    except PackageNotFoundError:
        yield Problem("torch", "not installed", None, fix)
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < TORCH_FLOOR:
        yield Problem("torch", f"older than {floor}", found, fix)


def _model_problems(config: Config) -> Problems:
    model = config.model
    has_attention = model.kind != "mamba2"
    if has_attention and model.head_dim is None and model.d_model % model.n_heads:
        fix = f"use {_nearest_divisors(model.d_model, model.n_heads)} heads, or give model.head_dim"
        yield Problem("model.n_heads", f"does not divide model.d_model={model.d_model}", model.n_heads, fix)
    elif has_attention and model.rope != "none" and head_width(model) % 2:
        width = head_width(model)
        fix = f"use an even width such as {width + 1}, or model.rope=none"
        yield Problem("model.head_dim", "rotary positions need an even head width", width, fix)
    if model.kind in ("mamba2", "hybrid"):
        inner = model.ssm_expand * model.d_model
        if inner % model.ssm_head_dim:
            fix = f"use {_nearest_divisors(inner, model.ssm_head_dim)}"
            what = f"does not divide the inner width {inner} = ssm_expand x d_model"
            yield Problem("model.ssm_head_dim", what, model.ssm_head_dim, fix)
        elif (inner // model.ssm_head_dim) % model.ssm_groups:
            heads = inner // model.ssm_head_dim
            fix = f"use {_nearest_divisors(heads, model.ssm_groups)}"
            yield Problem("model.ssm_groups", f"does not divide the {heads} ssm heads", model.ssm_groups, fix)
    if model.dt_min >= model.dt_max:
        fix = "use model.dt_min=0.001 model.dt_max=0.1"
        yield Problem("model.dt_min", f"not below model.dt_max={model.dt_max}", model.dt_min, fix)
    if model.kind == "hybrid":
        yield from _pattern_problems(model.pattern, model.n_layers)


def _pattern_problems(pattern: str, n_layers: int) -> Problems:
    wrong = next((i for i, letter in enumerate(pattern) if letter not in "AM"), None)
    if wrong is not None:
        fix = "use A (attention) and M (mamba2) only, for example MMMAMMM"
        yield Problem("model.pattern", f"letter {wrong + 1} is not A or M", pattern, fix)
    elif len(pattern) > n_layers:
        fix = f"use {n_layers} letters or fewer; a shorter pattern is repeated"
        yield Problem("model.pattern", f"{len(pattern)} letters for {n_layers} layers", pattern, fix)


def _transpoint_problems(config: Config) -> Problems:
    example = "for example transpoint.points=[0,64,inf], or choose another transpoint"
    transpoint, steps, layers = config.transpoint, total_steps(config), config.model.n_layers
    if transpoint.schedule == "explicit" and transpoint.points is None:
        yield Problem("transpoint.points", "needed by the schedule `explicit`", None, f"give a list, {example}")
    if transpoint.points is not None and len(transpoint.points) > layers:
        what = f"{len(transpoint.points)} points for {layers} layers"
        fix = f"give {layers} points or fewer; a shorter list is repeated"
        yield Problem("transpoint.points", what, transpoint.points, fix)
    seen: set[int] = set()
    for change in transpoint.changes:
        if change.schedule == "explicit" and change.points is None:
            fix = f"give points or a schedule, {example}"
            yield Problem("transpoint.changes", f"the change at step {change.step} has no points", None, fix)
        if change.step in seen:
            yield Problem("transpoint.changes", "two changes at one step", change.step, "keep one")
        elif steps and change.step >= steps:
            fix = f"use a step below {steps}"
            yield Problem("transpoint.changes", f"the run ends at step {steps}", change.step, fix)
        seen.add(change.step)


def _length_problems(config: Config) -> Problems:
    train, per_step = config.train, tokens_per_step(config)
    if train.steps is None and train.tokens is None:
        fix = "set one of the two, for example train.steps=240 or train.tokens=50M"
        yield Problem("train.steps", "neither train.steps nor train.tokens is given", None, fix)
        return
    steps = total_steps(config)
    if train.tokens is not None and -(-train.tokens // per_step) != steps:
        what = f"disagrees with train.tokens={train.tokens}, which is {-(-train.tokens // per_step)} steps"
        yield Problem("train.steps", what, train.steps, "keep one of the two and set the other to null")
    if config.checkpoint.every > steps:
        fix = f"use 1 to {steps}; the last step is always saved"
        yield Problem("checkpoint.every", f"above the {steps} steps of the run", config.checkpoint.every, fix)
    yield from _skip_problems(config.data.skip)


def _skip_problems(skip: list[str]) -> Problems:
    matches = [re.fullmatch(r"(\d{1,15}):(\d{1,15})", text) for text in skip]
    for text, match in zip(skip, matches, strict=True):
        if match is None or int(match[1]) >= int(match[2]):
            fix = 'write "first:last" with first below last, for example data.skip=["100:120"]'
            yield Problem("data.skip", "not a range of data steps", text, fix)
            return
    # What lies in two ranges would be left out once and as much behind it once more.
    ranges = sorted((int(match[1]), int(match[2])) for match in matches if match)
    for (first, last), (other, end) in itertools.pairwise(ranges):
        if other < last:
            fix = f'write "{first}:{max(last, end)}" in their place'
            yield Problem("data.skip", f"{first}:{last} and {other}:{end} overlap", skip, fix)


def _optim_problems(config: Config) -> Problems:
    optim, steps = config.optim, total_steps(config)
    if optim.min_lr > optim.lr:
        yield Problem("optim.min_lr", f"above optim.lr={optim.lr}", optim.min_lr, f"use {optim.lr} or less")
    total = steps * (tokens_per_step(config) if optim.unit == "tokens" else 1)
    if not steps:
        return
    if optim.warmup > total:
        what = f"longer than the run of {total} {optim.unit}"
        yield Problem("optim.warmup", what, optim.warmup, f"use {total} or less")
    elif optim.schedule == "wsd" and optim.warmup + (optim.decay or 0) > total:
        what = f"warm-up and decay are longer than the run of {total} {optim.unit}"
        yield Problem("optim.decay", what, optim.decay, f"use {total - optim.warmup} or less")


def _wandb_problems(config: Config, environ: Mapping[str, str]) -> Problems:
    if config.wandb.mode == "online" and not has_key(environ):
        fix = "log in with `wandb login`, or use wandb.mode=offline"
        yield Problem("wandb.mode", "online needs a key and none is configured", "online", fix)


def layout_problems(config: Config, world: int) -> Problems:
    """What keeps `world` ranks from sharing the model and the batch as the configuration says."""
    parallel, train, model = config.parallel, config.train, config.model
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    kinds = set(layer_kinds(model))
    if kinds - {"mamba2"} and model.n_heads % (tp * cp):
        key = "parallel.tp" if model.n_heads % tp else "parallel.cp"
        fix = f"choose tp x cp among {_divisors(model.n_heads)}"
        yield Problem(key, f"tp x cp = {tp * cp} does not divide model.n_heads={model.n_heads}", tp * cp, fix)
    if "mamba2" in kinds and model.ssm_groups % tp:
        fix = f"choose tp among {_divisors(model.ssm_groups)}, or more model.ssm_groups"
        yield Problem("parallel.tp", f"does not divide model.ssm_groups={model.ssm_groups}", tp, fix)
    ssm_heads = model.ssm_expand * model.d_model // model.ssm_head_dim
    shared = math.lcm(model.ssm_groups, tp * cp)
    if "mamba2" in kinds and model.ssm_groups % tp == 0 and ssm_heads % shared:
        what = f"the {ssm_heads} heads of mamba2 layers do not divide among {shared} parts (groups and tp x cp ranks)"
        yield Problem("parallel.cp", what, cp, "choose a smaller cp, or a smaller model.ssm_head_dim")
    if model.d_ff % tp:
        fix = f"use {model.d_ff // tp * tp or tp} or {(model.d_ff // tp + 1) * tp}"
        yield Problem("model.d_ff", f"not divisible by parallel.tp={tp}", model.d_ff, fix)
    if model.vocab_size is not None and padded_vocab(model.vocab_size) % tp:
        rows = math.lcm(128, tp)
        fix = f"use model.vocab_size={-(-model.vocab_size // rows) * rows}"
        yield Problem("model.vocab_size", f"its padded size is not divisible by tp={tp}", model.vocab_size, fix)
    shards = cp * (tp if parallel.sp else 1)
    if config.data.seq_len % shards:
        fix = f"use a multiple of {shards}"
        yield Problem("data.seq_len", f"not divisible by its {shards} shards", config.data.seq_len, fix)
    if parallel.vpp > 1 and pp == 1:
        yield Problem("parallel.vpp", "needs parallel.pp of 2 or more", parallel.vpp, "use parallel.vpp=1 or pp=2")
    if parallel.sp and tp == 1:
        yield Problem("parallel.sp", "needs parallel.tp of 2 or more", True, "use parallel.sp=false or tp=2")
    stages = pp * parallel.vpp
    if stages > model.n_layers:
        key = "parallel.pp" if pp > model.n_layers else "parallel.vpp"
        fix = f"choose pp x vpp from 1 to {model.n_layers}"
        yield Problem(key, f"pp x vpp = {stages} is more than model.n_layers={model.n_layers}", stages, fix)
    if pp > 1 and config.zero.stage >= 2:
        fix = "use zero.stage=1 with a pipeline"
        yield Problem("zero.stage", f"stages 2 and 3 need parallel.pp=1, not {pp}", config.zero.stage, fix)
    if config.zero.stage == 0 and config.precision == "bf16":
        yield Problem("zero.stage", "stage 0 trains in fp32 only", 0, "use zero.stage=1, or precision=fp32")
    if world % (tp * pp * cp):
        what = f"tp x pp x cp = {tp} x {pp} x {cp} = {tp * pp * cp} does not divide the {world} processes"
        fix = f"choose degrees whose product is one of {_divisors(world)}"
        yield Problem("parallel", what, tp * pp * cp, fix)
        return
    yield from _batch_problems(train.global_batch, train.micro_batch, world // (tp * pp * cp), pp, parallel.vpp)


def _batch_problems(global_batch: int, micro_batch: int, dp: int, pp: int, vpp: int) -> Problems:
    unit = dp * micro_batch
    if global_batch % unit:
        near = [size for size in (global_batch // unit * unit, -(-global_batch // unit) * unit) if size]
        what = f"not divisible by {dp} data-parallel ranks x train.micro_batch={micro_batch}"
        fix = f"use {' or '.join(map(str, near))}, or another train.micro_batch"
        yield Problem("train.global_batch", what, global_batch, fix)
    elif global_batch // unit < pp:
        what = f"{global_batch // unit} micro-batches for {pp} pipeline stages"
        fix = f"use a train.micro_batch up to {global_batch // dp // pp or 1}, or a larger train.global_batch"
        yield Problem("train.micro_batch", what, micro_batch, fix)
    elif vpp > 1 and global_batch // unit % pp:
        what = f"{global_batch // unit} micro-batches, which parallel.vpp={vpp} needs in multiples of {pp} stages"
        yield Problem(
            "train.micro_batch", what, micro_batch, f"use another, so that their number is a multiple of {pp}"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(size) for size in range(1, min(n, 100_000) + 1) if n % size == 0)


def _nearest_divisors(n: int, wanted: int) -> str:
    divisors = [size for size in range(1, n + 1) if n % size == 0] if n <= 10**6 else [1, n]
    below = max((size for size in divisors if size <= wanted), default=1)
    above = min((size for size in divisors if size >= wanted), default=n)
    return str(below) if below == above else f"{below} or {above}"
