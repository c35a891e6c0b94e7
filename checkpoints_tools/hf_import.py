"""From a model folder of transformers to a run folder with a checkpoint of step 0, from which training goes on."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from transmamba import checkpoint, plain_yaml, resume
from transmamba.checkpoints_tools.hf_compare import FORMS, Comparison, compare
from transmamba.checkpoints_tools.hf_export import check_free, load_exported
from transmamba.checkpoints_tools.hf_source import KINDS, Source, open_source
from transmamba.compose import load, to_yaml
from transmamba.config import Config, tokens_per_step
from transmamba.corpus import Corpus, open_corpus
from transmamba.data_pipeline.publish import publish_folder
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.errors import EXIT_INTERNAL, EXIT_STORAGE, ConfigError, Problem, RunError
from transmamba.machine import choose_precision
from transmamba.model.model import Model
from transmamba.model.norm import PerHead
from transmamba.parallel.zero import MOMENTS
from transmamba.run import build_model
from transmamba.slices import Piece
from transmamba.validate import validate

# Keys that say how large the weights are, or what is computed with them.
HELD_BY_WEIGHTS = (
    *("n_layers", "d_model", "n_heads", "head_dim", "d_ff", "tied", "norm_eps"),
    *("conv_width", "d_skip", "ssm_expand", "ssm_head_dim", "ssm_state", "ssm_groups"),
)


@dataclass(frozen=True)
class Import:
    """What was written, and how its logits compare with the source's."""

    folder: Path
    source: str
    kind: str
    is_exact: bool
    comparisons: list[Comparison]


def import_folder(
    folder: Path, out: Path, overrides: list[str], *, check_tokens: int = 1000, progress: bool = False
) -> Import:
    """Make a run of a model of transformers: Llama's relatives, Mamba-2, or what `export` wrote.

    Args:
        folder: a local model folder.
        out: the run folder to make; `python -m transmamba.train --config OUT/config.yaml` goes on from it.
        overrides: `key=value` of the run; the model's sizes come from the weights. By default the TransPoints are
            those at which the model computes what the source does: inf for Llama, 0 for Mamba-2.
        check_tokens: tokens to compare in each form of input, at those TransPoints; 0 compares nothing.

    Raises:
        ConfigError: the folder cannot be imported, an override or the data does not fit it, or `out` is taken.
        DataError: the data cannot be opened.
        RunError: the disk refused (exit 40), or logits differ where they must not (exit 1).
    """
    check_free(out)
    source = open_source(folder)
    config = _settle(source, out, overrides)
    corpus = open_corpus(config)
    _check_tokenizer(source, config, corpus)
    data = {"fingerprint": corpus.fingerprint(), "next_row": 0}
    data |= {"vocab_size": corpus.vocab_size, "eod_id": corpus.first.eod_id}
    model = build_model(config, corpus.vocab_size).eval()
    fill(model, source.tensors(config.model))
    comparisons = _compare(source, model, config, corpus.vocab_size, check_tokens, progress)
    try:
        with publish_folder(out, replace=False) as new:
            shutil.copyfile(corpus.first.tokenizer_path, new / "tokenizer.json")
            save_start(new, config, model, data)
    except (OSError, checkpoint.StorageError) as error:
        fix = "make room, or use another folder"
        raise RunError(EXIT_STORAGE, f"--out: cannot write {out} ({error}). Fix: {fix}") from error
    return Import(out, source.described.model_type, config.model.kind, source.is_exact(config.model), comparisons)


def save_start(folder: Path, config: Config, model: Model, data: dict[str, Any], step: int = 0) -> None:
    """Write config.yaml and a checkpoint whose moments are zero: a run before its next step.

    Raises:
        StorageError: the file system refused.
    """
    (folder / "config.yaml").write_text(to_yaml(config, leave_open=True), encoding="utf-8")
    one: Any = SimpleNamespace(world_size=1)  # all that the record needs to know of the ranks
    record = resume.record(config, step, data, one, tokens_seen=step * tokens_per_step(config))
    checkpoint.save(folder / "checkpoints", step, _pieces(model), record)


def _pieces(model: Model) -> Iterator[Piece]:
    heads = {f"{name}.offset": part for name, part in model.named_modules() if isinstance(part, PerHead)}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        for kind, values in (("master", value), *((moment, torch.zeros_like(value)) for moment in MOMENTS)):
            yield Piece(name, kind, value.shape, 0, values.flatten())
        if name in heads:
            yield Piece(name.removesuffix(".offset"), "weight", value.shape, 0, heads[name]().detach())
    for name, buffer in model.named_buffers():
        yield Piece(name, "buffer", buffer.shape, 0, buffer)


