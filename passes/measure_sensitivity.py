"""measure-sensitivity: measure the noise that each group adds to its stage's output, in every scheme it may get."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.families.family import ModelFamily
from vlqc.ir.memory import file_backed_copy, release_pages
from vlqc.ir.observation import noise_to_signal
from vlqc.ir.stage import InputQuantization, Sensitivity, Site, Stage, WeightQuantization, group_by_source
from vlqc.passes.lower_linears import lower
from vlqc.passes.quantize_activations import input_quantization
from vlqc.passes.quantize_weights import min_weight_scale, quantize_parts, scale_dtype, work_items
from vlqc.pipeline.pass_api import Pass, require
from vlqc.targets.lattice import candidate_schemes
from vlqc.targets.schemes import Scheme, WeightFormat
from vlqc.targets.target import parse_target

# What the integers of a group depend on: their format, the dtype of the scales, and whether a bias in steps of input
# and weight scale bounds them from below.
WeightKey = tuple[WeightFormat, torch.dtype, bool]


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Runs the probe with one group at a time in each scheme that the target supports, and all others in float.

    It fills `stage.sensitivities` and decides nothing, as that takes the values of all stages. The quantized modules
    are kept with the stage, so that any decision can be emitted. Schemes with the same integers share them.

    target: engine or engines whose rules apply.
    method: of rounding weights in other schemes than the assigned one, as in quantize-weights.
    inputs: range of static inputs in other schemes than the assigned one, as the method of quantize-activations.
    group_size: number of input columns that share a scale in 4-bit weights.
    schemes: those that the search may choose besides FLOAT and the assigned one; all of them if it is empty.
    """

    name: ClassVar[str] = "measure-sensitivity"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "measure what each group, in every scheme it may get, does to the output of its stage"
    after: ClassVar[tuple[str, ...]] = ("assign-precision", "quantize-weights")
    before: ClassVar[tuple[str, ...]] = ("lower-linears",)

    target: str = "both"
    method: Literal["auto", "round", "clip", "gptq"] = "auto"
    inputs: Literal["minmax", "histogram", "automatic"] = "histogram"
    group_size: int = 64
    schemes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_target(self.target)
        require(self.group_size >= 1, "group_size must be 1 or more")
        require(set(self.schemes) <= set(Scheme), f"schemes must be some of {', '.join(Scheme)}")

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return True

    @torch.no_grad()
    def run(self, stage: Stage) -> bool:
        groups = [
            _Group(self.candidates_in(stage, members), members, self.group_size) for members in _quantized_groups(stage)
        ]
        self._quantize_inputs(stage, groups)
        self._quantize_weights(stage, groups)
        reference = probe_rows(stage)
        stage.sensitivities = []
        for group in groups:
            modules = {scheme: group.modules(stage, scheme) for scheme in group.schemes}
            noise = {
                scheme: noise_to_signal(reference, probe_rows(stage, by_target))
                for scheme, by_target in modules.items()
            }
            names, first = tuple(site.name for site in group.members), group.members[0]
            stage.sensitivities.append(Sensitivity(first.source, stage.part, names, group.schemes[0], noise, modules))
        return False  # weights and text are unchanged

    def candidates_in(self, stage: Stage, members: Sequence[Site]) -> list[Scheme]:
        """The assigned scheme of a quantized group, then the others that it may get."""
        assigned = members[0].scheme or Scheme.FLOAT
        if reads_added_bias(stage, members):
            return [assigned]
        observed = [stage.observations.get(site.source) for site in members]
        has_inputs = all(each is not None and not each.is_empty for each in observed)
        return [
            scheme
            for scheme in self.search_candidates(members, stage.family, str(stage.dtype).removeprefix("torch."))
            if scheme == assigned or has_inputs or not scheme.spec.activation.is_static
        ]

    def search_candidates(self, members: Sequence[Site], family: ModelFamily, dtype: str) -> list[Scheme]:
        """The schemes of a quantized group of `Stage.scheme_groups` by the rules of the target; see
        `candidate_schemes`."""
        return candidate_schemes(
            {site.name: site.shape for site in members},
            members[0].scheme or Scheme.FLOAT,
            family=family,
            target=self.target,
            dtype=dtype,
            group_size=self.group_size,
            only=[Scheme(name) for name in self.schemes],
        )

    def _quantize_inputs(self, stage: Stage, groups: Sequence["_Group"]) -> None:
        """Chooses static inputs for groups that may get them and have none in their assigned scheme."""
        sources = {
            source: (group, sites)
            for group in groups
            if any(scheme.spec.activation.is_static for scheme in group.schemes)
            for source, sites in group_by_source(group.members).items()
            if sites[0].input is None
        }
        tasks = [
            partial(input_quantization, stage, source, sites, self.inputs) for source, (_, sites) in sources.items()
        ]
        chosen = stage.execution.process_group.parallel_map(tasks)
        for (source, (group, _)), quantization in zip(sources.items(), chosen, strict=True):
            group.inputs[source] = quantization

    def _quantize_weights(self, stage: Stage, groups: Sequence["_Group"]) -> None:
        """Quantizes the weights of every group once per `WeightKey` that its schemes need and no pass has made."""
        parts = []
        for group in groups:
            for scheme in filter(attrgetter("is_quantized"), group.schemes):
                sites = group.sites_in(scheme)
                weights = group.weights.setdefault(_weight_key(stage, sites), {})
                weights |= {site.name: site.weight for site in sites if site.weight is not None}
                if not weights:
                    parts += [(weights, source, readers) for source, readers in work_items(stage, sites)]
        results = quantize_parts(stage, [(source, sites) for _, source, sites in parts], self.method)
        for (weights, _, sites), quantized in zip(parts, results, strict=True):
            weights |= {site.name: weight for site, weight in zip(sites, quantized, strict=True)}


