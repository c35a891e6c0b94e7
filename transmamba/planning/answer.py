"""`transmamba plan`: from the command line to a plan, a forecast, a search or the published rows. Imports no torch."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmamba.config import Config, parse_count
from transmamba.costs import logit_flops
from transmamba.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, Problem
from transmamba.plan import Plan, make_plan, print_plan, token_shares, vocab_rows
from transmamba.plan_parallel import plan_stages

if TYPE_CHECKING:
    from transmamba.corpus import Corpus
    from transmamba.planning.forecast import Forecast
    from transmamba.planning.search import Search


def run_plan(
    overrides: Sequence[str],
    as_json: bool,
    *,
    gpus: int | None = None,
    hardware: str = "h100",
    tokens: str | None = None,
    search: int | None = None,
) -> int:
    """Print the plan of a configuration; trains nothing and creates nothing. Returns the exit code.

    Args:
        gpus: ranks; tp x pp x cp if None and no launcher says.
        hardware: name of a profile in `planning/hardware`, or the path of one.
        tokens: budget for days and GPU-hours, such as "300B"; the run's own if None.
        search: number of GPUs to lay the model out on.
    """
    try:
        config, warnings, world_size = _valid_config(list(overrides), gpus)
        budget = _budget(tokens)
        corpus = _corpus(config)
        plan = make_plan(config, corpus, world_size)
        found = _searched(config, plan, corpus, hardware, search) if search is not None else None
        forecast = None if search is not None else _forecast(config, plan, corpus, hardware, budget, world_size)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    if as_json:
        record = plan.as_dict() | {"warnings": [*plan.warnings, *warnings]}
        record |= {"forecast": forecast and forecast.as_dict(), "search": found and found.as_dict()}
        print(json.dumps(record, indent=1))
    else:
        _print(plan, forecast, found, warnings)
    return EXIT_DONE


def run_published(path: Path | None, as_json: bool) -> int:
    """Print the model's answer for every row of a table of published runs, and the medians of its halves."""
    from transmamba.planning.published import TABLE, predict, read_rows
    from transmamba.planning.report import print_published, published_record
    from transmamba.planning.timing import fitted

    try:
        predictions = predict(read_rows(path or TABLE), fitted()[0])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    if as_json:
        print(json.dumps(published_record(predictions), indent=1))
    else:
        print_published(predictions)
    return EXIT_DONE


def _valid_config(overrides: list[str], gpus: int | None) -> tuple[Config, list[str], int]:
    """The configuration, what is wrong with its run folder here, where it will not run, and the number of ranks."""
    from transmamba.compose import load
    from transmamba.validate import validate

    config = load(overrides, gpus)
    # Without a launcher the layout says how many ranks there are.
    parallel = config.parallel
    ranks = {"WORLD_SIZE": str(gpus or parallel.tp * parallel.pp * parallel.cp), "RANK": "0"}
    environ = {**os.environ, **ranks} if gpus or "WORLD_SIZE" not in os.environ else dict(os.environ)
    try:
        validate(config, environ)
    except ConfigError as error:
        elsewhere = [problem for problem in error.problems if problem.key == "run.dir"]
        if elsewhere != error.problems:
            raise
        return config, [f"here, {problem.key}: {problem.problem}" for problem in elsewhere], int(ranks["WORLD_SIZE"])
    return config, [], int(environ["WORLD_SIZE"])


def _budget(tokens: str | None) -> int | None:
    count = None if tokens is None else parse_count(int(tokens) if tokens.isdecimal() else tokens)
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ConfigError([Problem("--tokens", "not a number of tokens", tokens, "write 300B, 50M or a whole number")])
    return count


def _corpus(config: Config) -> "Corpus | None":
    if config.data.path is None and not config.data.sources:
        return None
    from transmamba.corpus import open_corpus

    return open_corpus(config)


def _forecast(
    config: Config, plan: Plan, corpus: "Corpus | None", hardware: str, budget: int | None, world_size: int
) -> "Forecast":
    from transmamba.planning.forecast import Question, forecast

    costs, rows = [layer.forward_flops_per_token for layer in plan.layers], vocab_rows(config, corpus)
    question = Question(
        config,
        rows,
        token_shares(config, corpus),
        plan_stages(config, costs, logit_flops(config.model, rows), rows, world_size),
        plan.training_flops_per_token,
        plan.training_flops_per_token_full_attention,
        budget or plan.tokens,
    )
    return forecast(question, hardware)


def _searched(config: Config, plan: Plan, corpus: "Corpus | None", hardware: str, gpus: int) -> "Search":
    from transmamba.planning.search import Wanted, search

    costs, rows = [layer.forward_flops_per_token for layer in plan.layers], vocab_rows(config, corpus)
    head = logit_flops(config.model, rows)
    shares = token_shares(config, corpus)
    return search(Wanted(config, rows, shares, costs, head, plan.training_flops_per_token), hardware, gpus)


def _print(plan: Plan, forecast: "Forecast | None", found: "Search | None", warnings: Sequence[str]) -> None:
    from rich.console import Console

    from transmamba.planning.report import print_forecast, print_search

    console: Any = Console()
    print_plan(plan, console)
    if forecast is not None:
        print_forecast(forecast, console)
    if found is not None:
        print_search(found, console)
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
