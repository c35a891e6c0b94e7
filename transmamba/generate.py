"""Completing a prompt: token by token, with the decoding caches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from transmamba.checkpoint import newest_valid
from transmamba.compose import load
from transmamba.config import Config
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.errors import EXIT_NO_VALID_CHECKPOINT, ConfigError, Problem, RunError
from transmamba.model.decode import prefill, step
from transmamba.model.model import Model
from transmamba.resume import load_weights
from transmamba.run import build_model
from transmamba.transpoint import effective_points


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    transpoints: Sequence[int | float],
    *,
    n_tokens: int,
    eod_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, up to `n_tokens` tokens or the end of the document.

    Args:
        temperature: 0 takes the likeliest token every time.
        top_k: draw among the k likeliest only; 0 draws among all.
        seed: of the draws.
    """
    # A document starts after another's end: an empty prompt is the end token alone.
    ids = tokenizer.encode(prompt).ids or [eod_id]
    draw = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    logits_BE, state = prefill(model, torch.tensor([ids], device=device), list(transpoints))
    told = tokenizer.decode(ids)
    for _ in range(n_tokens):
        token = _choose(logits_BE[0], temperature, top_k, draw)
        if token == eod_id:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may need several tokens: wait until the tail is not a replacement mark.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(told) :]
            told = text
        logits_BE = step(model, torch.tensor([token], device=device), state)


def load_run(folder: Path) -> tuple[Model, Tokenizer, Config, int]:
    """The model of a run folder's newest valid checkpoint, or of a model folder of transformers that fits; its
    tokenizer, configuration and end-of-document id.

    Raises:
        ConfigError: no run there, no checkpoint, or a model that is none of ours.
        RunError: there are checkpoints and none of them verifies (exit 21).
    """
    if (folder / "config.json").is_file():
        # transformers is needed for nothing else here.
        from transmamba.checkpoints_tools.hf_import import load_folder

        return load_folder(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError([Problem("RUN_DIR", "there is no config.yaml in it", folder, "give a run folder")])
    config = load(["--config", str(folder / "config.yaml")])
    checkpoint, rejected = newest_valid(folder / "checkpoints")
    if checkpoint is None:
        if rejected:
            why = f"none of its {len(rejected)} checkpoints verifies ({next(iter(rejected.values()))})"
            fix = f"see `transmamba checkpoint verify {folder}`, and restore one from a copy"
            raise RunError(EXIT_NO_VALID_CHECKPOINT, f"RUN_DIR: {why}. Fix: {fix}")
        raise ConfigError([Problem("RUN_DIR", "it has no checkpoint", folder, "train it first")])
    data = checkpoint.manifest["data"]
    model = build_model(config, data["vocab_size"])
    load_weights(checkpoint, model)
    return model.eval(), load_tokenizer(folder / "tokenizer.json"), config, data["eod_id"]


def generate(
    folder: Path, prompts: list[str], *, n_tokens: int, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """Yield pieces of text: every prompt with its continuation, each ended by a newline."""
    model, tokenizer, config, eod_id = load_run(folder)
    points = effective_points(config, step=10**18)
    for number, prompt in enumerate(prompts):
        yield prompt
        yield from complete(
            model,
            tokenizer,
            prompt,
            points,
            n_tokens=n_tokens,
            eod_id=eod_id,
            temperature=temperature,
            top_k=top_k,
            seed=seed + number,
        )
        yield "\n"


def _choose(logits_E: Tensor, temperature: float, top_k: int, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_E.argmax())
    logits_E = logits_E.float().cpu() / temperature
    if top_k:
        least = logits_E.topk(min(top_k, logits_E.numel())).values[-1]
        logits_E = logits_E.masked_fill(logits_E < least, -torch.inf)
    return int(torch.multinomial(logits_E.softmax(-1), 1, generator=draw))