@dataclass
class _Group:
    """A group while it is measured.

    schemes: the assigned one first; group_size: of weights with groups; inputs: static ones by source, where the
    assigned scheme has none; weights: by key and name of the site.
    """

    schemes: list[Scheme]
    members: Sequence[Site]
    group_size: int
    inputs: dict[str, InputQuantization] = field(default_factory=dict)
    weights: dict[WeightKey, dict[str, WeightQuantization]] = field(default_factory=dict)

    def sites_in(self, scheme: Scheme) -> list[Site]:
        """The members with another scheme, without a weight and what that scheme does not use."""
        if scheme == self.schemes[0]:
            return list(self.members)
        return [
            replace(
                site,
                scheme=scheme,
                group_size=(site.group_size or self.group_size) if scheme.spec.weight.per_group else None,
                input=(site.input or self.inputs[site.source]) if scheme.spec.activation.is_static else None,
                weight=None,
            )
            for site in self.members
        ]

    def modules(self, stage: Stage, scheme: Scheme) -> dict[str, nn.Module]:
        """Module of each member in a scheme, by target; for FLOAT the float Linear itself."""
        if not scheme.is_quantized:
            return {site.target: stage.linear(site) for site in self.members}
        sites = self.sites_in(scheme)
        weights = self.weights[_weight_key(stage, sites)]
        return {site.target: lower(stage, replace(site, weight=weights[site.name])) for site in sites}


def _quantized_groups(stage: Stage) -> list[list[Site]]:
    return [members for members in stage.scheme_groups() if members[0].is_quantized]


def _weight_key(stage: Stage, sites: Sequence[Site]) -> WeightKey:
    has_smallest_scale = any(min_weight_scale(stage, site) is not None for site in sites)
    return sites[0].spec.weight, scale_dtype(stage, sites[0]), has_smallest_scale


def reads_added_bias(stage: Stage, members: Sequence[Site]) -> bool:
    """Whether a pass added a bias to the norm before a group. Engines apply it before static W8A8 layers only."""
    node = stage.node(members[0].source)
    if node.op != "call_module":
        return any(site.added_bias for site in members)
    producer = stage.module.get_submodule(str(node.target))
    has_bias = any(name == "bias" for name, _ in (*producer.named_parameters(), *producer.named_buffers()))
    return has_bias and not isinstance(producer, nn.Linear)


def probe_rows(stage: Stage, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
    """The stage's output for the probe without rows of padding, float32 [rows, K].

    modules: replace those at their targets during the call; float ones with weights as they are stored.
    """
    originals = {target: stage.module.get_submodule(target) for target in modules or {}}
    try:
        for target, module in (modules or {}).items():
            stage.module.set_submodule(target, _as_stored(module, stage.dtype))
        rows = stage.execution.probe_output(reuse=True)
    finally:
        for target, original in originals.items():
            stage.module.set_submodule(target, original)
    modality = stage.execution.probe.modality if stage.execution.probe else None
    return rows if modality is None or modality.numel() != len(rows) else rows[modality >= 0]


def _as_stored(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A Linear with weight and bias rounded to the dtype in which they are stored; quantized modules unchanged."""
    if not isinstance(module, nn.Linear):
        return module
    stored = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    rounded = file_backed_copy(module.weight.to(dtype).float(), module.weight)
    release_pages(module.weight)
    stored.weight = nn.Parameter(rounded, requires_grad=False)
    stored.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype).float(), requires_grad=False)
    return stored
