"""measure-sensitivity: measure the noise that each group adds to its stage's output, in every scheme it may get."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.ir.memory import file_backed_copy, release_pages
from vlqc.ir.observation import noise_to_signal
from vlqc.ir.stage import Sensitivity, Site, Stage, group_by_source
from vlqc.passes.lower_linears import lower
from vlqc.passes.quantize_weights import quantize_site_weights
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.rules import run_together, supported_schemes, target_supporting
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import parse_target


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Runs the probe with one group at a time in each scheme that the target supports, and all others in float.

    It fills `stage.sensitivities` and decides nothing, as that takes the values of all stages. The quantized modules
    are kept with the stage, so that any decision can be emitted.

    target: engine or engines whose rules apply.
    method: of rounding weights in other schemes than the assigned one, as in quantize-weights.
    """

    name: ClassVar[str] = "measure-sensitivity"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "measure what each group, in every scheme it may get, does to the output of its stage"
    after: ClassVar[tuple[str, ...]] = ("assign-precision", "quantize-weights")
    before: ClassVar[tuple[str, ...]] = ("lower-linears",)

    target: str = "both"
    method: Literal["auto", "round", "clip", "gptq"] = "auto"

    def __post_init__(self) -> None:
        parse_target(self.target)

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return True

    @torch.no_grad()
    def run(self, stage: Stage) -> bool:
        reference = probe_rows(stage)
        sensitivities = []
        for members in stage.scheme_groups():
            assigned = members[0].scheme
            if assigned is None or not assigned.is_quantized:
                continue
            modules = {scheme: self._modules_in(stage, members, scheme) for scheme in self.choices(stage, members)}
            noise = {
                scheme: noise_to_signal(reference, probe_rows(stage, by_target))
                for scheme, by_target in modules.items()
            }
            names = tuple(site.name for site in members)
            sensitivities.append(Sensitivity(members[0].source, stage.part, names, assigned, noise, modules))
        stage.sensitivities = sensitivities
        return False  # weights and text are unchanged

    def choices(self, stage: Stage, members: list[Site]) -> list[Scheme]:
        """The assigned scheme of a quantized group and its alternatives.

        Every engine of the target must run an alternative on all members, in one model with the assigned scheme.
        """
        assigned = members[0].scheme or Scheme.FLOAT
        if reads_added_bias(stage, members):
            return [assigned]
        target, dtype = target_supporting(self.target, stage.family, assigned), str(stage.dtype).removeprefix("torch.")
        if target is None:
            return [assigned, *assigned.alternatives]
        return [assigned] + [
            scheme
            for scheme in assigned.alternatives
            if all(scheme in supported_schemes(target, stage.family, site.name, dtype) for site in members)
            and run_together(target, stage.family, [assigned, scheme])
        ]

    def _modules_in(self, stage: Stage, members: list[Site], scheme: Scheme) -> dict[str, nn.Module]:
        """Module of each member in a scheme, by target; for FLOAT the float Linear itself."""
        if not scheme.is_quantized:
            return {site.target: stage.linear(site) for site in members}
        if scheme != members[0].scheme:
            members = [_in_scheme(site, scheme) for site in members]
            for source, sites in group_by_source(members).items():
                weights = quantize_site_weights(stage, source, sites, self.method)
                for site, weight in zip(sites, weights, strict=True):
                    site.weight = weight
        return {site.target: lower(stage, site) for site in members}


def _in_scheme(site: Site, scheme: Scheme) -> Site:
    """The site with another scheme, without the weight and what that scheme does not use."""
    group_size = site.group_size if scheme.spec.weight.per_group else None
    input_quantization = site.input if scheme.spec.activation.is_static else None
    return replace(site, scheme=scheme, group_size=group_size, input=input_quantization, weight=None)


def reads_added_bias(stage: Stage, members: list[Site]) -> bool:
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
