"""Optimizers that take the place of those in torch.optim."""

from trm_fast.optim.grokfast_adamw import GrokFastAdamW
from trm_fast.optim.interop import from_lucidrains, load_official_ema

__all__ = ["GrokFastAdamW", "from_lucidrains", "load_official_ema"]
