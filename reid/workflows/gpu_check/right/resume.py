"""Checks a run that stops after an epoch and resumes from its checkpoint."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context

_BATCHES, _EPOCHS = 4, 2


class _Labels(parts.Hook):
    """Fills the memories before each epoch, and stores the checkpoint of the first epoch."""

    def __init__(self, labelled: parts.Labelled, batches: list[parts.Batch]) -> None:
        self._labelled, self._batches = labelled, batches
        self.checkpoint = b""

    def before_epoch(self, trainer: parts.Trainer) -> None:
        """Fills the memories with the network's present features."""
        records = parts.image_records(self._labelled)
        features = parts.extract(trainer.model, self._batches, records, trainer.device)
        parts.relabel(trainer.criterion, self._labelled.labels, features, epoch=trainer.epoch)

    def save(self, trainer: parts.Trainer) -> None:
        """Stores the checkpoint as the bytes of a file."""
        if trainer.epoch == 1:
            file = io.BytesIO()
            torch.save(trainer.state_dict(), file)
            self.checkpoint = file.getvalue()


def run(context: Context) -> None:
    """With deterministic kernels, trains twice to the end, and once from the checkpoint."""
    parts.import_parts()
    found = context.found
    plain = _states(context, "fp16")
    same = _different(plain["again"], plain["whole"])
    found.note(
        "With torch's usual kernels two runs from the same seed end with the same bits."
        if not same
        else f"With torch's usual kernels two runs from the same seed differ in {len(same)} of "
        f"{len(plain['whole'])} tensors: atomic additions have no fixed order. "
        "torch.use_deterministic_algorithms(True) gives them one."
    )
    settings: tuple[parts.Amp, ...] = ("fp16", "off")
    for amp in settings:
        name = "fp32" if amp == "off" else amp
        if not context.enough(2, f"resuming in {name}"):
            continue
        with _deterministic() as told:
            states = _states(context, amp)
        for what, key in (("two runs from the same seed", "again"), ("a resumed run", "resumed")):
            different = _different(states[key], states["whole"])
            ending = "end with the same bits" if key == "again" else "ends with the same bits"
            found.check(
                f"{what} in {name} {ending}, with deterministic kernels",
                not different,
                f"{len(states['whole'])} tensors, different: {', '.join(different[:5]) or 'none'}",
            )
        for text in dict.fromkeys(told):
            found.note(f"No deterministic kernel: {text}")


@contextmanager
def _deterministic() -> Iterator[list[str]]:
    """Uses deterministic kernels within the block; yields torch's warnings about missing ones."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield told
        finally:
            torch.use_deterministic_algorithms(False)
            texts = [str(warning.message).partition("\n")[0] for warning in caught]
            told += [text for text in texts if "determinis" in text]


def _states(context: Context, amp: parts.Amp) -> dict[str, dict[str, Tensor]]:
    """Every tensor at the end of a whole run, a second whole run, and a resumed run."""
    _, whole = _trained(context, amp, seed=1)
    _, again = _trained(context, amp, seed=1)
    checkpoint, _ = _trained(context, amp, seed=1, epochs=1)
    _, resumed = _trained(context, amp, seed=2, checkpoint=checkpoint)
    return {"whole": whole, "again": again, "resumed": resumed}


def _trained(
    context: Context, amp: parts.Amp, seed: int, epochs: int = _EPOCHS, checkpoint: bytes = b""
) -> tuple[bytes, dict[str, Tensor]]:
    """The checkpoint after the first epoch, and every tensor at the end.

    A run of one epoch has the schedule of two epochs, like a run that was stopped.
    """
    sizes, device = context.sizes, context.device
    network = parts.make_network(sizes, device, depth=sizes.short_depth, seed=seed)
    count = sizes.small_batch * _BATCHES
    labelled = parts.make_labelled(count, 1 + network.num_parts, sizes.dim, device)
    batches = _batches(labelled, sizes.small_batch, sizes.image, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    hook = _Labels(labelled, batches)
    trainer = parts.make_trainer(
        network, criterion, device, amp=amp, epochs=_EPOCHS,
        loader=parts.FixedBatches(batches), hooks=[hook],
    )  # fmt: skip
    trainer.max_epochs = epochs
    torch.manual_seed(seed)
    if checkpoint:
        trainer.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True))
    trainer.train()
    return hook.checkpoint, parts.state_of(trainer)


def _batches(
    labelled: parts.Labelled, size: int, image: tuple[int, int], device: torch.device
) -> list[parts.Batch]:
    """Batches of `size` images; each image appears once."""
    generator = torch.Generator().manual_seed(3000)
    found = []
    for start in range(0, len(labelled.camids), size):
        index = torch.arange(start, min(start + size, len(labelled.camids)), device=device)
        pixels = torch.randn(len(index), 3, *image, generator=generator).to(device)
        found.append(parts.as_batch(pixels, labelled.camids[index], index))
    return found


def _different(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in expected.keys() | seen.keys()
        if name not in seen or name not in expected or not torch.equal(seen[name], expected[name])
    ]
