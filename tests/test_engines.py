"""vlqc.engines: the table of what each engine accepts."""

import subprocess
import sys

import pytest

from vlqc import engines
from vlqc.engines import Scheme, assignment_faults, fused_group, legal_schemes, loads, part_of

FLOAT, W8A8, DYNAMIC, W4A8 = Scheme.FLOAT, Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC
LAYER = "model.layers.3"
BLOCK = "visual.blocks.0"


@pytest.mark.parametrize(
    ("layer", "members"),
    [
        (f"{LAYER}.self_attn.k_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        (f"{LAYER}.mlp.up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        (f"{LAYER}.self_attn.o_proj", ["self_attn.o_proj"]),
        (f"{LAYER}.mlp.down_proj", ["mlp.down_proj"]),
        (f"{BLOCK}.mlp.gate_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        (f"{BLOCK}.attn.qkv", ["attn.qkv"]),
    ],
)
def test_fused_groups(layer: str, members: list[str]) -> None:
    """Catches a group split or mixed across blocks, which engines load as silent garbage."""
    prefix = ".".join(layer.split(".")[:3])
    assert fused_group(layer) == tuple(f"{prefix}.{member}" for member in members)


@pytest.mark.parametrize("layer", ["lm_head", "visual.merger.mlp.0", "model.norm", "something.else"])
def test_a_layer_outside_every_group_stands_alone(layer: str) -> None:
    """Catches a pattern that swallows layers which no engine fuses."""
    assert fused_group(layer) == (layer,)


# One line per row of the engines' own tables: layer, legal in vLLM Ascend, legal in MindIE.
LEGAL = [
    (f"{LAYER}.self_attn.q_proj", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.self_attn.o_proj", {FLOAT, W8A8, DYNAMIC, W4A8}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.mlp.gate_proj", {FLOAT, W8A8, DYNAMIC, W4A8}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.mlp.down_proj", {FLOAT, W8A8, DYNAMIC, W4A8}, {FLOAT, W8A8, DYNAMIC}),
    (f"{BLOCK}.attn.qkv", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
    (f"{BLOCK}.attn.proj", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
    (f"{BLOCK}.mlp.up_proj", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
    (f"{BLOCK}.mlp.down_proj", {FLOAT, W8A8, DYNAMIC}, {FLOAT}),
    ("visual.merger.mlp.2", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
    ("visual.patch_embed.proj", {FLOAT}, {FLOAT}),
    ("model.embed_tokens", {FLOAT}, {FLOAT}),
    (f"{LAYER}.input_layernorm", {FLOAT}, {FLOAT}),
    ("lm_head", {FLOAT}, {FLOAT}),
    ("unheard.of", {FLOAT}, {FLOAT}),
]


@pytest.mark.parametrize(("layer", "vllm_ascend", "mindie"), LEGAL)
def test_legal_schemes(layer: str, vllm_ascend: set[Scheme], mindie: set[Scheme]) -> None:
    """Catches a scheme offered where an engine refuses it, and `both` being anything but the intersection."""
    assert legal_schemes("vllm-ascend", layer) == vllm_ascend
    assert legal_schemes("mindie", layer) == mindie
    assert legal_schemes("both", layer) == vllm_ascend & mindie


def test_an_unknown_target_is_refused() -> None:
    """Catches a misspelt target answered with an empty, and therefore permissive, set of rules."""
    with pytest.raises(ValueError, match="vllm-ascend, mindie, both"):
        legal_schemes("vllm", "lm_head")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{BLOCK}.attn.qkv", "vision"),
        ("visual.patch_embed.proj", "vision"),
        ("visual.merger.ln_q", "merger"),
        (f"{LAYER}.mlp.up_proj", "language"),
        ("model.embed_tokens", "language"),
        ("lm_head", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    """Catches the merger counted as vision, or lm_head as language, in the summaries."""
    assert part_of(name) == part


def test_seed_exclusions() -> None:
    """Catches an exclusion of the reference script lost, or one too many."""
    layers = [layer for layer, _, _ in LEGAL if not layer.startswith("unheard")]
    floats = [layer for layer in layers if engines.stays_float_by_seed(layer)]
    assert floats == [
        f"{LAYER}.mlp.down_proj",
        f"{BLOCK}.mlp.down_proj",
        "visual.merger.mlp.2",
        "visual.patch_embed.proj",
        "model.embed_tokens",
        "lm_head",
    ]


def seed_assignment(blocks: int = 2) -> dict[str, Scheme]:
    schemes = {
        "lm_head": FLOAT,
        "model.embed_tokens": FLOAT,
        "visual.merger.mlp.0": FLOAT,
        "visual.merger.mlp.2": FLOAT,
    }
    for index in range(blocks):
        block, layer = f"visual.blocks.{index}", f"model.layers.{index}"
        schemes |= {f"{block}.{name}": W8A8 for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")}
        schemes |= {f"{layer}.self_attn.{name}_proj": W8A8 for name in "qkvo"}
        schemes |= {f"{layer}.mlp.{name}_proj": W8A8 for name in ("gate", "up")}
        schemes |= {f"{block}.mlp.down_proj": FLOAT, f"{layer}.mlp.down_proj": FLOAT}
    return schemes


def described(schemes: dict[str, Scheme]) -> dict[str, str]:
    return {f"{layer}.weight": str(scheme) for layer, scheme in schemes.items()} | {"version": "1.0.0"}


def test_the_seed_assignment_is_legal_in_both_engines() -> None:
    """Catches a table that refuses the very folder both engines are known to load."""
    assert assignment_faults("both", seed_assignment()) == []


# what is changed -> targets that must refuse it
ILLEGAL = [
    ({"model.layers.1.self_attn.q_proj": FLOAT}, {"vllm-ascend", "both"}),  # MindIE runs the members unfused
    ({"model.layers.1.self_attn.q_proj": DYNAMIC}, {"vllm-ascend", "mindie", "both"}),
    ({"visual.blocks.1.mlp.up_proj": FLOAT}, {"vllm-ascend", "mindie", "both"}),
    ({"lm_head": W8A8}, {"vllm-ascend", "mindie", "both"}),
    ({"visual.blocks.1.mlp.down_proj": W8A8}, {"mindie", "both"}),
    ({"visual.blocks.1.attn.qkv": FLOAT}, {"mindie", "both"}),  # the tower is quantized, one qkv is not
    ({"model.layers.0.mlp.down_proj": DYNAMIC}, {"mindie", "both"}),  # dynamic beside a quantized tower
    ({"model.layers.0.self_attn.o_proj": W4A8}, {"mindie", "both"}),
    ({"model.layers.0.mlp.down_proj": W8A8}, set()),
    ({"visual.merger.mlp.0": W8A8}, set()),
    ({"visual.blocks.0.attn.proj": FLOAT}, set()),
]


@pytest.mark.parametrize(("change", "refusing"), ILLEGAL)
def test_illegal_assignments(change: dict[str, Scheme], refusing: set[str]) -> None:
    """Catches a rule of one engine not applied, or applied to the other engine."""
    targets = {"vllm-ascend", "mindie", "both"}
    schemes = seed_assignment() | change
    assert {target for target in targets if assignment_faults(target, schemes)} == refusing


def test_a_float_vision_tower_is_legal_in_mindie() -> None:
    """Catches the qkv-in-every-block rule applied to a tower that is float as a whole."""
    schemes = {name: FLOAT if name.startswith("visual.") else DYNAMIC for name in seed_assignment()}
    schemes |= {"lm_head": FLOAT, "model.embed_tokens": FLOAT}
    assert assignment_faults("mindie", schemes) == []


QUANTIZED = {"quantize": "w8a8", "vision_config": {"quantize": "w8a8"}}
VLLM, MINDIE = "vLLM Ascend 0.10.2rc2 and later", "MindIE 2.2.RC1 and later"


@pytest.mark.parametrize(
    ("change", "config", "expected"),
    [
        ({}, {"vision_config": {}}, [VLLM]),
        ({}, QUANTIZED, [VLLM, MINDIE]),
        ({}, QUANTIZED | {"quantization_config": {}}, [MINDIE]),  # vLLM would read that key
        ({}, QUANTIZED | {"text_config": {}}, [VLLM]),  # MindIE wants a flat config
        ({}, QUANTIZED | {"vision_config": {}}, [VLLM]),  # MindIE would build a float tower
        ({"visual.blocks.1.mlp.down_proj": W8A8}, QUANTIZED, [VLLM]),
        ({"lm_head": W8A8}, QUANTIZED, []),
        ({"model.layers.0.mlp.down_proj": DYNAMIC}, QUANTIZED, ["vLLM Ascend 0.11 and later"]),
        ({"visual.merger.mlp.0": DYNAMIC}, QUANTIZED, ["vLLM Ascend 0.16 and later"]),
        ({"model.layers.0.mlp.down_proj": W4A8}, QUANTIZED, ["vLLM Ascend 0.11 to 0.26.0rc"]),
        (
            {"model.layers.0.mlp.down_proj": W4A8, "visual.merger.mlp.0": DYNAMIC},
            QUANTIZED,
            ["vLLM Ascend 0.16 to 0.26.0rc"],
        ),
    ],
)
def test_which_engines_load_a_folder(change: dict[str, Scheme], config: dict[str, object], expected: list[str]) -> None:
    """Catches a promise to the user that an engine version would break."""
    assert loads(described(seed_assignment() | change), "bfloat16", config) == expected


def test_per_token_schemes_need_bfloat16() -> None:
    """Catches a float16 per-token folder announced as loadable."""
    description = described(seed_assignment() | {"model.layers.0.mlp.down_proj": DYNAMIC})
    assert loads(description, "float16", QUANTIZED) == []
    assert loads(described(seed_assignment()), "float16", QUANTIZED) == [VLLM, MINDIE]


def test_the_table_names_known_versions_only() -> None:
    """Catches a new line whose version has no place in the order of versions."""
    for rule in engines.TABLE:
        assert {rule.since, rule.until or rule.since} <= set(engines.VERSIONS[rule.engine])


def test_serve_commands() -> None:
    """Catches a summary that sends the user to the wrong engine."""
    vllm, mindie = engines.serve_commands("both", "out")
    assert vllm == "vllm serve out --quantization ascend"
    assert '"modelWeightPath": "out"' in mindie
    assert engines.serve_commands("mindie", "out") == [mindie]


def test_no_torch_is_imported() -> None:
    """Catches an import that makes the option checks (before anything is loaded) wait for torch."""
    code = "import sys, vlqc.engines; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
