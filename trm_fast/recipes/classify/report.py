"""How the scores of the classifier are shown, and what is shown after a run."""

from trm_fast.recipes.epoch_report import Scores
from trm_fast.recipes.facade import EpochTrainer
from trm_fast.train import Summary, Trainer


def scores_text(scores: Scores) -> str:
    """Returns loss and accuracies, which are in percent."""
    text = f"loss {scores['loss']:.3f}, accuracy {scores['accuracy']:.1f} %"
    if "top3_accuracy" in scores:
        text += f", top-3 {scores['top3_accuracy']:.1f} %"
    return text


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    lines = [f"{summary.reason}: step {summary.step:,}, {summary.seconds:.1f} s"]
    if summary.skipped:
        lines.append(f"{summary.skipped} steps were skipped: see events.jsonl")
    if trainer.out is not None and summary.best:
        lines.append(f"best model: {trainer.out / EpochTrainer.best_file}")
    return lines
