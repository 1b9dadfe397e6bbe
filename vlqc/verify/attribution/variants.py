"""What `--locate` compares: groups of layers, the variants of the model, on which samples they run, and their noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlqc.families.qwen2_5_vl import fused_group
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import MODALITIES
from vlqc.targets.schemes import Scheme
from vlqc.verify.attribution.group_error import Measured


@dataclass(frozen=True)
class Group:
    """Quantized layers of one stage that share an input and a scheme."""

    stage: str
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """`model.layers.3.mlp.{gate,up}_proj`; a layer on its own: its name."""
        if len(self.layers) == 1:
            return self.layers[0]
        parent = self.layers[0].rpartition(".")[0]
        members = [layer.rpartition(".")[2] for layer in self.layers]
        end = "_proj" if all(member.endswith("_proj") for member in members) else ""
        return f"{parent}.{{{','.join(member.removesuffix(end) for member in members)}}}{end}"


@dataclass(frozen=True, eq=False)
class Variant:
    """The float model (or with `stored` the folder) of which some groups are as in the other; begin: number of the
    first stage in which it differs from the unchanged model."""

    stored: bool
    groups: tuple[Group, ...] = ()
    begin: int = 0


@dataclass(frozen=True)
class Run:
    """One variant on one sample (its number among the chosen ones)."""

    variant: Variant
    sample: int


@dataclass
class ModalityNoise:
    """Power of the logits' error per modality, over all samples."""

    power: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0.0))

    def add(self, power: Tensor, modality: Tensor) -> None:
        """power float64 [S], modality int8 [S]."""
        for number, name in enumerate(MODALITIES):
            self.power[name] += float(power[modality == number].sum())

    @property
    def total(self) -> float:
        return sum(self.power.values())


@dataclass(frozen=True)
class GroupNoise:
    """Of one group: the error with it alone quantized, that of the folder with it float, and what was measured at its
    outputs; nothing where no sample reaches it."""

    alone: ModalityNoise
    without: ModalityNoise
    measured: Measured | None


@dataclass(frozen=True)
class Located:
    """Power of the float logits, of the folder's error, of that with every group float, and all groups in the order of
    the model."""

    signal: ModalityNoise
    whole: ModalityNoise
    folded: ModalityNoise
    groups: dict[Group, GroupNoise]


def choose_samples(samples: Sequence[dict[str, Tensor]], tokens: int) -> list[int]:
    """Numbers of the samples to use, ascending: the shortest with a picture and the shortest without, whatever they
    take, then the others from short to long as long as all together have at most `tokens` tokens."""
    length = [int(sample["attention_mask"].sum()) for sample in samples]
    order = sorted(range(len(samples)), key=lambda number: length[number])
    chosen = [
        next(number for number in order if ("pixel_values" in samples[number]) == picture)
        for picture in (True, False)
        if any(("pixel_values" in sample) == picture for sample in samples)
    ]
    left = tokens - sum(length[number] for number in chosen)
    for number in order:
        if number not in chosen and length[number] <= left:
            chosen.append(number)
            left -= length[number]
    return sorted(chosen)


def find_groups(model: StreamedModel, schemes: Mapping[str, Scheme]) -> list[Group]:
    """The quantized layers, by what an engine fuses, in the order of the model."""
    groups: dict[tuple[str, ...], Group] = {}
    stages = list(model.stages)
    for layer in model.layers:
        members = tuple(it for it in fused_group(layer) if schemes.get(it, Scheme.FLOAT) != Scheme.FLOAT)
        if layer in members and members not in groups:
            stage = next(stage for stage in stages if layer.startswith(f"{stage}."))
            groups[members] = Group(stage, members)
    return list(groups.values())
