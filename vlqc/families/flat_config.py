"""config.json in the form that the first release wrote and that engines read: one flat object."""

from typing import Any

MODEL_TYPE_OF_PART = "model_type"  # of the nested part itself; the whole model's stays
RENAMED = {"dtype": "torch_dtype"}


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config of any transformers version -> the flat form; one that is flat already comes back as it is.

    Newer versions nest the language model's keys in `text_config` and join the rotary settings in `rope_parameters`.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    joined = {key: value for key, value in config.items() if key != "text_config"}
    for key, value in text.items():
        if key == "rope_parameters" and isinstance(value, dict):
            joined |= rotary(value)
        elif key not in (MODEL_TYPE_OF_PART, "dtype", "torch_dtype", "layer_types", "architectures"):
            joined.setdefault(key, value)
    if isinstance(joined.get("vision_config"), dict):
        dropped = ("dtype", "torch_dtype", "rope_parameters")
        joined["vision_config"] = {key: value for key, value in joined["vision_config"].items() if key not in dropped}
    return {RENAMED.get(key, key): value for key, value in joined.items()}


def rotary(parameters: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters -> rope_theta and rope_scaling; multimodal sections are of type mrope unless scaled otherwise."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if "mrope_section" in scaling:
        kind = scaling.setdefault("rope_type", "default")
        scaling["type"] = "mrope" if kind == "default" else kind
    found: dict[str, Any] = {"rope_scaling": scaling}
    if "rope_theta" in parameters:
        found["rope_theta"] = parameters["rope_theta"]
    return found
