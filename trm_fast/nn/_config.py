"""What a ``TinyRecursiveModel`` consists of: the official fields, and the published settings."""

from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch

from trm_fast._fields import check_fields

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class TRMConfig:
    """Settings of the official model, under their official names.

    Args:
        vocab_size: number of token ids.
        seq_len: tokens of a sequence, without the puzzle's positions.
        num_puzzle_identifiers: number of puzzle ids.
        puzzle_emb_ndim: features of a puzzle's vector; None means ``hidden_size``, 0 that there is
            no puzzle embedding.
        puzzle_emb_len: positions in front of the tokens, of which the puzzle's vector fills the
            first ones; 0 means as many as it needs.
        H_cycles: cycles of a supervision step (T), of which the last one carries gradients.
        L_cycles: updates of z in a cycle (n).
        L_layers: blocks of the network.
        hidden_size: features of a token.
        expansion: of the gated layers.
        num_heads: of attention.
        pos_encodings: "rope", "learned" or "none".
        rms_norm_eps: added to the mean square in the norms.
        rope_theta: base of the rotary frequencies.
        halt_max_steps: supervision steps after which a sequence always halts.
        halt_exploration_prob: probability that a sequence has to take some steps in training.
        forward_dtype: dtype of the activations: "bfloat16", "float16", "float32" or "float64".
        mlp_t: whether tokens are mixed by a gated layer, instead of attention.
        no_ACT_continue: whether halting is learned from q_halt alone, without q_continue.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is of another type.
    """

    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int = 1
    puzzle_emb_ndim: int | None = None
    puzzle_emb_len: int = 16
    H_cycles: int = 3
    L_cycles: int = 6
    L_layers: int = 2
    hidden_size: int = 512
    expansion: float = 4.0
    num_heads: int = 8
    pos_encodings: Literal["rope", "learned", "none"] = "rope"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    halt_max_steps: int = 16
    halt_exploration_prob: float = 0.1
    forward_dtype: str = "bfloat16"
    mlp_t: bool = False
    no_ACT_continue: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        whole = ("vocab_size", "seq_len", "num_puzzle_identifiers", "H_cycles", "L_cycles")
        for name in (*whole, "L_layers", "hidden_size", "num_heads", "halt_max_steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        probability = 0 <= self.halt_exploration_prob <= 1
        self._require("halt_exploration_prob", probability, "in [0, 1]")
        self._require("forward_dtype", self.forward_dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        divides = self.mlp_t or self.hidden_size % self.num_heads == 0
        self._require("num_heads", divides, f"a divisor of hidden_size, {self.hidden_size}")
        known = ("rope", "learned", "none")
        self._require("pos_encodings", self.pos_encodings in known, f"one of {', '.join(known)}")
        self._require("puzzle_emb_ndim", self.puzzle_width >= 0, ">= 0")
        needed = -(-self.puzzle_width // self.hidden_size)
        fits = self.puzzle_emb_len == 0 or 0 < needed <= self.puzzle_emb_len
        wanted = f"0 or >= {needed}" if needed else "0, as there is no puzzle embedding"
        self._require("puzzle_emb_len", fits, wanted)

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            got = getattr(self, name)
            raise ValueError(f"TRMConfig: {name} must be {wanted}; got {got!r}")

    @property
    def puzzle_width(self) -> int:
        """Features of a puzzle's vector; 0 if there is none."""
        return self.hidden_size if self.puzzle_emb_ndim is None else self.puzzle_emb_ndim

    @property
    def puzzle_positions(self) -> int:
        """Positions in front of the tokens."""
        return self.puzzle_emb_len or -(-self.puzzle_width // self.hidden_size)

    @property
    def length(self) -> int:
        """All positions of a sequence."""
        return self.seq_len + self.puzzle_positions

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return DTYPES[self.forward_dtype]

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings by name; ``TRMConfig(**settings)`` is the same again."""
        return asdict(self)


# 1,000 puzzles of Sudoku-Extreme and Maze-Hard, and ARC-AGI with a table of all its augmentations.
CONFIGS = {
    "sudoku_mlp": TRMConfig(11, 81, mlp_t=True, pos_encodings="none"),
    "sudoku_attention": TRMConfig(11, 81),
    "maze": TRMConfig(6, 900, L_cycles=4),
    "arc": TRMConfig(12, 900, num_puzzle_identifiers=960_961, L_cycles=4),
}


def config_of(config: TRMConfig | str, overrides: dict[str, Any]) -> TRMConfig:
    """Returns a published config by name, or the one that is given, with some settings replaced.

    Raises:
        ValueError: the name or a setting is unknown.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(_unknown("config", config, tuple(CONFIGS)))
        config = CONFIGS[config]
    known = tuple(field.name for field in fields(TRMConfig))
    for name in overrides:
        if name not in known:
            raise ValueError(_unknown("a setting", name, known))
    return replace(config, **overrides) if overrides else config


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"TinyRecursiveModel: {what} must be one of {', '.join(known)}; got {name!r}{hint}"
