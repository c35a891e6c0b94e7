"""Generation with an exported folder: caches, beams, batches with padding, a process that knows nothing of ours."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.model.hf_runs import KINDS, N_TOKENS, SEQ_LEN, STOCK, Exported, Points, ids_of, make_run
from transmamba.checkpoints_tools.hf_export import export
from transmamba.compose import load
from transmamba.kernels.documents import Documents
from transmamba.model.decode import prefill, step
from transmamba.model.model import Model
from transmamba.transpoint import effective_points

OWN = [kind for kind in KINDS if kind not in STOCK]
own_class = pytest.mark.parametrize("exported", OWN, indirect=True)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Made at first use, by kind."""
    return {}


@pytest.fixture(params=list(KINDS))
def exported(
    request: pytest.FixtureRequest, exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    kind = request.param
    if kind not in exports:
        exports[kind] = Exported(tmp_path_factory.mktemp(kind), kind)
    return exports[kind]


# In a process that cannot import transmamba: load by the folder alone, run, and generate in batches.
STRANGER = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transmamba":
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
out, seen = sys.argv[1], {}
for folder in sys.argv[2:]:
    trust = not folder.endswith("stock")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).vocab_size == model.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("The yield statement").input_ids) == "The yield statement"
    batch = tokenizer(["The yield statement", "A", "def f(x): return x + 1"], return_tensors="pt", padding=True)
    assert batch.attention_mask[1, 0] == 0 and batch.attention_mask[1, -1] == 1
    with torch.no_grad():
        seen[folder + "/logits"] = model(**batch).logits
    seen[folder + "/ids"], seen[folder + "/mask"] = batch.input_ids, batch.attention_mask
    seen[folder + "/greedy"] = model.generate(**batch, max_new_tokens=66, do_sample=False, min_new_tokens=66)
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=8, do_sample=True, top_k=20)
    assert sampled.shape[1] <= batch.input_ids.shape[1] + 8
save_file(seen, out)
"""


def test_a_process_without_our_package_loads_and_generates_in_batches(tmp_path: Path) -> None:
    kinds = ["transmamba", "hybrid", "transformer", "mamba2_stock"]
    made: dict[str, tuple[Path, Model, Points]] = {}
    for kind in kinds:
        run, folder = tmp_path / kind, tmp_path / f"{kind}-{'stock' if kind in STOCK else 'own'}"
        model = make_run(run, kind)
        export(run, folder, check_tokens=0)
        made[kind] = folder, model, effective_points(load(["--config", str(run / "config.yaml")]), 3)
    seen_file = tmp_path / "seen.safetensors"
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", STRANGER, str(seen_file), *(str(folder) for folder, *_ in made.values())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = load_file(seen_file)
    for folder, model, points in made.values():
        ids, mask, logits = (seen[f"{folder}/{name}"] for name in ("ids", "mask", "logits"))
        for row in range(len(ids)):
            own = ids[row][mask[row].bool()][None]
            expected = model.predict(own, points, Documents.whole(1, own.shape[1]))[:, 0, :N_TOKENS]
            assert (logits[row][mask[row].bool()] - expected).abs().max() <= 2e-5
            assert seen[f"{folder}/greedy"][row, ids.shape[1] :].tolist() == greedily(model, points, own, 66)


def greedily(model: Model, points: Points, ids_1T: Tensor, count: int) -> list[int]:
    """Our own decoding; the end of the document is no choice, as `min_new_tokens` makes it none."""
    logits_1E, state = prefill(model, ids_1T, points)
    found: list[int] = []
    while len(found) < count:
        logits_1E[:, 0] = -math.inf
        found.append(int(logits_1E.argmax()))
        logits_1E = step(model, torch.tensor(found[-1:]), state)
    return found


@own_class
@pytest.mark.parametrize("chunks", [[96], [1] * 96, [8, 1, 1, 50, 1, 1, 1, 33], [69, 1, 1, 25]])
def test_cached_equals_uncached_across_every_transpoint(exported: Exported, chunks: list[int]) -> None:
    model, ids = exported.theirs().double(), ids_of(3, SEQ_LEN)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :40] = 0, 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        cache: Any = None
        at, parts = 0, []
        for n in chunks:
            step_ids, step_mask = ids[:, at : at + n], mask[:, : at + n]
            done = model(step_ids, attention_mask=step_mask, past_key_values=cache, use_cache=True)
            cache, at = done.past_key_values, at + n
            parts.append(done.logits)
    difference = (torch.cat(parts, dim=1) - expected)[mask.bool()].abs().max()
    assert difference <= 1e-10
    # The third row has 40 pads: what is before its TransPoint must still be there.
    kept = [memory.get_seq_length() for memory in cache.layers]
    assert kept == [SEQ_LEN if point > SEQ_LEN - 40 else 0 for point in exported.points]


@own_class
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_generation_is_the_same_without_a_cache(exported: Exported, options: dict[str, Any]) -> None:
    model, ids = exported.theirs().double(), ids_of(2, 62)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        given = {"do_sample": False, **options}
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=16, use_cache=use_cache, **given))
    assert torch.equal(*found)


@own_class
def test_beams_take_their_memory_along(exported: Exported) -> None:
    model, ids, order = exported.theirs().double(), ids_of(3, 24), torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        cache.reorder_cache(order)
        rest = model(ids[order, 20:], past_key_values=cache).logits
        expected = model(ids[order], use_cache=False).logits[:, 20:]
    assert (rest - expected).abs().max() <= 1e-10


def test_keys_and_values_are_dropped_at_the_transpoint(exports: dict[str, Exported], tmp_path: Path) -> None:
    found = exports.get("transmamba") or Exported(tmp_path, "transmamba")
    model, cache, held = found.theirs(), None, []
    for n in (7, 1, 1, 1, 59, 1):
        cache = model(ids_of(2, n), past_key_values=cache, use_cache=True).past_key_values
        held.append([memory.get_seq_length() for memory in cache.layers])
    assert held == [[0, n if n < 9 else 0, n if n < 70 else 0, n] for n in (7, 8, 9, 10, 69, 70)]
    assert cache.get_seq_length() == 70 and all(memory.tail_BKC is not None for memory in cache.layers)
