"""insert-observers: record statistics of every linear layer's input while the samples run through the stage once."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.ir.execution import first_tensor
from vlqc.ir.observation import Observation
from vlqc.ir.stage import Site, Stage, observe
from vlqc.passes.algorithms.observer import (
    Observer,
    check_magnitude,
    merge_samples,
    observation_digest,
    plan_quotas,
    row_energy,
)
from vlqc.pipeline.pass_api import Pass, require
from vlqc.targets.schemes import Scheme

BYTES_PER_VALUE = 4  # kept rows are float32
EXPERTS_BUDGET = 6  # observers


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Inserts an observer at the input of every group of sites and fills `stage.observations` in one forward pass.

    Ranges and moments are exact over all rows; `tokens` and `megabytes` only bound the rows kept for later searches.

    tokens: maximum number of kept rows per observer.
    megabytes: maximum size of the kept rows per observer, in MiB; all experts of a block have that of six observers.
    balance: weight errors in text, image and video tokens equally, regardless of how many rows each modality has.
    """

    name: ClassVar[str] = "insert-observers"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "observe the inputs of all sites while every sample runs through the stage once"

    tokens: int = 4096
    megabytes: int = 64
    balance: bool = True

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.megabytes >= 1, "tokens and megabytes must be 1 or more")

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return True

    def run(self, stage: Stage) -> bool:
        previous = dict(stage.observations)
        inserted = insert_observe_nodes(stage)
        run, groups = stage.execution, stage.groups()
        observers = self._observers(stage)
        run.forward({members[0].target: observers[source] for source, members in groups.items()})
        for call, output in zip(run.calls, run.outputs, strict=True):
            check_magnitude(first_tensor(output), f"the output of {stage.name}", stage.name, call.sample)
        energies = {call.sample: row_energy(output) for call, output in zip(run.calls, run.outputs, strict=True)}
        for source, members in groups.items():
            local = observers.pop(source).samples_with_energy(energies)
            # Merged in sample order, whichever process ran a sample, so that sums are bitwise reproducible. Later
            # passes derive Gram matrices and histograms from the kept rows: nothing larger is communicated.
            samples = [sample for part in run.process_group.all_gather(local) for sample in part]
            empty = Observation(members[0].shape[1], balance=self.balance)
            stage.observations[source] = merge_samples(empty, samples, len(run.sample_shapes))
        return inserted or any(
            observation_digest(previous.get(source)) != observation_digest(observation)
            for source, observation in stage.observations.items()
        )

    def _observers(self, stage: Stage) -> dict[str, Observer]:
        """One per group. Those of all experts of a block share the bytes of EXPERTS_BUDGET observers."""
        sites = {source: members[0] for source, members in stage.groups().items()}
        experts = {source: stage.family.experts_of(site.name) for source, site in sites.items()}
        channels = Counter[str | None]()
        for source, site in sites.items():
            channels[experts[source]] += site.shape[1]
        allowed = self.megabytes * 2**20 // BYTES_PER_VALUE
        return {
            source: self._observer(
                stage,
                source,
                site,
                EXPERTS_BUDGET * allowed // channels[block] if (block := experts[source]) else allowed // site.shape[1],
            )
            for source, site in sites.items()
        }

    def _observer(self, stage: Stage, source: str, site: Site, rows: int) -> Observer:
        """rows: that fit into the memory of this observer."""
        shapes = stage.execution.sample_shapes
        budget = max(1, min(self.tokens, rows))
        quotas = plan_quotas([shape.rows_per_modality for shape in shapes], budget)
        return Observer(
            site=site.name,
            where=f"{stage.name}, %{source}",
            quota_per_sample={shape.sample: quota for shape, quota in zip(shapes, quotas, strict=True)},
            merge_early=stage.execution.process_group.is_rank0,
        )


def insert_observe_nodes(stage: Stage) -> bool:
    """Adds an `observe` node after every node that sites read, unless one exists. Returns whether any was added."""
    inserted = False
    for source in stage.groups():
        node = stage.node(source)
        if not any(user.target is observe for user in node.users):
            with stage.graph.inserting_after(node):
                stage.graph.call_function(observe, (node,)).meta.update(node.meta)
            inserted = True
    return inserted
