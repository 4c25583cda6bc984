"""`ParallelMegalodon`: what a model becomes whose batch, sequence, or both are split over ranks."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..model.generation import TokenStream
from ..model.model import Megalodon, check_targets, masked_targets
from ..model.state_layout import check_layout, layout
from ..model.states import MegalodonState, complete, named_tensors
from ..ops.loss import check_reduction, has_integers
from ..ops.values import check_flag, described
from .chunk import Hooks
from .exchange import total_loss, whole_rows
from .pieces import Pieces, pieces_of
from .ranks import Parallel
from .states import state_of_piece, whole_state
from .vote import agree, clear_errors, device_of, integers


def enable(
    model: Megalodon,
    chunk_group: ProcessGroup | None = None,
    loss_group: ProcessGroup | None = None,
    *,
    tensor_mesh: DeviceMesh | None = None,
    everyone: ProcessGroup | None = None,
) -> Megalodon:
    """Makes a model one whose sequence is split over the ranks of a group, in place; all ranks call this function.

    :func:`megalodon_ops.distributed.parallelize` calls it for a mesh. Call it before FSDP2's `fully_shard`.

    Args:
        model: the same on every rank.
        chunk_group: the ranks that hold the pieces of one sequence, in order; None: each rank has whole sequences.
        loss_group: all ranks whose losses are one loss: those of the chunk groups together. None: the chunk group.
        tensor_mesh: of the ranks that share this rank's layers, as a part of the mesh of all; None: it shares none.
        everyone: beside `tensor_mesh`, the ranks of all loss groups.

    Returns:
        the model, a :class:`ParallelMegalodon`.

    Raises:
        ValueError: configurations, dtypes or devices differ; on every rank. TypeError: the model is no Megalodon, or it
        is parallel already.
    """
    if not isinstance(model, Megalodon) or isinstance(model, ParallelMegalodon):
        raise TypeError(f"enable: `model` must be a Megalodon that is not parallel yet, got {described(model)}.")
    loss_group = chunk_group if loss_group is None else loss_group
    return become_parallel(model, Parallel(model, chunk_group, loss_group, tensor_mesh, everyone))


def become_parallel(model: Megalodon, parallel: Parallel) -> Megalodon:
    """The model, whose class is a :class:`ParallelMegalodon` now."""
    of_class, model._parallel = type(model), parallel
    is_own = of_class is not Megalodon
    model.__class__ = (
        type(f"Parallel{of_class.__name__}", (ParallelMegalodon, of_class), {}) if is_own else ParallelMegalodon
    )
    return model


class ParallelMegalodon(Megalodon):
    """A model on several ranks, called as ever, on every rank at once, on the rank's own piece of the batch.

    `tokens` and `targets` are the rank's rows and its piece of their columns; `lengths`, `cu_seqlens` and `state` are of
    the whole sequences, equal on all ranks of a chunk group, and so are the state that is returned and what `generate`
    makes. A piece ends at a chunk boundary of the sequence that it cuts, except at the end of the sequence.

    Logits are the piece's. The loss is, with reduction "mean" or "sum", that of the targets of all ranks, the same on
    every rank, and its gradients, averaged over the ranks, are exactly those of one process; "none" gives the piece's.

    Every rank must make every call. Where arguments do not fit, all ranks raise the same ValueError.
    """

    _parallel: Parallel

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        state: MegalodonState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MegalodonState]:
        """Logits of the piece, or the loss; arguments as in :meth:`Megalodon.forward`, see the class."""
        call = dict(state=state, return_state=return_state, cu_seqlens=cu_seqlens, lengths=lengths)
        pieces = self._agree(tokens, targets, reduction, ignore_index, inplace_state=inplace_state, **call)
        if pieces is None:
            local = dict(state=state, cu_seqlens=cu_seqlens, lengths=lengths, inplace_state=inplace_state)
        else:
            local = _local(pieces, state, tokens.device)
        total = targets is not None and reduction in ("mean", "sum")
        if total:
            targets = masked_targets(targets, ignore_index, local["cu_seqlens"], local["lengths"])
        with self._of(pieces):
            result = super().forward(
                tokens, targets, reduction="sum" if total else reduction, ignore_index=ignore_index,
                return_state=return_state, **local,
            )  # fmt: skip
            result, after = result if return_state else (result, None)
            if total:
                count = (targets != ignore_index).sum()
                result = total_loss(result, count, self._parallel.group_for(result), mean=reduction == "mean")
            if pieces is not None and return_state:
                after = whole_state(after, state, pieces, self.config.chunk_size, self._parallel.members)
        return (result, after) if return_state else result

    def alone(self) -> Megalodon:
        """The model as one process calls it: on whole sequences, without an exchange of states or losses.

        The result is another model, of the same parameters, for what every rank does alike or by itself, such as
        :func:`megalodon_ops.evaluation.evaluate`. Where parameters are sharded, all ranks must still call it together.
        """
        model = _without_hooks(self, self._parallel.hooks)
        model.__class__ = self._parallel.of_class
        del model._parallel
        return model

    def stream(
        self,
        prompt: Tensor,
        *,
        lengths: Tensor | None = None,
        state: MegalodonState | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> TokenStream:
        """The continuation of prompts, as :meth:`Megalodon.stream` makes it, the same on every rank.

        `prompt` is the rank's piece of the columns, of any length; `lengths` and `state` are the whole prompts'. The
        ranks read the prompt together, a chunk each at a time, so that memory grows with its length by the tokens alone;
        then each decodes alike, without an exchange. Without a seed, rank 0's generator, or torch's own there, draws.
        """
        if self._parallel.ranks > 1:
            prompt = self._whole_prompt(prompt, lengths, state, options)
            if options.get("seed") is None:
                generator = self._shared_generator(generator, prompt.device)
        return super().stream(prompt, lengths=lengths, state=state, generator=generator, **options)

    def generate(self, prompt: Tensor, **options: Any) -> Tensor | tuple[Tensor | MegalodonState, ...]:
        """Continues prompts as :meth:`Megalodon.generate` does, of pieces as in :meth:`stream`; whole rows on every rank."""
        found = super().generate(prompt, **options)
        if self._parallel.ranks > 1:  # processors that round otherwise could have drawn others
            tokens = found[0] if isinstance(found, tuple) else found
            facts = {"generated tokens": integers(tokens.flatten().tolist())}
            agree(self._parallel.members.group, facts, op="generate")
        return found

    @torch.no_grad()
    def _read(self, tokens: Tensor, lengths: Tensor, state: MegalodonState | None) -> MegalodonState:
        """The state after whole prompts, which all ranks have: they read a chunk each at a time, and exchange states."""
        parallel, size = self._parallel, self.config.chunk_size
        if parallel.ranks == 1:
            return super()._read(tokens, lengths, state)
        begun = torch.zeros_like(lengths) if state is None else state.layers[0].attention.position
        unfinished = torch.minimum(-begun % size, lengths)
        if state is None or bool(unfinished.any()):  # every rank reads what fills up chunks that have begun
            state = self.alone()._read(tokens[:, : int(unfinished.max())], unfinished, state)
            columns = torch.arange(tokens.shape[1], device=tokens.device) + unfinished[:, None]
            tokens, lengths = tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1)), lengths - unfinished
        for start in range(0, int(lengths.max()), parallel.ranks * size):
            left = (lengths - start).clamp(0, parallel.ranks * size).tolist()
            widths = [min(max(max(left) - rank * size, 0), size) for rank in range(parallel.ranks)]
            pieces = pieces_of(parallel.rank, widths, rows=len(tokens), chunk_size=size, lengths=left)
            first = start + parallel.rank * size
            piece, local = tokens[:, first : first + widths[parallel.rank]], _local(pieces, state, tokens.device)
            with self._of(pieces):
                _, after = self._hidden(self._embed(piece), local.pop("state"), True, False, **local)
                state = whole_state(after, state, pieces, size, parallel.members)
        return state

    def _hidden(
        self, x: Tensor, state: MegalodonState | None, return_state: bool, inplace_state: bool, **sequences: Any
    ) -> tuple[Tensor, MegalodonState | None]:
        if self._parallel.pieces is not None:
            sequences["pieces"] = self._parallel.pieces
        return super()._hidden(x, state, return_state, inplace_state, **sequences)

    @contextlib.contextmanager
    def _of(self, pieces: Pieces | None) -> Iterator[None]:
        """Calls of blocks inside are for these pieces. A rank that fails leaves the group, and no rank waits for it."""
        self._parallel.pieces = pieces
        try:
            yield
        except BaseException:
            self._parallel.leave()
            raise
        finally:
            self._parallel.pieces = None

    def _agree(
        self, tokens: Tensor, targets: Tensor | None, reduction: str, ignore_index: int, inplace_state: bool,
        return_state: bool, state: MegalodonState | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    ) -> Pieces | None:  # fmt: skip
        """The pieces of this call, once all ranks have found their arguments right and equal."""
        facts, of_team, fault, length = {"call": "logits" if targets is None else "loss"}, {}, None, 0
        try:
            self._check(tokens, state, return_state, cu_seqlens, lengths)
            check_flag("Megalodon", "inplace_state", inplace_state)
            _check_values("tokens", tokens, self.config.vocab_size)
            if targets is not None:
                ignore_index = check_targets(tokens, targets, ignore_index)
                check_reduction(reduction)
                _check_values("targets", targets, self.config.num_outputs, ignore_index)
                facts |= {"reduction": reduction, "ignore_index": ignore_index}
            needed = [parameter.requires_grad for parameter in self.parameters()]
            facts |= {
                "torch.is_grad_enabled()": torch.is_grad_enabled(), "training": self.training,
                "parameters that require gradients": integers([i for i, needs in enumerate(needed) if needs]),
            }  # fmt: skip
            length = tokens.shape[1]
            sequences = {"cu_seqlens": _integers("cu_seqlens", cu_seqlens), "lengths": _integers("lengths", lengths)}
            if self._parallel.ranks > 1:
                of_team = {"rows of tokens": len(tokens), "return_state": return_state}
                of_team |= {name: "None" if values is None else integers(values) for name, values in sequences.items()}
                of_team |= self._facts_of(state, len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1)
            else:  # the whole sequences are here
                pieces_of(0, [length], rows=len(tokens), chunk_size=self.config.chunk_size, **sequences)
        except (TypeError, ValueError, IndexError) as error:
            fault = str(error)
        piece_lengths = self._parallel.agree(
            facts, fault, length, of_team, content=(tokens, targets, cu_seqlens, lengths)
        )
        if self._parallel.ranks == 1:
            return None
        position = None if state is None else state.layers[0].attention.position.tolist()
        try:
            return pieces_of(
                self._parallel.rank, piece_lengths, rows=len(tokens), chunk_size=self.config.chunk_size,
                positions=position, **sequences,
            )  # fmt: skip
        except ValueError:
            if self._parallel.has_teams:  # those of other sequences have not seen this
                self._parallel.leave()
            raise

    def _facts_of(self, state: MegalodonState | None, sequences: int) -> dict[str, Any]:
        """What a state must be on all ranks of a chunk group alike."""
        if state is None:
            return {"state": "None"}
        tensors = named_tensors(complete(state))
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if not t.is_complex()}
        for name, t in tensors.items():
            if t.is_complex():
                found[name] = (t.real.dtype, (*t.shape, 2))
        try:
            if not self._parallel.tensor_groups:  # else the state is of a part of each layer
                check_layout(found, layout(self.config, sequences, state.layers[0].attention.k.dtype))
        except ValueError as error:
            raise ValueError(
                f"Megalodon: `state` must be one of {sequences} sequences of this model: {error}."
            ) from None
        needs = [i for i, tensor in enumerate(tensors.values()) if tensor.requires_grad]
        return {
            "state": "given", "state.norm.count": integers(state.norm.count.tolist()),
            "position in state": integers(state.layers[0].attention.position.tolist()),
            "tensors of state that require gradients": integers(needs),
        }  # fmt: skip

    def _whole_prompt(
        self, prompt: Tensor, lengths: Tensor | None, state: MegalodonState | None, options: dict[str, Any]
    ) -> Tensor:
        """The prompts (B, L), of the pieces of all ranks, once these call for the same."""
        facts, of_team, fault, length = {"call": "generate"}, {}, None, 0
        try:
            self._check(prompt, state, True, None, lengths)
            _check_values("prompt", prompt, self.config.vocab_size, op="generate")
            given = _integers("lengths", lengths)
            of_team = {
                "rows of the prompt": len(prompt), "lengths": "None" if given is None else integers(given),
                **{name: repr(value) for name, value in options.items()}, **self._facts_of(state, len(prompt)),
            }  # fmt: skip
            length = prompt.shape[1]
        except (TypeError, ValueError, IndexError) as error:
            fault = str(error)
        widths = self._parallel.agree(facts, fault, length, of_team)
        return whole_rows(prompt, widths, self._parallel.members)

    def _shared_generator(self, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
        """A generator that draws on every rank what that of the chunk group's first rank, or torch's own there, draws."""
        group = self._parallel.members.group
        if generator is not None:
            state = generator.get_state()
        else:
            state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
        on_device = state.to(device_of(group))
        with clear_errors("generate", group):
            dist.broadcast(on_device, self._parallel.team, group=group)
        if self._parallel.rank == 0:
            return generator
        return torch.Generator(device).set_state(on_device.to(state.device))


def _local(pieces: Pieces, state: MegalodonState | None, device: torch.device) -> dict[str, Any]:
    """The arguments of a call that name whole sequences, for a piece."""

    def tensor(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)

    local = None if state is None else state_of_piece(state, pieces)
    return dict(state=local, cu_seqlens=tensor(pieces.cu_seqlens), lengths=tensor(pieces.lengths))


def _check_values(name: str, values: Tensor, end: int, besides: int | None = None, *, op: str = "Megalodon") -> None:
    """Raises, on the CPU, where a value is not in [0, end): an op would, when other ranks wait for this one already."""
    if values.is_cpu and values.numel():
        outside = (values < 0) | (values >= end)
        outside = outside if besides is None else outside & (values != besides)
        if bool(outside.any()):
            raise IndexError(f"{op}: `{name}` must be in [0, {end}), got {values[outside][0].item()}.")


def _integers(name: str, values: Tensor | None) -> list[int] | None:
    """The offsets or lengths of whole sequences."""
    if values is None:
        return None
    if not has_integers(values) or values.dim() != 1:
        raise ValueError(f"Megalodon: `{name}` must be integers (n,), got {values.dtype} {tuple(values.shape)}.")
    return values.tolist()


def _without_hooks(module: nn.Module, hooks: Hooks | None) -> Any:
    """A copy of the module, and of those in it, with the same parameters and buffers and all hooks but these."""
    made = object.__new__(module.__class__)  # FSDP2's classes have a __new__ that makes the class without shards
    made.__dict__.update(module.__dict__)
    made._modules = {
        name: child if child is None else _without_hooks(child, hooks) for name, child in module._modules.items()
    }
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        kept = OrderedDict((i, h) for i, h in getattr(module, kind).items() if not Hooks.owns(hooks, h))
        made.__dict__[kind] = kept
    return made
