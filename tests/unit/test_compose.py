"""From arguments to a configuration: what is read, in which order, and what never is."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transmamba.compose import load, to_yaml
from transmamba.config import Config
from transmamba.errors import MAX_LINES, ConfigError, Problem
from transmamba.overrides import groups


def refused(*argv: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        load(list(argv))
    return {problem.key: problem for problem in error.value.problems}


def write(folder: Path, text: str) -> list[str]:
    (folder / "c.yaml").write_text(text)
    return ["--config", str(folder / "c.yaml")]


def test_the_default_run_is_the_tiny_model_with_the_scaled_paper_schedule() -> None:
    config = load([])
    assert (config.model.n_layers, config.model.n_heads, config.model.d_model) == (8, 8, 128)
    assert (config.transpoint.schedule, config.data.seq_len, config.train.global_batch) == ("cycle", 256, 8)
    assert (config.train.steps, config.optim.lr, config.resume.mode) == (90, 6e-3, "auto")


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in groups().items() for name in names])
def test_every_preset_composes(group: str, name: str) -> None:
    extra = ["transpoint.points=[0]"] if name == "explicit" else []
    config = load([f"{group}={name}", *extra])
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("size", ["tiny", "small", "400m", "1_5b"])
@pytest.mark.parametrize("kind", ["transformer", "mamba2", "hybrid"])
def test_presets_of_one_size_have_equal_parameters(size: str, kind: str) -> None:
    from transmamba.plan import make_plan

    ours, other = (make_plan(load([f"model={name}"])) for name in (size, f"{size}_{kind}"))
    without_embeddings = [plan.parameters - plan.embedding_parameters for plan in (ours, other)]
    assert without_embeddings[1] == pytest.approx(without_embeddings[0], rel=0.01)


def test_a_file_applies_before_the_overrides_and_a_chosen_group_replaces_its_section(tmp_path: Path) -> None:
    argv = write(tmp_path, "optim: {lr: 1e-4, eps: 1.0e-7}\nmodel: {n_layers: 3, d_ff: 1}\ntranspoint: v3\n")
    config = load([*argv, "optim.lr=2e-4", "model=small"])
    assert (config.optim.lr, config.optim.eps) == (2e-4, 1e-7)
    assert (config.model.n_layers, config.model.d_ff) == (8, 1024)
    assert config.transpoint.schedule == "v3"
    assert load(argv).model.n_layers == 3


def test_a_stored_configuration_reads_back_equal(tmp_path: Path) -> None:
    awkward = "${x} \\${y} 010 'a' \"b\" #: yes\n\té"
    config = load(["transpoint.points=[0,0.5,inf,12]", "train.tokens=50M", "optim.eps=1e-20"])
    config.sample.prompt = awkward
    config.validation.sets = {"010": "1:30", "yes": "1e5", "null": "~", "a-b": "${oc.env:PATH}"}
    assert load(write(tmp_path, to_yaml(config))) == config


def test_defaults_that_nobody_gave_still_fit_themselves_where_they_are_left_open(tmp_path: Path) -> None:
    first = load(["train.steps=90", "checkpoint.every=30"])
    assert (first.optim.warmup, first.train.micro_batch, first.checkpoint.every) == (9, 8, 30)
    argv = write(tmp_path, to_yaml(first, leave_open=True))
    assert load(argv) == first
    again = load([*argv, "train.steps=1000", "optim.lr=1e-3"], world_size=4)
    assert (again.optim.warmup, again.optim.min_lr, again.train.micro_batch) == (20, 1e-4, 2)
    assert again.checkpoint.every == 30
    begun = load([*write(tmp_path, to_yaml(first)), "train.steps=1000"])
    assert (begun.optim.warmup, begun.train.micro_batch) == (9, 8)


def test_keys_can_be_added_removed_and_given_as_sections() -> None:
    config = load(["+optim.eps=1e-9", "++optim.z_loss=0.1", "~optim.clip", "model={n_layers:2,d_ff:64}"])
    assert (config.optim.eps, config.optim.z_loss, config.optim.clip) == (1e-9, 0.1, 1.0)
    assert (config.model.n_layers, config.model.d_ff) == (2, 64)
    assert load(["validation.sets.wiki=/data/wiki"]).validation.sets == {"wiki": "/data/wiki"}


def test_human_sizes_are_read_where_they_make_sense() -> None:
    config = load(["train.tokens=50M", "data.seq_len=2k", "watchdog.limit_s=2h"])
    assert (config.train.tokens, config.data.seq_len, config.watchdog.limit_s) == (50_000_000, 2000, 7200.0)
    assert config.train.steps is None
    assert "model.n_layers" in refused("model.n_layers=2k")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("learning_rate=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("steps=1", "train.steps"),
        ("optim.weight_decya=1", "optim.weight_decay"),
        ("model.nlayers=1", "model.n_layers"),
        ("max_grad_norm=1", "optim.clip"),
        ("model=tinny", "tiny"),
        ("transpoint=uniferm", "uniform"),
        ("modle=tiny", "did you mean model"),
        ("transpiont=v1", "did you mean transpoint"),
        ("transpoint=v10", "choose v1, attention_only, cycle,"),
    ],
)
def test_a_wrong_name_suggests_the_right_one(argv: str, name: str) -> None:
    (problem,) = refused(argv).values()
    assert name in problem.fix


@pytest.mark.parametrize(
    "argument",
    [
        "hydra.run.dir=/tmp/x",
        "hydra/launcher=submitit_slurm",
        "hydra.searchpath=[pkg://os]",
        "+hydra.callbacks.x._target_=os.system",
        "optim={_target_: os.system}",
        "model._target_=subprocess.Popen",
        "validation.sets={_target_: builtins.eval}",
        "sample.prompt=_target_",
        "run.dir=${oc.env:PATH}",
        "run.dir=${oc.env:WANDB_API_KEY,none}",
        "run.dir=${oc.decode:x}",
        "run.dir=${hydra:runtime.cwd}",
        "run.dir=${oc.env:${run.dir}}",
        "run.dir=${eval:1}",
        "optim.lr=1e-3,2e-3",
        "optim.lr=choice(1,2)",
        "run.dir=glob(*)",
    ],
)
def test_nothing_that_runs_code_or_reads_the_environment_gets_in(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "canary-value")
    with pytest.raises(ConfigError) as error:
        load([argument])
    assert "canary" not in str(error.value)
    assert os.environ["PATH"] not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_listed_environment_variables_and_other_keys_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load(["run.dir=${oc.env:SCRATCH}/${oc.env:SLURM_JOB_ID}", "optim.eps=${optim.min_lr}"])
    assert (config.run.dir, config.optim.eps) == ("/scratch/me/77", 3e-4)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a" * 30,
        "ghp_" + "a" * 30,
        "sk-" + "a" * 30,
        "AKIA" + "A" * 16,
        "https://me:hunter2pass@host/x",
        "a1b2c3d4e5" * 4,
        "Bearer abcdefghijklmnopqrst",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_credential_is_refused_and_never_printed(secret: str) -> None:
    for argv in ([f"wandb.group='{secret}'"], [f"foo.bar='{secret}'"], [f"data.skip=['{secret}']"]):
        with pytest.raises(ConfigError) as error:
            load(argv)
        assert secret not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(["wandb.api_key=swordfish"])
    assert "swordfish" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "!!python/name:os.system x\n",
        "a: !!binary aGk=\n",
        "? [1]\n: 2\n",
        "- 1\n- 2\n",
        "just words",
        "a: 1\n---\nb: 2\n",
        "{" * 5000,
        "[" * 100_000,
        "\x00",
        "a: '\x07\n",
        "optim: [1]\n",
        "model: {n_layers: {x: 1}}\n",
        "#" * 2_000_000,
    ],
    ids=range(14),
)
def test_a_file_of_anything_else_than_plain_values_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, text))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    assert list(refused("--config", str(tmp_path / "c.yaml"))) == [str(tmp_path / "c.yaml")]
    assert "--config" in refused("--config", str(tmp_path))


def test_only_a_file_of_a_like_name_is_offered(tmp_path: Path) -> None:
    for name in (".pre-commit-config.yaml", "expert.yaml", "mkdocs.yml"):
        (tmp_path / name).touch()
    fixes = {name: refused("--config", str(tmp_path / name))["--config"].fix for name in ("nope.yaml", "exprt.yaml")}
    assert fixes == {"nope.yaml": "give the path of a YAML file", "exprt.yaml": "did you mean expert.yaml"}
    assert refused("--config", str(tmp_path / "mkdocs.yaml"))["--config"].fix == "did you mean mkdocs.yml"


def test_lines_stay_short_and_printable() -> None:
    lines = ConfigError([Problem("k", "bad", "x\x1b[31m\n" * 200, "fix it")] * 50).lines()
    assert len(lines) == MAX_LINES
    assert all(len(line) < 200 and line.isprintable() for line in lines)
    assert "null" in Problem("k", "missing", None, "give it").line()


def test_infinity_is_a_transpoint_and_nothing_else() -> None:
    assert load(["transpoint.points=[0,inf,.inf]"]).transpoint.points == [0, math.inf, math.inf]
    assert "optim.clip" in refused("optim.clip=inf")
    assert "transpoint.points" in refused("transpoint.points=[nan]")
    assert "transpoint.points" in refused("transpoint.points=[-inf]")


def test_composing_works_from_any_folder_and_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, os; from transmamba.compose import load; from transmamba.validate import validate;"
        "from transmamba.plan import make_plan; c = load(['model=small']); validate(c, {}); make_plan(c);"
        "assert 'torch' not in sys.modules; assert not os.listdir('.')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
