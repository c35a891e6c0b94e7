"""From a checkpoint to a folder that transformers, and what builds on it, loads and runs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.utils import logging

from transmamba import checkpoint
from transmamba.checkpoint import Checkpoint
from transmamba.checkpoints_tools import hf_model
from transmamba.checkpoints_tools.hf_compare import FORMS, Comparison, compare
from transmamba.checkpoints_tools.hf_format import (
    ARCHITECTURES,
    AUTO_MAP,
    CODE,
    FLOAT32,
    Family,
    family_of,
    hf_config,
    hf_tensors,
)
from transmamba.checkpoints_tools.hf_model.modeling_transmamba import TransMambaForCausalLM
from transmamba.compose import load
from transmamba.config import Config
from transmamba.data_pipeline.publish import publish_folder
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.errors import EXIT_INTERNAL, EXIT_NO_VALID_CHECKPOINT, EXIT_STORAGE, ConfigError, Problem, RunError
from transmamba.model.model import Model
from transmamba.resume import load_weights
from transmamba.run import build_model
from transmamba.transpoint import effective_points


@dataclass(frozen=True)
class Export:
    """What was written, and how its logits compare with the training model's."""

    folder: Path
    architecture: str
    step: int
    n_bytes: int
    comparisons: list[Comparison]


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_bytes: int = 5 * 10**9,
    check_tokens: int = 10_000,
    progress: bool = False,
) -> Export:
    """Write a checkpoint of a run as a Hugging Face folder, compare the logits of both, and publish it if they agree.

    A transformer becomes a stock LlamaForCausalLM and a mamba2 without feed-forward networks a stock
    Mamba2ForCausalLM; everything else comes with modelling files of its own (`trust_remote_code=True`).

    Args:
        run_dir: a run folder.
        out: the folder to make.
        step: of the checkpoint; None for the newest valid one.
        dtype: of the weights; the logits are compared in float32, with rounded weights on both sides.
        shard_bytes: most bytes in a file, if no tensor has more.
        check_tokens: tokens to compare in each form of input; 0 compares nothing.

    Raises:
        ConfigError: no run, no such step, or `out` is taken.
        RunError: no checkpoint verifies (exit 21), the disk refused (40), or the logits differ (1).
    """
    check_free(out)
    config, source = _find(run_dir, step)
    data = source.manifest["data"]
    model, points = build_model(config, data["vocab_size"]).eval(), effective_points(config, source.step)
    load_weights(source, model)
    if dtype == "bf16":
        _round(model)
    family, n_known = family_of(config.model), data["vocab_size"]
    try:
        with publish_folder(out, replace=False) as folder:
            tensors = dict(hf_tensors(model, config.model, family))
            _cut_padding(tensors, n_known)
            if dtype == "bf16":
                tensors = {k: v if k.endswith(FLOAT32) else v.bfloat16() for k, v in tensors.items()}
            save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes, metadata={"format": "pt"})
            _write_records(folder, config, family, points, run_dir / "tokenizer.json", data, dtype)
            for file in folder.glob("*.safetensors"):
                shutil.copymode(folder / "config.json", file)  # the library makes them readable by the owner alone
            comparisons = _compare(model, points, folder, family, check_tokens, config.data.seq_len, progress)
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    except OSError as error:
        raise RunError(
            EXIT_STORAGE, f"--out: cannot write {out} ({error}). Fix: make room, or use another folder"
        ) from error
    return Export(out, ARCHITECTURES[family], source.step, n_bytes, comparisons)