@torch.no_grad()
def fill(model: Model, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Put weights into a model by their usual names; what is not among them keeps its initial value.

    Raises:
        ConfigError: the model has no place for a weight, or one of another shape.
    """
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors:
        place = places.get(f"{name}.start", places.get(name))
        if place is None:
            fix = "keep the model keys that the weights need, or leave the override out"
            raise ConfigError([Problem("model", "an override leaves no place for a weight of the source", name, fix)])
        if name in ("embedding.weight", "head.weight"):
            n_rows = min(len(place), len(tensor))
            place, tensor = place[:n_rows], tensor[:n_rows]
        if place.shape != tensor.shape:
            what = f"{name} has the shape {list(tensor.shape)} and not {list(place.shape)}"
            raise ConfigError([Problem("SRC", what, list(tensor.shape), "give a folder whose config.json is its own")])
        place.copy_(tensor)


def load_folder(folder: Path) -> tuple[Model, Tokenizer, Config, int]:
    """A model folder of transformers as `generate.load_run` gives a run: model, tokenizer, configuration, end's id.

    Raises:
        ConfigError: the folder cannot be imported, or names no token that ends a document.
        DataError: it has no tokenizer.
    """
    source = open_source(folder)
    config, tokenizer = _compose(source, []), load_tokenizer(folder)
    model = build_model(config, source.described.vocab_size)
    fill(model, source.tensors(config.model))
    ends = source.described.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    if not isinstance(end, int):
        raise ConfigError([Problem("SRC", "its config.json has no eos_token_id", ends, "add it")])
    return model.eval(), tokenizer, config, end


def _compose(source: Source, overrides: list[str]) -> Config:
    """Defaults, then what the weights need, then the overrides."""
    points = ["inf" if point == math.inf else point for point in source.transpoints()]
    values = {"model": source.model_section(), "transpoint": {"points": points}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.yaml"
        file.write_text(plain_yaml.write(values), encoding="utf-8")
        return load(["--config", str(file), *overrides])


def _settle(source: Source, out: Path, overrides: list[str]) -> Config:
    """The run's whole configuration.

    Raises:
        ConfigError: an override is wrong, or contradicts the weights.
    """
    config, section = _compose(source, overrides), source.model_section()
    kinds = KINDS[source.family] if source.family != "transmamba" else (section["kind"],)
    problems = [
        Problem(f"model.{key}", "the weights need another value", getattr(config.model, key), f"use {section[key]}")
        for key in HELD_BY_WEIGHTS
        if key in section and getattr(config.model, key) != section[key]
    ]
    if config.model.kind not in kinds:
        fix = f"use {' or '.join(kinds)}"
        problems.append(Problem("model.kind", "these weights are of another kind", config.model.kind, fix))
    described: Any = source.described
    if source.family == "mamba2" and config.model.kind == "transmamba" and described.state_size != described.head_dim:
        what = (
            f"a transmamba layer has states as wide as its heads, not {described.state_size} for {described.head_dim}"
        )
        problems.append(Problem("model.kind", what, "transmamba", "use model.kind=mamba2"))
    if problems:
        raise ConfigError(problems)
    config.run.dir = str(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.precision = choose_precision(config.precision, device)
    validate(config, os.environ)
    return config


def _check_tokenizer(source: Source, config: Config, corpus: Corpus) -> None:
    """Refuse data whose token ids mean something else than the source's.

    Raises:
        ConfigError: another vocabulary.
    """
    rows = source.described.vocab_size
    fix = f"prepare text with `transmamba data prepare TEXT --tokenizer {source.folder}/tokenizer.json --out DIR`, "
    fix += "and give data.path=DIR"
    if corpus.vocab_size > rows:
        what = f"its tokenizer has {corpus.vocab_size} tokens, and the model {rows}"
        raise ConfigError([Problem("data.path", what, config.data.path, fix)])
    file = source.folder / "tokenizer.json"
    if file.is_file():
        theirs, ours = (load_tokenizer(path).get_vocab(True) for path in (file, corpus.first.tokenizer_path))
        if theirs != ours:
            raise ConfigError(
                [Problem("data.path", "made with another tokenizer than the model's", config.data.path, fix)]
            )


def _compare(
    source: Source, model: Model, config: Config, n_known: int, n_tokens: int, progress: bool
) -> list[Comparison]:
    """Logits of the imported model, at the TransPoints of the source, beside the source's.

    Raises:
        RunError: they differ by more than rounding although they must not (exit 1).
    """
    if n_tokens == 0:
        return []
    theirs = load_exported(source.folder, source.family)
    forms = FORMS[:2] if source.family == "mamba2" else FORMS
    found = list(
        compare(
            model,
            source.transpoints(),
            theirs,
            n_tokens=n_tokens,
            seq_len=config.data.seq_len,
            forms=forms,
            n_known=n_known,
            progress=progress,
        )
    )
    for comparison in found if source.is_exact(config.model) else ():
        if not comparison.is_equal:
            what = f"the imported model computes other logits ({comparison.line()}); nothing was written"
            raise RunError(EXIT_INTERNAL, f"SRC: {what}. Fix: report this with the source's config.json")
    return found
