"""How the scores of the classifier are shown, and what is shown after a run."""

from trm_fast.recipes.epoch_report import Scores, best_model_of
from trm_fast.recipes.recipe import how_it_ended
from trm_fast.train import Summary, Trainer


def scores_text(scores: Scores) -> str:
    """Returns loss and accuracies, which are in percent."""
    text = f"loss {scores['loss']:.3f}, accuracy {scores['accuracy']:.1f} %"
    if "top3_accuracy" in scores:
        text += f", top-3 {scores['top3_accuracy']:.1f} %"
    return text


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    lines = how_it_ended(summary)
    best = best_model_of(trainer)
    if best is not None:
        lines.append(f"best model: {best}")
    return lines
