"""loss.png: the training and validation losses of a run."""

from pathlib import Path

from transmamba.metrics import read_metrics


def plot_loss(folder: Path) -> Path | None:
    """Draw loss over tokens from metrics.jsonl into loss.png; None when no step is recorded."""
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    if not records:
        return None
    tokens = [record["tokens"] for record in records]
    losses = [record["loss"] for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9db8d2", linewidth=0.8, label="training, every step")
    axes.plot(tokens, _smooth(losses), color="#1f5a91", linewidth=1.8, label="training, running mean")
    names = sorted({name for record in records for name in record.get("validation", {})})
    for index, name in enumerate(names, start=1):  # C0 is the training curve's blue
        held = [(r["tokens"], r["validation"][name]["loss"]) for r in records if name in r.get("validation", {})]
        axes.plot(*zip(*held, strict=True), "o-", color=f"C{index}", markersize=4, label=name)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    return path


def _smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential mean with the bias of its first values taken out."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
