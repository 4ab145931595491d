"""``TinyRecursiveModel``: the official model for puzzles, with its carry, halting and loss."""

from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from trm_fast.losses.halting import HaltingLoss, halting_loss
from trm_fast.nn import _official
from trm_fast.nn._config import TRMConfig, config_of
from trm_fast.nn._init import truncated_normal_, weight
from trm_fast.nn.block import Blocks
from trm_fast.nn.carry import Batch, Carry, Outputs, refill
from trm_fast.nn.embeddings import LearnedPositions, SparsePuzzleEmbedding, TokenEmbedding
from trm_fast.nn.evaluating import evaluating
from trm_fast.nn.halting import QTokenHalt
from trm_fast.nn.prediction import Prediction, States, evaluate, predict
from trm_fast.nn.recursion import Recursion
from trm_fast.ops._autocast import activation


class TinyRecursiveModel(nn.Module):
    """The tiny recursive model of official TRM. One call is one supervision step:

        x = sqrt(D) [puzzle vector; token vectors]
        y, z = Recursion(Blocks)(x, y, z)            T = H_cycles, n = L_cycles
        logits = lm_head y,   q = q_head y[0]

    and then the carry is cut from the graph, and each sequence halts or goes on. Parameters are
    float32; activations are ``config.forward_dtype``, or the dtype of autocast where that is on.

    Source: Jolicoeur-Martineau 2025, arXiv:2510.04871; SamsungSAILMontreal/TinyRecursiveModels at
    e7b6871. Declared differences: q_head is computed in float32 from the activations, and gradients
    of equal tokens are added up in float32.

    Args:
        config: "sudoku_mlp", "sudoku_attention", "maze", "arc", or a ``TRMConfig``.
        **overrides: settings of ``TRMConfig`` that replace those of ``config``. For "arc",
            ``num_puzzle_identifiers`` is that of your data; the default is a table of 2 GB.

    Raises:
        ValueError: a name is unknown or a setting out of range.

    Example:
        >>> model = trm_fast.TinyRecursiveModel("sudoku_mlp")
        >>> carry = model.initial_carry(batch)
        >>> for batch in batches:
        ...     carry, outputs = model(carry, batch)
        ...     model.loss(carry, outputs).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    y_init: Tensor
    z_init: Tensor

    def __init__(self, config: TRMConfig | str, **overrides: Any) -> None:
        super().__init__()
        self.config = config = config_of(config, overrides)
        width = config.hidden_size
        self.tokens = TokenEmbedding(config.vocab_size, width)
        self.puzzles: SparsePuzzleEmbedding | None = None
        if config.puzzle_width:
            self.puzzles = SparsePuzzleEmbedding(config.num_puzzle_identifiers, config.puzzle_width)
        self.positions: LearnedPositions | None = None
        if config.pos_encodings == "learned":
            self.positions = LearnedPositions(config.length, width)
        blocks = Blocks(
            width,
            config.L_layers,
            expansion=config.expansion,
            eps=config.rms_norm_eps,
            **_mixer_options(config),
        )
        self.recursion = Recursion(blocks, config.L_cycles, config.H_cycles)
        self.lm_head = weight(config.vocab_size, width)
        self.q_head = QTokenHalt(width)
        for name in ("y_init", "z_init"):
            self.register_buffer(name, torch.empty(width, dtype=config.dtype))
            start = torch.empty(width)
            truncated_normal_(start, 1.0)
            getattr(self, name).copy_(start)

    def initial_carry(self, batch: Batch) -> Carry:
        """Returns a carry whose slots all take their sequence from the first batch.

        Args:
            batch: "inputs" and "labels" [batch, seq_len], "puzzle_identifiers" [batch], whole
                numbers; only its shapes, dtypes and device count. Further tensors, batch first, go
                along; labels may be missing where no loss is asked for.

        Raises:
            ValueError: a tensor is missing or of the wrong shape.
        """
        inputs = self._check(batch)
        size = (inputs.shape[0], self.config.length, self.config.hidden_size)
        if self.puzzles is not None and self.training:
            self.puzzles.prepare(inputs.shape[0])
        # Contiguous as those of later steps, so that these need no graph of their own.
        return Carry(
            activation(self.y_init).expand(size).contiguous(),
            activation(self.z_init).expand(size).contiguous(),
            torch.zeros(size[0], dtype=torch.int32, device=inputs.device),
            torch.ones(size[0], dtype=torch.bool, device=inputs.device),
            {key: torch.zeros_like(value) for key, value in batch.items()},
        )

    def forward(
        self, carry: Carry, batch: Batch, *, generator: torch.Generator | None = None
    ) -> tuple[Carry, Outputs]:
        """Takes one supervision step; nothing waits for a GPU.

        Slots that have halted start with their row of the batch; rows for the others are dropped.
        A sequence halts after ``halt_max_steps`` steps. In training it also halts where q_halt > 0
        (q_halt > q_continue, if that is trained), but with probability ``halt_exploration_prob``
        only after a random number of steps from 2 to ``halt_max_steps``.

        Args:
            carry: from ``initial_carry`` or the last step.
            batch: as for ``initial_carry``.
            generator: of the random numbers, on the device of the model; None takes torch's own.

        Returns:
            The next carry, whose ``data`` is what the step worked on, and the outputs.

        Raises:
            ValueError: the batch does not fit the carry, or, on the CPU, an id is out of range.
        """
        carry = refill(carry, batch, self.y_init, self.z_init)
        y, z, outputs = self.step(carry.y, carry.z, carry.data)
        steps = carry.steps + 1
        halted = self._halted(steps, outputs, generator)
        if self.training and not self.config.no_ACT_continue:
            target = self.target_continue(y, z, steps, carry.data)
            outputs = outputs._replace(target_continue=target)
        return Carry(y, z, steps, halted, carry.data), outputs

    def step(self, y: Tensor, z: Tensor, data: Batch) -> tuple[Tensor, Tensor, Outputs]:
        """Runs the recursion and the heads, without any halting.

        Args:
            y, z: states, [batch, length, width].
            data: "inputs" and "puzzle_identifiers".

        Returns:
            y and z, without gradient, and the outputs.
        """
        y, z = self.recursion(self._embedded(data), y, z)
        logits = linear(y, self.lm_head.to(y.dtype))[:, self.config.puzzle_positions :]
        q_halt, q_continue = self.q_head(y).unbind(-1)
        return y.detach(), z.detach(), Outputs(logits, q_halt, q_continue)

    def loss(self, carry: Carry, outputs: Outputs, **options: Any) -> HaltingLoss:
        """Returns loss and metrics of a step.

        Args:
            carry: as the step returned it, like ``outputs``.
            outputs: of the step.
            **options: of ``trm_fast.losses.halting_loss``, as ``divisor``.
        """
        trained = outputs.target_continue is not None
        return halting_loss(
            outputs.logits,
            carry.data["labels"],
            outputs.q_halt,
            outputs.q_continue if trained else None,
            outputs.target_continue,
            halted=carry.halted,
            steps=carry.steps,
            **options,
        )

    def predict(
        self,
        inputs: Tensor,
        puzzle_ids: Tensor | None = None,
        max_steps: int | None = None,
        early_halt: bool = True,
    ) -> Prediction:
        """Returns the answers to some puzzles, in evaluation mode and without gradients.

        A sequence that wants to halt is finished, and leaves the batch, so that later steps cost
        only what is left; its answer is that of a computation of the whole batch.

        Args:
            inputs: [batch, seq_len], int64 or int32.
            puzzle_ids: [batch], likewise; None takes 0, which in official data is no puzzle.
            max_steps: supervision steps at most, >= 1; None means ``halt_max_steps``.
            early_halt: whether sequences halt before that.

        Returns:
            A ``Prediction``.

        Raises:
            ValueError: a shape or number is wrong, or, on the CPU, an id is out of range.
        """
        most = self.config.halt_max_steps if max_steps is None else max_steps
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(
                "TinyRecursiveModel.predict: max_steps must be a whole number >= 1; got "
                f"{max_steps!r}"
            )
        if puzzle_ids is None:
            puzzle_ids = inputs.new_zeros(inputs.shape[0])
        data = {"inputs": inputs, "puzzle_identifiers": puzzle_ids}
        with evaluating(self):
            return predict(
                self._start,
                self._step,
                self.wants_halt,
                data,
                max_steps=most,
                early_halt=early_halt,
            )

    def _start(self, data: Batch) -> States:
        carry = self.initial_carry(data)
        return carry.y, carry.z

    def _step(self, states: States, data: Batch) -> tuple[States, Outputs]:
        y, z = states
        y, z, outputs = self.step(y, z, data)
        return (y, z), outputs

    def evaluate(self, batches: Iterable[Batch], **options: Any) -> dict[str, float]:
        """Returns the means of the official evaluation: each batch starts anew, takes
        ``halt_max_steps`` steps, none halts earlier, and the last step counts.

        Args:
            batches: as for ``initial_carry``. Sequences without any valid label are not counted.
            **options: of ``trm_fast.losses.halting_loss``, but for ``divisor``.

        Returns:
            "count", the number of sequences, and means over them: "accuracy", "exact_accuracy",
            "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss", "q_continue_loss".
        """
        loss = partial(self.loss, divisor=1, **options)
        with evaluating(self):
            return evaluate(self.initial_carry, self, loss, batches, self.config.halt_max_steps)

    def load_official(
        self,
        source: str | PathLike[str] | Mapping[str, Tensor],
        *,
        mean_puzzle_row: bool = False,
    ) -> None:
        """Loads a checkpoint of the official code; nothing is changed if it does not fit.

        Args:
            source: a file of ``torch.save``, or its state dict, with or without the prefixes
                ``_orig_mod.``, ``module.``, ``model.`` and ``inner.`` in any order; also one of
                ``torch.optim.swa_utils.AveragedModel``.
            mean_puzzle_row: if the checkpoint is of another number of puzzles, fill the table with
                the mean of its rows, as the official code does, instead of an error.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else than dense tensors, a name is missing, unknown or
                twice there, or a shape does not fit.
        """
        _official.load(self, self.config, _official.read(source), mean_puzzle_row)

    @classmethod
    def from_official(
        cls,
        source: str | PathLike[str] | Mapping[str, Tensor],
        config: TRMConfig | str | None = None,
        **overrides: Any,
    ) -> "TinyRecursiveModel":
        """Makes a model and loads a checkpoint of the official code.

        Settings that shapes show are taken from them: vocabulary, width, layers, mixer, puzzles,
        learned positions, and the length where the shapes have it.

        Args:
            source: as for ``load_official``.
            config: the rest; None takes the published one of the same vocabulary and mixer.
            **overrides: settings that replace all others.

        Raises:
            OSError, ValueError: as for ``load_official``, or no published config fits.
        """
        state = _official.read(source)
        found = _official.config_from(state, config)
        model = cls(config_of(found, overrides))
        _official.load(model, model.config, state, False)
        return model

    def official_state_dict(self, prefix: str = "_orig_mod.model.inner.") -> dict[str, Tensor]:
        """Returns the state under the names of the official code, sharing memory with the model.

        Args:
            prefix: put before each name; the official code saves with this one where the model is
                compiled, and with ``model.inner.`` where it is not.
        """
        own = _official.named(self, self.config)
        return {prefix + theirs: tensor.detach() for theirs, tensor in own.items()}

    def _embedded(self, data: Batch) -> Tensor:
        config, dtype = self.config, activation(self.y_init).dtype
        self._check(data)
        x = self.tokens(data["inputs"], dtype)
        if config.puzzle_positions and self.puzzles is not None:
            rows = self.puzzles(data["puzzle_identifiers"]).to(dtype)
            rows = pad(rows, (0, config.puzzle_positions * config.hidden_size - rows.shape[1]))
            x = torch.cat((rows.unflatten(1, (config.puzzle_positions, -1)), x), 1)
        if self.positions is not None:
            x = self.positions(x)
        scaled: Tensor = config.hidden_size**0.5 * x
        return scaled

    @torch.no_grad()
    def _halted(self, steps: Tensor, outputs: Outputs, generator: torch.Generator | None) -> Tensor:
        most = self.config.halt_max_steps
        halted = steps >= most
        if not self.training or most == 1:
            return halted
        q = outputs.q_halt
        explores = torch.rand(q.shape, device=q.device, generator=generator)
        least = torch.randint(2, most + 1, q.shape, device=q.device, generator=generator)
        least = least * (explores < self.config.halt_exploration_prob)
        return (halted | self.wants_halt(outputs)) & (steps >= least)

    def wants_halt(self, outputs: Outputs) -> Tensor:
        """Returns which sequences want to halt, [batch], bool."""
        if self.config.no_ACT_continue:
            return outputs.q_halt > 0
        return outputs.q_halt > outputs.q_continue

    @torch.no_grad()
    def target_continue(self, y: Tensor, z: Tensor, steps: Tensor, data: Batch) -> Tensor:
        """Returns what q_continue is to learn: the better choice at the step to follow.

        Args:
            y, z, data: states after a step and sequences, as for ``step``.
            steps: how many steps the sequences have taken, [batch].

        Returns:
            Probabilities, [batch].
        """
        following = self.step(y, z, data)[2]
        better = torch.maximum(following.q_halt, following.q_continue)
        is_last = steps >= self.config.halt_max_steps
        return torch.sigmoid(torch.where(is_last, following.q_halt, better))

    def _check(self, batch: Batch) -> Tensor:
        inputs = batch.get("inputs")
        if inputs is None or inputs.dim() != 2 or inputs.shape[1] != self.config.seq_len:
            got = "none" if inputs is None else tuple(inputs.shape)
            raise ValueError(
                f"TinyRecursiveModel: inputs must be [batch, {self.config.seq_len}]; got {got}"
            )
        puzzles = batch.get("puzzle_identifiers")
        if self.puzzles is not None and (puzzles is None or puzzles.shape != inputs.shape[:1]):
            got = "none" if puzzles is None else tuple(puzzles.shape)
            raise ValueError(
                f"TinyRecursiveModel: puzzle_identifiers must be [{inputs.shape[0]}]; got {got}"
            )
        return inputs


def _mixer_options(config: TRMConfig) -> dict[str, Any]:
    if config.mlp_t:
        return {"mixer": "mlp_t", "length": config.length}
    theta = config.rope_theta if config.pos_encodings == "rope" else None
    return {"mixer": "attention", "heads": config.num_heads, "theta": theta}