def check_free(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: it is a file, or not empty.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(
            [Problem("--out", "exists and is not an empty folder", out, "choose another --out or empty it")]
        )


def _find(run_dir: Path, step: int | None) -> tuple[Config, Checkpoint]:
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError([Problem("RUN_DIR", "there is no config.yaml in it", run_dir, "give a run folder")])
    config, folder = load(["--config", str(run_dir / "config.yaml")]), run_dir / "checkpoints"
    if step is None:
        found, rejected = checkpoint.newest_valid(folder)
        if found is None:
            why = f"({next(iter(rejected.values()))})" if rejected else "(there is none)"
            raise RunError(
                EXIT_NO_VALID_CHECKPOINT, f"RUN_DIR: no valid checkpoint in {folder} {why}. Fix: train it first"
            )
        return config, found
    path = checkpoint.directory_of(folder, step)
    if not path.is_dir():
        steps = ", ".join(str(int(p.name.rpartition("-")[2])) for p in checkpoint.published(folder)) or "none"
        raise ConfigError([Problem("--step", "no checkpoint of this step", step, f"use one of: {steps}")])
    try:
        return config, checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        raise RunError(EXIT_NO_VALID_CHECKPOINT, f"--step: {error}. Fix: use another step") from error


@torch.no_grad()
def _round(model: Model) -> None:
    """Give every weight that is stored in bf16 the value it will have there."""
    for name, parameter in model.named_parameters():
        if not name.endswith(".offset"):
            parameter.copy_(parameter.bfloat16())


def _cut_padding(tensors: dict[str, Tensor], n_known: int) -> None:
    """Take out the rows that no token has: their logits are -inf in training, which a stock class does not know."""
    for name in ("model.embed_tokens.weight", "backbone.embeddings.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:n_known].clone()


def _write_records(
    folder: Path,
    config: Config,
    family: Family,
    points: Sequence[int | float],
    tokenizer: Path,
    data: dict[str, Any],
    dtype: str,
) -> None:
    """Everything but the weights: configuration, tokenizer, defaults of generation and, if it needs them, the code."""
    eod_id = data["eod_id"]
    described = hf_config(config, family, points, data["vocab_size"], eod_id)
    described.dtype = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    (folder / "config.json").write_text(described.to_json_string(use_diff=False), encoding="utf-8")
    end = load_tokenizer(tokenizer).id_to_token(eod_id)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    reader = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": config.data.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    ends = {"eos_token_id": eod_id, "pad_token_id": eod_id, "transformers_version": transformers_version}
    for name, record in (("tokenizer_config.json", reader), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if family == "transmamba":
        write_code(folder)


def write_code(folder: Path) -> None:
    """Put this package's model files into a folder that transformers reads."""
    for name in CODE:
        text = (Path(hf_model.__path__[0]) / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(f"from {hf_model.__name__}.", "from ."), encoding="utf-8")


def harmless_copy(given: Path, folder: Path) -> bool:
    """Link a model folder's data, and no code of it, into a new one; whether that one holds our code instead.

    A folder may come from anywhere, and transformers runs the files that it names if it is told to trust them.
    """
    folder.mkdir()
    for path in given.iterdir():
        # An adapter names another model, and would change the weights that were asked about.
        is_data = path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja")
        if path.is_file() and is_data and not path.name.startswith("adapter_"):
            (folder / path.name).symlink_to(path.resolve())
    found = [folder / name for name in ("config.json", "tokenizer_config.json") if (folder / name).exists()]
    maps = [json.loads(path.read_bytes()).get("auto_map") for path in found]
    # Names with "--" are other repositories' code, of the tokenizer too.
    is_ours = maps[0] == AUTO_MAP and not any(maps[1:])
    if is_ours:
        write_code(folder)
    return is_ours


def load_exported(folder: Path, family: Family) -> Any:
    """The model of an exported folder in float32, read by transformers; no code that lies in the folder runs.

    Raises:
        RunError: weights are missing or left over (exit 1).
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    reader = TransMambaForCausalLM if family == "transmamba" else AutoModelForCausalLM
    read: Any = reader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    model, info = read
    wrong = {key: sorted(names) for key, names in info.items() if names}
    if wrong:
        raise RunError(EXIT_INTERNAL, f"--out: transformers reads other weights than were written: {wrong}")
    return model.eval()


def _compare(
    model: Model,
    points: Sequence[int | float],
    folder: Path,
    family: Family,
    n_tokens: int,
    seq_len: int,
    progress: bool,
) -> list[Comparison]:
    """Logits of the model in training beside those of the folder.

    Raises:
        RunError: they differ by more than rounding (exit 1).
    """
    if n_tokens == 0:
        return []
    theirs = load_exported(folder, family)
    forms = FORMS[:2] if family == "mamba2" else FORMS  # the stock class knows no documents
    found = list(compare(model, points, theirs, n_tokens=n_tokens, seq_len=seq_len, forms=forms, progress=progress))
    for comparison in found:
        if not comparison.is_equal:
            raise RunError(
                EXIT_INTERNAL,
                f"--out: the exported model computes other logits ({comparison.line()}); nothing was published. "
                "Fix: keep the run folder and report this",
            )
    return found
