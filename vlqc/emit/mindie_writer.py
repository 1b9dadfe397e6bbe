"""MindIE's own layout: where its loader looks for the description, its config keys, and norms with a bias."""

from collections.abc import Iterable
from typing import Any

from vlqc.emit.folder_writer import FolderEmitter
from vlqc.emit.stage_tensors import Entry
from vlqc.ir.stage import Stage
from vlqc.targets.schemes import Scheme

GROUP_SIZES = (64, 128, 256)  # what MindIE accepts beside 0, which stands for none


class MindieEmitter(FolderEmitter):
    """As FolderEmitter, for MindIE's loader: 4-bit weights one per byte, options repeated in config.json."""

    packs_int4 = False

    def _entries(self, stage: Stage) -> Iterable[Entry]:
        yield from super()._entries(stage)
        yield from self._norms_again(stage)

    def _norms_again(self, stage: Stage) -> Iterable[Entry]:
        """A shifted norm stands twice: `X.module.weight` tells MindIE to build the norm that has a bias."""
        for path, module in stage.live.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names == ["weight", "bias"] and module.get_parameter("weight").ndim == 1:
                for name, parameter in module.named_parameters(recurse=False):
                    full = f"{stage.checkpoint_name(path)}.module.{name}"
                    yield Entry(full, parameter.to(self.dtype), self.options.scheme)

    def _description_name(self) -> str:
        return f"quant_model_description_{self.quant_type.lower()}.json"

    def _description(self) -> dict[str, Any]:
        described = super()._description()
        del described["version"]
        return described

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        self._add_mindie_keys(config)
        options = self.options
        grouped = options.scheme == Scheme.W4A8_DYNAMIC and options.group_size in GROUP_SIZES
        config["quantization_config"] = {
            "group_size": options.group_size if grouped else 0,
            "w_bit": options.w_bit,
            "a_bit": options.a_bit,
            "is_dynamic": options.is_dynamic,
            "is_lowbit": options.is_lowbit,
            "act_method": options.act_method,
            "anti_method": options.anti_method,
        }
        return config
