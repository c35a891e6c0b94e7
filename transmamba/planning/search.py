"""All layouts of a model on N GPUs that are valid and fit in memory, the fastest first. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from transmamba import validate
from transmamba.config import Config, tokens_per_step
from transmamba.costs import PositionShares
from transmamba.errors import ConfigError, Problem
from transmamba.plan_parallel import plan_stages
from transmamba.planning.forecast import RECOMPUTE, stage_memory
from transmamba.planning.ours import layout_of, shape_of
from transmamba.planning.timing import Hardware, fitted, hardware_of, is_cpu, read_hardware, step_time
from transmamba.stages import partition

TOP = 10
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Found:
    """One layout, its step time and the memory of its fullest rank."""

    overrides: tuple[str, ...]
    tp: int
    pp: int
    vpp: int
    cp: int
    sp: bool
    dp: int
    zero: int
    micro_batch: int
    recompute: str
    step_s: float
    tokens_per_s_per_gpu: float
    mfu_causal_half: float
    memory_bytes: int

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Search:
    """The best layouts and how many were looked at."""

    hardware: str
    gpus: int
    n_valid: int
    n_too_large: int
    """Of those faster than the last one listed."""
    best: tuple[Found, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is laid out: the model's costs as `plan` counts them, FLOPs per token forward and backward."""

    config: Config
    n_vocab_rows: int
    shares: PositionShares
    layer_costs: Sequence[float]
    head_cost: float
    flops_causal_half: float


def search(wanted: Wanted, hardware: str, gpus: int) -> Search:
    """Rank layouts for `gpus` devices; the configuration's own layout does not matter, its batch does.

    Raises:
        ConfigError: a CPU, or no layout is valid or fits.
    """
    values = read_hardware(hardware)
    if is_cpu(values):
        raise ConfigError([Problem("--search", "layouts are searched for GPUs", hardware, "use --hardware h100")])
    profile, config = hardware_of(values), wanted.config.model_copy(deep=True)
    config.precision = "bf16"
    timed = sorted(_timed(wanted, config, profile, gpus), key=lambda entry: entry[0])
    best: list[Found] = []
    n_too_large = 0
    for step_s, choice in timed:
        _choose(config, choice)
        parallel = plan_stages(config, wanted.layer_costs, wanted.head_cost, wanted.n_vocab_rows, gpus)
        stages = stage_memory(config, parallel, wanted.n_vocab_rows, config.train.recompute)
        memory = max(stage.total_bytes for stage in stages)
        if memory > profile.memory_bytes:
            n_too_large += 1
            continue
        best.append(_found(config, choice, step_s, memory, parallel.dp, wanted, profile))
        if len(best) == TOP:
            break
    if not best:
        what = "no layout is valid" if not timed else f"none of the {len(timed)} valid layouts fits in memory"
        fix = "use another train.global_batch" if not timed else "use more GPUs, or --hardware with more memory"
        raise ConfigError([Problem("--search", f"{what} on {gpus} GPUs of {hardware}", gpus, fix)])
    return Search(hardware, gpus, len(timed), n_too_large, tuple(best))


def _timed(wanted: Wanted, config: Config, profile: Hardware, gpus: int) -> Iterator[tuple[float, dict[str, Any]]]:
    shape, (k, _) = shape_of(config, wanted.n_vocab_rows, wanted.shares), fitted()
    stages: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for choice in _valid(config, gpus):
        pp, vpp = choice["pp"], choice["vpp"]
        if (pp, vpp) not in stages:
            chunks = partition(wanted.layer_costs, pp * vpp, wanted.head_cost)
            stages[pp, vpp] = [tuple(n for chunk in chunks[rank::pp] for n in chunk) for rank in range(pp)]
        yield step_time(shape, layout_of(config, gpus), profile, k, stages[pp, vpp]).step_s, dict(choice)


def _valid(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Choices that pass the checks of a real run; `config` holds each while it is the current one."""
    degrees = [n for n in range(1, gpus + 1) if gpus % n == 0]
    layers = config.model.n_layers
    for tp, cp, pp in product(degrees, degrees, degrees):
        if tp * cp * pp > gpus or pp > layers or gpus % (tp * cp * pp):
            continue
        base = {"tp": tp, "cp": cp, "pp": pp, "vpp": 1, "sp": False, "zero": 1, "micro_batch": 1}
        base["recompute"] = "none"
        if not _is_valid(config, base, gpus):
            continue
        vpps = [n for n in range(1, _MOST_CHUNKS + 1) if n == 1 or (pp > 1 and pp * n <= layers)]
        zeros = (1, 2, 3) if pp == 1 else (1,)
        sps = (False, True) if tp > 1 else (False,)
        for vpp, sp, zero, micro_batch in product(vpps, sps, zeros, _MICRO_BATCHES):
            choice = base | {"vpp": vpp, "sp": sp, "zero": zero, "micro_batch": micro_batch}
            if _is_valid(config, choice, gpus):
                for recompute in RECOMPUTE:
                    choice["recompute"] = recompute
                    _choose(config, choice)
                    yield choice


def _is_valid(config: Config, choice: dict[str, Any], gpus: int) -> bool:
    _choose(config, choice)
    return next(validate.layout_problems(config, gpus), None) is None


def _choose(config: Config, choice: dict[str, Any]) -> None:
    parallel, train = config.parallel, config.train
    parallel.tp, parallel.pp, parallel.vpp = choice["tp"], choice["pp"], choice["vpp"]
    parallel.cp, parallel.sp, config.zero.stage = choice["cp"], choice["sp"], choice["zero"]
    train.micro_batch, train.recompute = choice["micro_batch"], choice["recompute"]


def _found(
    config: Config, choice: dict[str, Any], step_s: float, memory: int, dp: int, wanted: Wanted, profile: Hardware
) -> Found:
    names = {"zero": "zero.stage", "micro_batch": "train.micro_batch", "recompute": "train.recompute"}
    overrides = [
        f"{names.get(name, f'parallel.{name}')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in choice.items()
    ]
    gpus = choice["tp"] * choice["cp"] * choice["pp"] * dp
    speed = tokens_per_step(config) / step_s / gpus
    mfu = speed * wanted.flops_causal_half / profile.peak_flops
    return Found(
        overrides=tuple(overrides),
        dp=dp,
        step_s=step_s,
        tokens_per_s_per_gpu=speed,
        mfu_causal_half=mfu,
        memory_bytes=memory,
        **choice,
    )
