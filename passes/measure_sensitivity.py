"""measure-sensitivity: how much noise each group adds to its stage's output, in every scheme that it may get."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.ir.observation import noise_to_signal as noise_to_signal
from vlqc.ir.stage import Sensitivity, Site, Stage
from vlqc.passes.lower_linears import lower
from vlqc.passes.quantize_weights import quantized
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.rules import run_together, supported_schemes, target_supporting
from vlqc.targets.schemes import SPECS, Scheme
from vlqc.targets.target import parse_target


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Runs the probe with one group at a time in each scheme that the target allows it, all others in float.

    Nothing is decided here: that takes the figures of all stages. The modules stay with the stage, so that whatever is
    decided can be emitted. target: whose rules hold; method: how the weights of other schemes are rounded, as in
    quantize-weights.
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

    @torch.no_grad()
    def run(self, stage: Stage) -> bool:
        reference, found = probe_rows(stage), []
        for source, members in stage.groups().items():
            assigned = members[0].scheme
            if assigned is None or assigned == Scheme.FLOAT:
                continue
            modules = {scheme: self._in_scheme(stage, members, scheme) for scheme in self.choices(stage, members)}
            noise = {
                scheme: noise_to_signal(reference, probe_rows(stage, of_target))
                for scheme, of_target in modules.items()
            }
            names = tuple(site.name for site in members)
            found.append(Sensitivity(source, stage.part, names, assigned, noise, modules))
        stage.sensitivities = found
        return False  # neither weights nor the text

    def choices(self, stage: Stage, members: list[Site]) -> list[Scheme]:
        """The scheme of a quantized group, and those that it may get instead: every engine of the target runs them on
        all members, and beside the assigned scheme elsewhere."""
        assigned = members[0].scheme or Scheme.FLOAT
        if behind_biased_norm(stage, members):
            return [assigned]
        rules, dtype = target_supporting(self.target, assigned), str(stage.dtype).removeprefix("torch.")
        choices = [assigned]
        for scheme in SPECS[assigned].alternatives:
            supported = rules is None or all(scheme in supported_schemes(rules, site.name, dtype) for site in members)
            if supported and (rules is None or run_together(rules, [assigned, scheme])):
                choices.append(scheme)
        return choices

    def _in_scheme(self, stage: Stage, members: list[Site], scheme: Scheme) -> dict[str, nn.Module]:
        """Target -> the module that each member is in this scheme; for FLOAT the float Linear itself."""
        if scheme == Scheme.FLOAT:
            return {site.target: stage.linear(site) for site in members}
        if scheme != members[0].scheme:
            members = [replace(site, scheme=scheme, group_size=None, input=None, weight=None) for site in members]
            weights = quantized(stage, members[0].source, members, self.method)
            for site, weight in zip(members, weights, strict=True):
                site.weight = weight
        return {site.target: lower(stage, site) for site in members}


def behind_biased_norm(stage: Stage, members: list[Site]) -> bool:
    """Whether a pass gave the norm before a group a bias: engines add that in front of static W8A8 linears only."""
    node = stage.node(members[0].source)
    if node.op != "call_module":
        return any(site.added_bias for site in members)
    producer = stage.module.get_submodule(str(node.target))
    has_bias = any(name == "bias" for name, _ in (*producer.named_parameters(), *producer.named_buffers()))
    return has_bias and not isinstance(producer, nn.Linear)


def probe_rows(stage: Stage, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
    """float32 [rows, K]: what the stage returns for the probe, rows of padding left out.

    modules: stand at their targets meanwhile, floats among them with weights as they are emitted.
    """
    linears = {target: stage.module.get_submodule(target) for target in modules or {}}
    try:
        for target, module in (modules or {}).items():
            stage.module.set_submodule(target, _as_emitted(module, stage.dtype))
        rows = stage.execution.probe_output()
    finally:
        for target, linear in linears.items():
            stage.module.set_submodule(target, linear)
    modality = stage.execution.probe.modality if stage.execution.probe else None
    return rows if modality is None or modality.numel() != len(rows) else rows[modality >= 0]


def _as_emitted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A Linear with its weight and bias rounded as they are stored; quantized modules are what is stored."""
    if not isinstance(module, nn.Linear):
        return module
    stored = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    stored.weight = nn.Parameter(module.weight.to(dtype).float(), requires_grad=False)
    stored.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype).float(), requires_grad=False)
    return stored
