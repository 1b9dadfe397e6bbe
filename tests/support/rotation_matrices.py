"""Rotation matrices in float64, from the definitions with Python's integers, and what they do to a small model."""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.tensors import Array

Matrix = npt.NDArray[np.float64]
MATRIX_ORDERS = {80: 20, 576: 36, 896: 28, 1152: 36, 12: 12, 24: 12}  # size -> order of the Paley matrix in it


def quadratic_character(a: int, q: int) -> int:
    """Euler's criterion."""
    power = pow(a % q, (q - 1) // 2, q)
    return -1 if power == q - 1 else power


def paley_matrix(order: int) -> Matrix:
    q = order - 1 if all((order - 1) % d for d in range(2, order - 1)) else order // 2 - 1
    core = np.array([[quadratic_character(i - j, q) for j in range(q)] for i in range(q)], dtype=np.float64)
    corner, edge = np.zeros((1, 1)), np.ones((1, q))
    if q % 4 == 3:
        first: Matrix = np.eye(q + 1) + np.block([[corner, edge], [-edge.T, core]])
        return first
    conference = np.block([[corner, edge], [edge.T, core]])
    second: Matrix = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return second


def rotation_matrix(size: int, seed: int, name: str, keeps_mean: bool) -> Matrix:
    """R in float64."""
    paley = MATRIX_ORDERS.get(size, 1)
    sylvester = size // paley & -(size // paley)
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for j in range(sylvester)] for i in range(sylvester)])
    if paley > 1:
        hadamard = np.kron(hadamard, paley_matrix(paley))
    blocks = np.kron(np.eye(size // len(hadamard)), hadamard) / math.sqrt(len(hadamard))
    digest = int.from_bytes(hashlib.shake_256(f"{name}:{seed}".encode()).digest(math.ceil(size / 8)), "little")
    signs = np.array([-1.0 if digest >> i & 1 else 1.0 for i in range(size)])
    r: Matrix = signs[:, None] * blocks
    if keeps_mean:
        difference = 1 - r.sum(axis=0)
        if np.abs(difference).max() > 1e-9:
            r -= 2 * np.outer(r @ difference, difference) / (difference @ difference)
    return r


LANGUAGE, VISION = ("residual stream", "model.embed_tokens"), ("residual stream", "visual.patch_embed.proj")


def all_rotations(config: dict[str, Any], seed: int = 0) -> dict[tuple[str, str], int]:
    """(kind, name) of everything that can be rotated in the model of `float_model` -> seed."""
    heads = [f"visual.blocks.{index}.attn.qkv" for index in range(config["vision_config"]["depth"])]
    heads += [f"model.layers.{index}.self_attn.v_proj" for index in range(config["num_hidden_layers"])]
    return dict.fromkeys([LANGUAGE, VISION, *(("attention heads", name) for name in heads)], seed)


def rotate_model(values: dict[str, Array], config: dict[str, Any], seeds: dict[tuple[str, str], int]) -> None:
    """Rotates the tensors of `float_model` in float64, in place. seeds: see `all_rotations`; others are not rotated."""
    vision = config["vision_config"]

    def fold_norm(norm: str, *linears: str) -> None:
        for linear in linears:
            weight = values[f"{linear}.weight"]
            gamma = values[f"{norm}.weight"].astype(np.float64)
            values[f"{linear}.weight"] = weight * np.tile(gamma, weight.shape[1] // len(gamma))
        values[f"{norm}.weight"] = np.ones_like(values[f"{norm}.weight"])

    def read(r: Matrix, *linears: str) -> None:
        for linear in linears:
            weight = values[f"{linear}.weight"]
            values[f"{linear}.weight"] = (weight.reshape(len(weight), -1, len(r)) @ r).reshape(weight.shape)

    def write(r: Matrix, linear: str, first: int = 0) -> None:
        weight = values[f"{linear}.weight"].astype(np.float64)
        rows = slice(first, first + len(r))
        weight[rows] = (r.T @ weight[rows].reshape(len(r), -1)).reshape(weight[rows].shape)
        values[f"{linear}.weight"] = weight
        if f"{linear}.bias" in values:
            bias = values[f"{linear}.bias"].astype(np.float64)
            bias[rows] = bias[rows] @ r
            values[f"{linear}.bias"] = bias

    blocks = [f"visual.blocks.{index}" for index in range(vision["depth"])]
    layers = [f"model.layers.{index}" for index in range(config["num_hidden_layers"])]
    if LANGUAGE in seeds:
        r = rotation_matrix(config["hidden_size"], seeds[LANGUAGE], LANGUAGE[1], False)
        if "lm_head.weight" not in values:
            values["lm_head.weight"] = values["model.embed_tokens.weight"]
        fold_norm("model.norm", "lm_head")
        read(r, "model.embed_tokens", "lm_head")
        write(r, "visual.merger.mlp.2")
        for layer in layers:
            qkv = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
            fold_norm(f"{layer}.input_layernorm", *qkv)
            fold_norm(f"{layer}.post_attention_layernorm", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            read(r, *qkv, f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            write(r, f"{layer}.self_attn.o_proj")
            write(r, f"{layer}.mlp.down_proj")
    if VISION in seeds:
        r = rotation_matrix(vision["hidden_size"], seeds[VISION], VISION[1], False)
        write(r, "visual.patch_embed.proj")
        fold_norm("visual.merger.ln_q", "visual.merger.mlp.0")
        read(r, "visual.merger.mlp.0")
        for block in blocks:
            fold_norm(f"{block}.norm1", f"{block}.attn.qkv")
            fold_norm(f"{block}.norm2", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
            read(r, f"{block}.attn.qkv", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
            write(r, f"{block}.attn.proj")
            write(r, f"{block}.mlp.down_proj")
    for (kind, name), seed in seeds.items():
        if kind != "attention heads":
            continue
        in_vision = name.startswith("visual")
        width, count = (
            (vision["hidden_size"], vision["num_heads"])
            if in_vision
            else (config["hidden_size"], config["num_attention_heads"])
        )
        size = width // count
        r = rotation_matrix(size, seed, name, False)
        for head in range(count if in_vision else config["num_key_value_heads"]):
            write(r, name, (2 * width if in_vision else 0) + head * size)
        read(r, name.replace("qkv", "proj").replace("v_proj", "o_proj"))
