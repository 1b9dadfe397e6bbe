"""insert-observers: record statistics of every linear layer's input while the samples run through the stage once."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.families.layer_names import layer_pattern
from vlqc.ir.cache_analysis import find_caches
from vlqc.ir.execution import first_tensor
from vlqc.ir.observation import Observation
from vlqc.ir.stage import Site, Stage, observe
from vlqc.ir.tensor_digest import digest
from vlqc.passes.algorithms.cache_observer import CacheObserver, merge_caches, plan_kept
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
    caches: observe the keys and values of decoder layers, too, with the same limits, as quantize-cache needs.
    """

    name: ClassVar[str] = "insert-observers"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "observe the inputs of all sites while every sample runs through the stage once"

    tokens: int = 4096
    megabytes: int = 64
    balance: bool = True
    caches: bool = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.megabytes >= 1, "tokens and megabytes must be 1 or more")

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return True

    def run(self, stage: Stage) -> bool:
        before = _state(stage)
        inserted = insert_observe_nodes(stage)
        run, groups = stage.execution, stage.groups()
        observers, cache_observers = self._observers(stage), self._cache_observers(stage)
        run.forward(
            {members[0].target: observers[source] for source, members in groups.items()},
            {observer.site.target: observer for observer in cache_observers},
        )
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
        for observer in cache_observers:
            local_caches = observer.samples_with_energy(energies)
            merged = [sample for part in run.process_group.all_gather(local_caches) for sample in part]
            if len(merged) == len(run.sample_shapes) > 0:
                stage.cache_observations[observer.site.name] = merge_caches(merged)
            else:
                del stage.caches[observer.site.name]
                layers = layer_pattern(observer.site.name)  # one note for all layers
                stage.notes.append(f"the keys and values of {layers} are not quantized: it computes no attention")
        return inserted or _state(stage) != before

    def _cache_observers(self, stage: Stage) -> list[CacheObserver]:
        """Fills `stage.caches`; one observer for each."""
        stage.caches.clear()
        stage.cache_observations.clear()
        if not self.caches:
            return []
        found = find_caches(stage)
        stage.caches |= found.caches
        stage.notes += found.obstacles
        shapes, allowed = stage.execution.sample_shapes, self.megabytes * 2**20 // BYTES_PER_VALUE
        budgets = {site.name: min(self.tokens, allowed // (2 * site.channels)) for site in stage.caches.values()}
        return [
            CacheObserver(site, plan_kept(shapes, max(1, budgets[name])), self.balance, found.partners[name])
            for name, site in stage.caches.items()
        ]

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


def _state(stage: Stage) -> dict[str, object]:
    """A value that is equal for equal observations."""
    observed: dict[str, object] = {
        source: observation_digest(observation) for source, observation in stage.observations.items()
    }
    return observed | {
        name: (observation.rows, digest(*observation.tensors()))
        for name, observation in stage.cache_observations.items()
    }


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
