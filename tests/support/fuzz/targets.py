"""All fuzz targets: their cases, checks, and number of examples in the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.fuzz.calibration import (
    check_image,
    check_lines,
    check_ready_samples,
    image_cases,
    line_cases,
    sample_cases,
)
from tests.support.fuzz.checkpoints import (
    check_config,
    check_config_text,
    check_index,
    check_side_file,
    check_weights,
    config,
    index_cases,
    nested_config,
    side_file_cases,
    weights,
)
from tests.support.fuzz.damage import as_json, damaged_bytes, damaged_json, damaged_text
from tests.support.fuzz.folders import check_folder, folder_cases
from tests.support.fuzz.media import check_video, video_cases
from tests.support.fuzz.reports import check_report, report_cases
from tests.support.fuzz.texts import (
    PIPELINE,
    check_options,
    check_pipeline,
    check_recipe,
    check_stage,
    option_cases,
    pass_words,
    recipe_cases,
    stage_cases,
)


@dataclass(frozen=True)
class Target:
    """cases: strategy for the cases; check(case, folder): returns whether a case was accepted, raises Wrong if it
    should not, and may use the folder, which is kept between cases; examples: number of cases in the tests."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Path], bool]
    examples: int


# More than 20,000 cases in all, which take little more than a minute on one core; see tests/end_to_end/test_fuzz.py.
TARGETS: dict[str, Target] = {
    "safetensors": Target(weights(), check_weights, 3000),
    "index": Target(index_cases(), check_index, 1500),
    "config text": Target(damaged_bytes(as_json(config())), check_config_text, 2300),
    "config": Target(damaged_json(config()), check_config, 250),
    "nested config": Target(damaged_json(nested_config()), check_config, 100),
    "side files": Target(side_file_cases(), check_side_file, 600),
    "json lines": Target(line_cases(), check_lines, 3000),
    "images": Target(image_cases(), check_image, 2500),
    "videos": Target(st.deferred(video_cases), check_video, 300),
    "options": Target(option_cases(), check_options, 2300),
    "recipes": Target(recipe_cases(), check_recipe, 700),
    "pipelines": Target(damaged_text(PIPELINE, words=pass_words()), check_pipeline, 2300),
    "stages": Target(stage_cases(), check_stage, 800),
    "samples": Target(sample_cases(), check_ready_samples, 1500),
    "folders": Target(folder_cases(), check_folder, 300),
    "reports": Target(report_cases("report"), check_report, 200),
    "verifications": Target(report_cases("verification"), check_report, 100),
    "timings": Target(report_cases("timings"), check_report, 100),
}
