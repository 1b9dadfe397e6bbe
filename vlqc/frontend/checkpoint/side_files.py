"""The files beside the weights: settings of the image processor, as any version of transformers stores them."""

from pathlib import Path
from typing import Any

from vlqc.files import read_json_object

IMAGE_SETTINGS = "preprocessor_config.json"
PROCESSOR_SETTINGS = "processor_config.json"  # transformers 5 stores the settings of all parts in this file
IMAGE_KEY = "image_processor"  # their key there


def image_settings(folder: Path) -> tuple[Any, str]:
    """The settings of the image processor, and the name of their file; an empty object if there are none.

    Those in processor_config.json take precedence over those in preprocessor_config.json, as in transformers 5. They
    are as stored: not always an object. UserError for a damaged file.
    """
    nested = read_optional_json(folder / PROCESSOR_SETTINGS).get(IMAGE_KEY)
    return (nested, PROCESSOR_SETTINGS) if nested else (read_optional_json(folder / IMAGE_SETTINGS), IMAGE_SETTINGS)


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. UserError for a damaged file."""
    return read_json_object(path) if path.is_file() else {}
