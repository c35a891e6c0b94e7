"""Inputs that are wrong, as data: row of the list they stand for, sentence, expected key and fix."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.unit.data.corpora import write_sealed
from transmamba.compose import load, to_yaml

NOT_HERE = {
    30: "keys and values have as many heads as queries",
    43: "all indices have 64 bits",
    55: "context parallelism takes packed documents",
    67: "digests of blocks are checked when they are read",
    74: "fields of text files are checked by `transmamba data prepare`",
    77: "a checkpoint of other data ends with exit 23, after validation",
    88: "the checkpoint reader refuses newer manifests",
    89: "a checkpoint of another shape ends with exit 23, after validation",
}


@dataclass(frozen=True)
class Case:
    """One wrong input: `argv` and `environ` may hold {here}, an empty folder, and {data}, a prepared one."""

    row: int
    sentence: str
    argv: str
    key: str
    fix: str
    environ: Mapping[str, str] = field(default_factory=dict)
    setup: Callable[[Path], object] | None = None


def wrote(name: str, text: str) -> Callable[[Path], object]:
    return lambda here: (here / name).write_text(text)


def edited_manifest(change: Callable[[dict], None]) -> Callable[[Path], object]:
    def setup(here: Path) -> None:
        file = here / "data" / "manifest.json"
        record = json.loads(file.read_text())
        change(record)
        write_sealed(here / "data", record)

    return setup


def first_shard(record: dict) -> dict:
    return record["splits"]["train"]["shards"][0]


def broke_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda here: change(next((here / "data").glob("*train*.tar")))


def with_run(*, config: str = "", step: int | None = None, **files: str) -> Callable[[Path], object]:
    def setup(here: Path) -> None:
        run = here / "run"
        run.mkdir()
        if config:
            (run / "config.yaml").write_text(to_yaml(load(config.split())))
        if step is not None:
            (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
            (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
        for name, text in files.items():
            (run / name.replace("__", ".")).write_text(text)

    return setup


def same_content(record: dict) -> None:
    record["splits"]["validation"]["shards"][0]["blocks_sha256"] = first_shard(record)["blocks_sha256"]


HERE = {"host": socket.gethostname(), "pid": os.getppid()}
CASES = [
    Case(1, "config file missing", "--config {here}/exprt.yaml", "--config", "expert.yaml",
         setup=wrote("expert.yaml", "seed: 1")),
    Case(2, "a tab in YAML", "--config {here}/c.yaml", "c.yaml:2:1", "tabs", setup=wrote("c.yaml",
         "train:\n\tsteps: 1\n")),
    Case(2, "an unclosed bracket", "--config {here}/c.yaml", "c.yaml:2:1", "brackets", setup=wrote("c.yaml",
         "seed: [1\n")),
    Case(3, "duplicate key", "--config {here}/c.yaml", "seed:2", "remove one", setup=wrote("c.yaml",
         "seed: 1\nseed: 2\n")),
    Case(4, "Python tag in YAML", "--config {here}/c.yaml", "c.yaml:1", "plain values",
         setup=wrote("c.yaml", "seed: !!python/object/apply:os.getpid []\n")),
    Case(5, "empty file", "--config {here}/c.yaml", "--config", "config.yaml of a run",
         setup=wrote("c.yaml", "# none\n")),
    Case(6, "unknown key", "learning_rate=1e-3", "learning_rate", "did you mean optim.lr"),
    Case(7, "key in the wrong section", "train.weight_decay=0", "train.weight_decay", "optim.weight_decay"),
    Case(8, "missing required key", "transpoint.changes=[{{points:[1]}}]", "transpoint.changes", "step: 100"),
    Case(9, "text where a number belongs", "optim.lr=fast", "optim.lr", "optim.lr=0.003"),
    Case(10, "yes where a boolean belongs", "model.tied=yes", "model.tied", "true or false"),
    Case(10, "a number where a boolean belongs", "model.tied=1", "model.tied", "true or false"),
    Case(10, "off in a file", "--config {here}/c.yaml", "model.tied", "true or false", setup=wrote("c.yaml",
         "model: {tied: off}")),
    Case(10, "a boolean where a number belongs", "zero.stage=true", "zero.stage", "whole number"),
    Case(11, "an octal surprise", "data.seq_len=010", "data.seq_len", "whole number"),
    Case(11, "an octal surprise in a file", "--config {here}/c.yaml", "data.seq_len", "whole number",
         setup=wrote("c.yaml", "data: {seq_len: 010}")),
    Case(11, "a sexagesimal surprise in a file", "--config {here}/c.yaml", "data.seq_len", "whole number",
         setup=wrote("c.yaml", "data: {seq_len: 1:30}")),
    Case(12, "unresolved interpolation", "optim.lr=${{optim.learning}}", "optim.lr", "write the value"),
    Case(13, "interpolation cycle", "optim.lr=${{optim.eps}} optim.eps=${{optim.lr}}", "optim.lr",
         "plain value"),
    Case(14, "unset environment variable", "run.dir=${{oc.env:SLURM_NOT_SET}}", "run.dir", "set it"),
    Case(15, "no equals sign", "optim.lr", "optim.lr", "key=value"),
    Case(15, "an unclosed override", "optim.betas=[0.9", "optim.betas", "key=value"),
    Case(15, "an unknown option", "--lr 3", "--lr", "key=value"),
    Case(16, "one override twice", "optim.lr=1e-3 optim.lr=2e-3", "optim.lr", "keep one"),
    Case(17, "lr of 0", "optim.lr=0", "optim.lr", "above 0"),
    Case(17, "lr NaN", "optim.lr=nan", "optim.lr", "above 0"),
    Case(17, "lr infinite", "optim.lr=inf", "optim.lr", "up to 1"),
    Case(17, "lr above 1", "optim.lr=2", "optim.lr", "up to 1"),
    Case(18, "a beta of 1", "optim.betas=[0.9,1.0]", "optim.betas", "from 0 below 1"),
    Case(18, "three betas", "optim.betas=[0.9,0.9,0.9]", "optim.betas", "2 items"),
    Case(19, "eps of 0", "optim.eps=0", "optim.eps", "1e-08"),
    Case(20, "negative weight decay", "optim.weight_decay=-0.1", "optim.weight_decay", "from 0"),
    Case(21, "clip of 0", "optim.clip=0", "optim.clip", "null"),
    Case(22, "warm-up longer than the run", "train.steps=50 optim.warmup=51", "optim.warmup", "50 or less"),
    Case(23, "unknown schedule", "optim.schedule=linear", "optim.schedule", "cosine, wsd, constant"),
    Case(24, "min_lr above lr", "optim.lr=1e-4 optim.min_lr=1e-3", "optim.min_lr", "0.0001 or less"),
    Case(25, "neither steps nor tokens", "train.steps=null", "train.steps", "train.tokens=50M"),
    Case(26, "steps and tokens disagree", "train.steps=10 train.tokens=50M", "train.steps", "keep one"),
    Case(27, "the run is complete", "run.dir={here}/run train.steps=20", "train.steps", "above 20",
         setup=with_run(step=20, exit__json='{"code": 0}')),
    Case(28, "negative seed", "seed=-1", "seed", "from 0"),
    Case(28, "seed above 2^63", "seed=9223372036854775808", "seed", "below 9223372036854775808"),
    Case(29, "heads do not divide the width", "model.n_heads=7 model.head_dim=null", "model.n_heads",
         "4 or 8"),
    Case(31, "odd head width with rotary positions", "model.head_dim=15", "model.head_dim", "16"),
    Case(32, "head width does not divide the inner width", "model=tiny_mamba2 model.ssm_head_dim=24",
         "model.ssm_head_dim", "16 or 32"),
    Case(33, "groups do not divide the ssm heads", "model=tiny_mamba2 model.ssm_groups=3",
         "model.ssm_groups", "2 or 4"),
    Case(34, "a chunk size, which is fixed", "model.ssm.chunk=100", "model.ssm.chunk",
         "keys here are|did you mean"),
    Case(35, "a state width of 0", "model.ssm_state=0", "model.ssm_state", "from 1"),
    Case(36, "convolution too wide", "model.conv_width=9", "model.conv_width", "model.conv_width=4"),
    Case(37, "dt_min not below dt_max", "model.dt_min=0.1 model.dt_max=0.1", "model.dt_min", "0.001"),
    Case(37, "dt_min of 0", "model.dt_min=0", "model.dt_min", "above 0"),
    Case(38, "unknown letter in the pattern", "model=tiny_hybrid model.pattern=MXM", "model.pattern",
         "A (attention)"),
    Case(38, "pattern longer than the model", "model=tiny_hybrid model.n_layers=4", "model.pattern",
         "4 letters"),
    Case(39, "no layers", "model.n_layers=0", "model.n_layers", "from 1"),
    Case(40, "vocabulary smaller than the tokenizer", "data.path={data} model.vocab_size=100",
         "model.vocab_size", "384"),
    Case(41, "padded vocabulary not divisible by tp", "parallel.tp=3 model.vocab_size=1000 model.n_heads=6 "
         "model.head_dim=16", "model.vocab_size", "1152", {"WORLD_SIZE": "3", "RANK": "0"}),
    Case(42, "sequence above the limit", "data.seq_len=100M", "data.seq_len", "16777216"),
    Case(44, "unknown precision", "precision=fp16", "precision", "fp32, bf16"),
    Case(45, "fp8", "precision=fp8", "precision", "bf16"),
    Case(46, "a loss scale", "train.loss_scale=1024", "train.loss_scale", "remove it|did you mean"),
    Case(47, "degrees do not divide the world", "parallel.tp=4", "parallel", "1, 2, 3, 6",
         {"WORLD_SIZE": "6", "RANK": "0"}),
    Case(48, "tp does not divide the heads", "parallel.tp=3", "parallel.tp", "1, 2, 4, 8",
         {"WORLD_SIZE": "3", "RANK": "0"}),
    Case(48, "tp does not divide the groups", "model=tiny_mamba2 parallel.tp=2", "parallel.tp", "ssm_groups",
         {"WORLD_SIZE": "2", "RANK": "0"}),
    Case(49, "more stages than layers", "parallel.pp=9", "parallel.pp", "1 to 8", {"WORLD_SIZE": "9",
         "RANK": "0"}),
    Case(50, "fewer micro-batches than stages", "parallel.pp=2 train.micro_batch=8", "train.micro_batch", "4",
         {"WORLD_SIZE": "2", "RANK": "0"}),
    Case(51, "batch not divisible", "train.global_batch=12 train.micro_batch=8", "train.global_batch",
         "8 or 16"),
    Case(52, "ZeRO-2 with a pipeline", "parallel.pp=2 zero.stage=2 train.micro_batch=2", "zero.stage",
         "zero.stage=1",
         {"WORLD_SIZE": "2", "RANK": "0"}),
    Case(53, "ZeRO stage 4", "zero.stage=4", "zero.stage", "up to 3"),
    Case(54, "sequence parallel without tp", "parallel.sp=true", "parallel.sp", "tp=2"),
    Case(56, "offload", "zero.offload=true", "zero.offload", "keys here are|did you mean"),
    Case(57, "world size is not a number", "", "WORLD_SIZE", "transmamba launch", {"WORLD_SIZE": "two"}),
    Case(57, "world size missing", "", "WORLD_SIZE", "transmamba launch", {"RANK": "1"}),
    Case(58, "rank outside the world", "", "RANK", "transmamba launch", {"WORLD_SIZE": "2", "RANK": "2"}),
    Case(59, "port out of range", "", "MASTER_PORT", "29500",
         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}),
    Case(59, "port in use", "", "MASTER_PORT", "free port", {"WORLD_SIZE": "2", "RANK": "0",
         "MASTER_PORT": "{port}"}),
    Case(60, "a backend", "parallel.backend=nccl", "parallel.backend", "keys here are|did you mean"),
    Case(61, "data path missing", "data.path={here}/dta", "data.path", "{here}/data"),
    Case(62, "a pattern as data path", "data.path='{here}/*.tar'", "data.path", "data prepare"),
    Case(63, "shards unreadable", "data.path={data}", "data.path", "permissions", setup=lambda here: None),
    Case(64, "shard is not tar", "data.path={data}", "data.path", "again",
         setup=broke_shard(lambda shard: shard.write_bytes(b"x" * shard.stat().st_size))),
    Case(65, "shard truncated", "data.path={data}", "data.path", "again",
         setup=broke_shard(lambda shard: os.truncate(shard, 1000))),
    Case(66, "manifest missing", "data.path={data}", "data.path", "data prepare",
         setup=lambda here: (here / "data" / "manifest.json").unlink()),
    Case(68, "shard listed twice", "data.path={data}", "data.path", "data prepare", setup=edited_manifest(
        lambda record: record["splits"]["train"]["shards"].append(first_shard(record)))),
    Case(69, "training and validation share a shard", "data.path={data}", "data.path", "different text",
         setup=edited_manifest(same_content)),
    Case(69, "a validation set holds a training shard", "data.path={data} validation.sets.held={here}/copy",
         "validation.sets.held", "different text", setup=lambda here: copied_and_swapped(here)),
    Case(70, "fewer windows than a batch", "data.path={data} train.global_batch=100000",
         "train.global_batch", "or less"),
    Case(70, "less than one window", "data.path={data} data.seq_len=1000000", "data.seq_len", "or less"),
    Case(71, "weights all zero", "data.blend={{a:0,b:0}}", "data.blend", "positive"),
    Case(71, "negative weight", "data.blend={{a:1,b:-1}}", "data.blend", "positive"),
    Case(72, "token ids beyond the vocabulary", "data.path={data}", "data.path", "tokenizer",
         setup=edited_manifest(
        lambda record: first_shard(record).update(max_token_id=60000))),
    Case(73, "token type too small", "data.path={data}", "data.path", "data prepare", setup=edited_manifest(
        lambda record: record.update(token_dtype="uint8"))),
    Case(75, "tokenizer missing", "data.path={data}", "data.path", "copy it back",
         setup=lambda here: next((here / "data").glob("tokenizer*.json")).unlink()),
    Case(76, "tokenizer with other content", "data.path={data}", "data.path", "copy it back",
         setup=lambda here: next((here / "data").glob("tokenizer*.json")).write_text('{{"auto_map": {{}}}}')),
    Case(78, "no end-of-document id", "data.path={data}", "data.path", "data prepare", setup=edited_manifest(
        lambda record: record.update(eod_id=-1))),
    Case(79, "run folder is a file", "run.dir={here}/file", "run.dir", "folder", setup=wrote("file", "x")),
    Case(79, "run folder inside a file", "run.dir={here}/file/run", "run.dir", "folder", setup=wrote("file",
         "x")),
    Case(79, "run folder not writable", "run.dir={here}/locked/run", "run.dir", "may write",
         setup=lambda here: (here / "locked").mkdir(mode=0o500)),
    Case(80, "disk too small", "model=1_5b model.vocab_size=100000000 checkpoint.keep=1000", "run.dir",
         "free space"),
    Case(81, "interval of 0", "checkpoint.every=0", "checkpoint.every", "from 1"),
    Case(81, "interval beyond the run", "train.steps=20 checkpoint.every=21", "checkpoint.every", "1 to 20"),
    Case(82, "keep of 1", "checkpoint.keep=1", "checkpoint.keep", "from 2"),
    Case(83, "folder of another configuration", "run.dir={here}/run optim.lr=1e-3", "run.dir",
         "another run.dir",
         setup=with_run(config="optim.lr=2e-3")),
    Case(84, "folder locked by a live job", "run.dir={here}/run", "run.dir", "wait for it",
         setup=with_run(lock__json=json.dumps(HERE))),
    Case(84, "folder locked on another machine", "run.dir={here}/run", "run.dir", "wait for it",
         setup=with_run(lock__json=json.dumps({"host": "elsewhere", "pid": 1}))),
    Case(85, "must continue without a checkpoint", "resume=must run.dir={here}/run", "resume.mode", "auto"),
    Case(85, "must continue without a folder", "resume=must", "resume.mode", "run.dir=PATH"),
    Case(86, "never with a checkpoint", "resume=never run.dir={here}/run", "resume.mode", "new run.dir",
         setup=with_run(step=5)),
    Case(87, "checkpoints of a foreign format", "run.dir={here}/run", "run.dir", "new run.dir",
         setup=with_run(model__pt="x")),
    Case(90, "wandb online without a key", "wandb.mode=online", "wandb.mode", "wandb.mode=offline"),
    Case(91, "a credential as value", "wandb.project=hf_abcdefghijklmnopqrstuvwxyz", "wandb.project",
         "environment variable"),
    Case(92, "a negative interval", "validation.every=-1", "validation.every", "from 0"),
    Case(93, "_target_ on the command line", "optim={{_target_:os.system}}", "optim", "remove it"),
    Case(93, "_target_ in a file", "--config {here}/c.yaml", "optim._target_", "keys here are|did you mean",
         setup=wrote("c.yaml", "optim: {_target_: os.system}")),
    Case(94, "a path that leaves its folder", "data.path=../../etc", "data.path", "plain path"),
    Case(94, "a path that is too long", "run.dir=" + "x" * 5000, "run.dir", "text"),
    Case(95, "torch too old", "", "torch", "pip install"),
    Case(96, "a watchdog limit", "watchdog.limit_s=-1", "watchdog.limit_s", "above 0"),
    Case(51, "more ranks than rows", "train.micro_batch=1", "train.global_batch", "use 16",
         {"WORLD_SIZE": "16", "RANK": "0"}),
    Case(48, "tp does not divide the ffn", "parallel.tp=2 model.d_ff=351", "model.d_ff", "350 or 352",
         {"WORLD_SIZE": "2", "RANK": "0"}),
    Case(50, "vpp without pp", "parallel.vpp=2", "parallel.vpp", "pp=2"),
    Case(50, "micro-batches that vpp cannot use",
         "parallel.pp=2 parallel.vpp=2 train.global_batch=3 train.micro_batch=1",
         "train.micro_batch", "multiple of 2", {"WORLD_SIZE": "2", "RANK": "0"}),
    Case(48, "cp does not divide the heads of mamba2", "model=tiny_mamba2 parallel.cp=32 model.ssm_head_dim=32",
         "parallel.cp", "smaller", {"WORLD_SIZE": "32", "RANK": "0"}),
    Case(44, "ZeRO-0 in bf16", "zero.stage=0 precision=bf16", "zero.stage", "zero.stage=1"),
]  # fmt: skip


def copied_and_swapped(here: Path) -> None:
    shutil.copytree(here / "data", here / "copy")
    first = json.loads((here / "data" / "manifest.json").read_text())
    file = here / "copy" / "manifest.json"
    record = json.loads(file.read_text())
    record["splits"]["validation"]["shards"][0]["blocks_sha256"] = first_shard(first)["blocks_sha256"]
    write_sealed(here / "copy", record)


def with_other(change: Callable[[dict], object] = lambda record: None) -> Callable[[Path], object]:
    """A second source {here}/other: other shards, as far as its manifest tells, and one more change."""

    def setup(here: Path) -> None:
        shutil.copytree(here / "data", here / "other")
        record = json.loads((here / "other" / "manifest.json").read_text())
        for split in record["splits"].values():
            for shard in split["shards"]:
                shard["blocks_sha256"] = shard["blocks_sha256"][::-1]
        change(record)
        write_sealed(here / "other", record)

    return setup


def other_tokenizer(here: Path) -> None:
    with_other(lambda record: record.update(tokenizer_sha256=hashlib.sha256(b"{}").hexdigest()))(here)
    (here / "other" / "tokenizer.json").write_text("{}")


def crossed(here: Path) -> None:
    first = first_shard(json.loads((here / "data" / "manifest.json").read_text()))["blocks_sha256"]
    with_other(lambda record: record["splits"]["validation"]["shards"][0].update(blocks_sha256=first))(here)


TWO = "data.sources.a={data} data.sources.b={here}/other"
BOTH = f"{TWO} data.blend={{{{a:1,b:1}}}}"
CASES += [
    Case(61, "a source is missing", "data.sources.a={here}/dta", "data.sources.a", "{here}/data"),
    Case(68, "one folder under two names", "data.sources.a={data} data.sources.b={data} data.blend={{a:1,b:1}}",
         "data.sources.b", "sum of the weights"),
    Case(69, "a source validates on another's training shard", BOTH, "data.sources.b", "different text",
         setup=crossed),
    Case(69, "a set named as a source", "data.sources.a={data} validation.sets.a={data}", "validation.sets.a",
         "another name"),
    Case(69, "a set named as that of the path", "data.path={data} validation.sets.validation={data}",
         "validation.sets.validation", "another name"),
    Case(70, "a source shorter than a window", "data.sources.a={data} data.seq_len=1000000", "data.seq_len",
         "or less"),
    Case(71, "a path beside sources", "data.path={data} data.sources.a={data}", "data.sources", "data.path=null"),
    Case(71, "two sources without weights", TWO, "data.blend", "data.blend={{a: 1, b: 1}}", setup=with_other()),
    Case(71, "weights without sources", "data.path={data} data.blend={{a:1}}", "data.blend", "data.sources"),
    Case(71, "a weight too few", f"{TWO} data.blend={{{{a:1}}}}", "data.blend", "one weight per source",
         setup=with_other()),
    Case(71, "a weight too many", f"{TWO} data.blend={{{{a:1,b:1,c:1}}}}", "data.blend", "use a, b",
         setup=with_other()),
    Case(71, "weights with too many digits", f"{TWO} data.blend={{{{a:0.3333333,b:0.6666667}}}}", "data.blend",
         "fewer digits", setup=with_other()),
    Case(71, "a weight that is no number", f"{TWO} data.blend={{{{a:nan,b:1}}}}", "data.blend", "a mapping",
         setup=with_other()),
    Case(71, "a source that is never read", f"{TWO} data.blend={{{{a:1,b:0}}}}", "data.blend", "data.stages",
         setup=with_other()),
    Case(71, "stages out of order", f"{BOTH} data.stages=[{{{{step:9,blend:{{{{a:1}}}}}}}},"
         "{{step:9,blend:{{b:1}}}}]", "data.stages", "later from stage to stage", setup=with_other()),
    Case(71, "a stage beyond the run", f"{BOTH} train.steps=20 data.skip=['2:5'] "
         "data.stages=[{{step:23,blend:{{a:1}}}}]", "data.stages", "below 23", setup=with_other()),
    Case(71, "skips that overlap", "data.skip=['10:20','30:40','15:25']", "data.skip", '"10:25" in their place'),
    Case(71, "a skip inside another", "data.skip=['10:20','12:14']", "data.skip", '"10:20" in their place'),
    Case(71, "a skip that ends before it begins", "data.skip=['20:10']", "data.skip", "first below last"),
    Case(71, "a stage with an unknown source", f"{BOTH} data.stages=[{{{{step:9,blend:{{{{c:1}}}}}}}}]",
         "data.stages", "use a, b", setup=with_other()),
    Case(72, "sources of two tokenizers", BOTH, "data.sources.b", "--tokenizer", setup=other_tokenizer),
    Case(94, "a source that leaves its folder", "data.sources.a=x/../../y", "data.sources.a", "plain path"),
    Case(94, "a name with a slash", "data.sources={{a/b:x}}", "data.sources", "letters, digits"),
]  # fmt: skip
